// Converts a row to the form that products read. Shared by quantize_rows.cu, norm.cu and few_rows.cu.

// A lane's eight columns of a block of 32: 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3, for lane 4r + c.
struct EightColumns {
  float x[8];
};
// Whether a lane's block exists, of eight blocks of a row from block `start` on: lane 4r + c has columns of block start + r.
__device__ __forceinline__ bool in_row(int start, int n_in) {
  return (start + static_cast<int>(threadIdx.x) % 32 / 4) * 32 < n_in;
}
// The lane's columns; zeros after the row's end.
__device__ __forceinline__ EightColumns columns_of_row(const float* row, int start, int n_in) {
  if (!in_row(start, n_in)) return {};
  const float4* from = reinterpret_cast<const float4*>(row + (start + threadIdx.x % 32 / 4) * 32) + threadIdx.x % 4;
  float4 a = from[0], b = from[4];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
// The largest magnitude, as bits, which are in the order of magnitudes, and NaN above all.
__device__ __forceinline__ unsigned top_of(const EightColumns& x) {
  unsigned top = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) top = max(top, __float_as_uint(x.x[i]) & 0x7fffffffu);
  return top;
}

// Writes the halves x · 2^-e of eight blocks, and their sums, with one warp. halves and sums: of the row.
__device__ __forceinline__ void blocks_as_halves(const EightColumns& x, int e, int start, f16* halves, unsigned* sums) {
  int block = start + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  auto pair = [&](int i) { return f32_to_f16x2(times_power(x.x[i], e), times_power(x.x[i + 1], e)); };
  uint4 words = make_uint4(pair(0), pair(2), pair(4), pair(6));
  // The tree of warp_sum for one column in a lane: columns 16, 8, 4, 2 and 1 apart are added one after another.
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[i] = half_of(words, i) + half_of(words, 4 + i);
    sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
    sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
  }
  float total = ((sum[0] + sum[2]) + (sum[1] + sum[3])) * 0x1p-5f;
  f16 most = f32_to_f16(total);
  f16 rest = f32_to_f16(__fadd_rn(total, -f16_to_f32(most)));
  reinterpret_cast<uint4*>(halves)[block * 4 + c] = words;
  if (c == 0) sums[block] = pack_f16x2(most, rest);
}

// Writes row `out_row` of halves x · 2^-e, sums and scale from n_in floats x, with all threads of a block.
__device__ __forceinline__ void write_halves(const float* row, int out_row, int e, f16* out, float* scale, unsigned* sums,
                                             int n_in) {
  int n_blocks = padded(n_in) / 32, first = threadIdx.x / 32 * 8, n_warps = blockDim.x / 32;
  for (int start = first; start < n_blocks; start += n_warps * 8)
    blocks_as_halves(columns_of_row(row, start, n_in), e, start, out + static_cast<long long>(out_row) * n_blocks * 32,
                     sums + static_cast<long long>(out_row) * n_blocks);
  if (threadIdx.x == 0) scale[out_row] = power_of_two(e);
}

// An exponent for a row after an RMS norm, from the largest magnitudes, as bits, of the row before it and of the weights, and
// the norm's scale: no element is larger than what a norm makes of both of them, because rounding keeps the order. The exponent
// may be larger than that of the largest element, which takes nothing from the precision of halves, but from their range.
__device__ __forceinline__ int normed_exponent(unsigned top, unsigned weight_top, float scale) {
  return row_exponent(__fmul_rn(__fmul_rn(__uint_as_float(top), scale), __uint_as_float(weight_top)));
}

// The same with the exponent for the largest magnitude. tops: one number per warp.
__device__ __forceinline__ void row_as_halves(const float* row, int out_row, f16* out, float* scale, unsigned* sums,
                                              int n_in, unsigned* tops) {
  int n_blocks = padded(n_in) / 32, first = threadIdx.x / 32 * 8, n_warps = blockDim.x / 32;
  unsigned top = 0;
  for (int start = first; start < n_blocks; start += n_warps * 8) top = max(top, top_of(columns_of_row(row, start, n_in)));
  top = __reduce_max_sync(ALL_LANES, top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < n_warps; i++) top = max(top, tops[i]);
  write_halves(row, out_row, row_exponent(__uint_as_float(top)), out, scale, sums, n_in);
}
