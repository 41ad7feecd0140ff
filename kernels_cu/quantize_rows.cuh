// Converts a row to the form that products read. Shared by quantize_rows.cu and norm.cu.

// Writes row `out_row` of halves, sums and scale from n_in floats, with all threads of a block. largest: one float per warp.
__device__ __forceinline__ void row_as_halves(const float* row, int out_row, f16* out, float* scale, unsigned* sums,
                                              int n_in, float* largest) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  float top = 0.0f;
  for (int k = threadIdx.x; k < n_in; k += blockDim.x) top = larger_or_nan(top, fabsf(row[k]));
  top = warp_top(top);
  if (lane == 0) largest[warp] = top;
  __syncthreads();
  for (int i = 0; i < n_warps; i++) top = larger_or_nan(top, largest[i]);
  int e = row_exponent(top);
  for (int block = warp; block < n_in / 32; block += n_warps) {
    f16 half = f32_to_f16(times_power(row[block * 32 + lane], e));
    // Column 4c + j of half h is written to place 8c + 4h + j.
    int place = lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4;
    out[(static_cast<long long>(out_row) * (n_in / 32) + block) * 32 + place] = half;
    float sum = warp_sum(f16_to_f32(half)) * 0x1p-5f;
    f16 most = f32_to_f16(sum);
    f16 rest = f32_to_f16(__fadd_rn(sum, -f16_to_f32(most)));
    if (lane == 0) sums[static_cast<long long>(out_row) * (n_in / 32) + block] = pack_f16x2(most, rest);
  }
  if (threadIdx.x == 0) scale[out_row] = power_of_two(e);
}
