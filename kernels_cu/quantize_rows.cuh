// Converts a row to the form that products read. Shared by quantize_rows.cu, norm.cu and few_rows.cuh.

// A lane's eight columns of a block of 32: 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3, for lane 4r + c.
struct EightColumns {
  float4 first, second;
};
// Eight blocks of a row, from block `start` on: lane 4r + c has columns of block start + r; zeros after the row's end.
__device__ __forceinline__ EightColumns columns_of_row(const float* row, int start, int n_in) {
  int block = start + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if (block * 32 >= n_in) return {};
  const float4* from = reinterpret_cast<const float4*>(row + block * 32) + c;
  return {from[0], from[4]};
}
__device__ __forceinline__ float top_of(float top, const EightColumns& x) {
  const float values[8] = {x.first.x, x.first.y, x.first.z, x.first.w, x.second.x, x.second.y, x.second.z, x.second.w};
#pragma unroll
  for (int i = 0; i < 8; i++) top = larger_or_nan(top, fabsf(values[i]));
  return top;
}

// The largest magnitude in a block of threads; NaN if a thread has it. scratch has a float for every warp; it may be
// reused after the next barrier.
__device__ __forceinline__ float block_top(float top, float* scratch) {
  top = warp_top(top);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i++) top = larger_or_nan(top, scratch[i]);
  return top;
}

// Writes the halves x · 2^-e of eight blocks, and their sums, with one warp. halves and sums: of the row.
__device__ __forceinline__ void blocks_as_halves(const EightColumns& x, int e, int start, int n_in, f16* halves,
                                                 unsigned* sums) {
  int block = start + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float4 a = x.first, b = x.second;
  uint4 words = make_uint4(f32_to_f16x2(times_power(a.x, e), times_power(a.y, e)),
                           f32_to_f16x2(times_power(a.z, e), times_power(a.w, e)),
                           f32_to_f16x2(times_power(b.x, e), times_power(b.y, e)),
                           f32_to_f16x2(times_power(b.z, e), times_power(b.w, e)));
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
  if (block * 32 >= n_in) return;
  reinterpret_cast<uint4*>(halves)[block * 4 + c] = words;
  if (c == 0) sums[block] = pack_f16x2(most, rest);
}

// Writes row `out_row` of halves, sums and scale from n_in floats, with all threads of a block. scratch: one float per warp.
__device__ __forceinline__ void row_as_halves(const float* row, int out_row, f16* out, float* scale, unsigned* sums,
                                              int n_in, float* scratch) {
  int n_blocks = n_in / 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  float top = 0.0f;
  for (int start = warp * 8; start < n_blocks; start += n_warps * 8) top = top_of(top, columns_of_row(row, start, n_in));
  int e = row_exponent(block_top(top, scratch));
  for (int start = warp * 8; start < n_blocks; start += n_warps * 8)
    blocks_as_halves(columns_of_row(row, start, n_in), e, start, n_in, out + static_cast<long long>(out_row) * n_in,
                     sums + static_cast<long long>(out_row) * n_blocks);
  if (threadIdx.x == 0) scale[out_row] = power_of_two(e);
}
