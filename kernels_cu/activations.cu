// Activation rows as products take them: halves with an exact power of two a row, and sums of 32.
//
//   e = the exponent that puts max |x[t]| into [2^14, 2^15), at least -126; out = half(x · 2^-e) in layout.activation_order;
//   scale[t] = 2^e; sums[t, b] = 1/32 of the sum of block b's 32 halves, as two halves that add up to it to 2^-22
// so that rows of 1e6 do not overflow and rows of 1e-6 do not vanish: what is 2^-28 of the row's largest keeps all 11
// bits. A row with NaN or infinity has e = 0, and they come out as they went in. A row of zeros has e = 0.
//
// Twin: refengine.cuda.reference.activations_f16. x (n_rows, n_in) float32; out (n_rows, n_in) halves; scale (n_rows,);
// sums (n_rows, n_in / 32) pairs of halves. Grid: x rows; block: any number of warps.
// Order: block sums by the tree of warp_sum; a maximum has no order. Reads x twice (once from cache), writes 2 bytes each.
extern "C" __global__ void activations_f16(const float* x, f16* out, float* scale, unsigned* sums, int n_in) {
  __shared__ float largest[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const float* row = x + static_cast<long long>(blockIdx.x) * n_in;
  float top = 0.0f;
  for (int k = threadIdx.x; k < n_in; k += blockDim.x) top = larger_or_nan(top, fabsf(row[k]));
  top = warp_top(top);
  if (lane == 0) largest[warp] = top;
  __syncthreads();
  for (int i = 0; i < n_warps; i++) top = larger_or_nan(top, largest[i]);
  int e = row_exponent(top);
  for (int block = warp; block < n_in / 32; block += n_warps) {
    f16 half = f32_to_f16(times_power(row[block * 32 + lane], e));
    // Column 4c + j of half h stands at place 8c + 4h + j.
    int place = lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4;
    out[(static_cast<long long>(blockIdx.x) * (n_in / 32) + block) * 32 + place] = half;
    float sum = warp_sum(f16_to_f32(half)) * 0x1p-5f;
    f16 most = f32_to_f16(sum);
    f16 rest = f32_to_f16(__fadd_rn(sum, -f16_to_f32(most)));
    if (lane == 0) sums[static_cast<long long>(blockIdx.x) * (n_in / 32) + block] = pack_f16x2(most, rest);
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = power_of_two(e);
}
