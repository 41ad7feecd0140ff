// The small kernels of a decode step, each for a chain of others: one new token for each of up to n_rows sequences.
//
//   rms_norm_f16    norm.cu's rms_norm_f32, then activations_f16: rows as products take them
//   layer_norm_f16  the same of layer_norm_f32
//   rope_append     RMS norm of heads of Q and K (where q_norm and k_norm are given), rope.cu's rotation of them (where cos
//                   is given), Q times q_factor (where that is not 1), and K and V into the cache as kv_append_f16 does
//
// Twins: those kernels one after another: the same bits, every sum in their order. All may be launched to overlap with the
// kernel before.
//
// Norms: x (n_rows, n) float32; weight, bias (n,); y (n_rows, n) float32 or null; out, scale, sums as in activations.cu, or
// out null. Grid: x rows; block: 256 threads; dynamic shared memory: 4 n bytes. Reads a row once, writes 2 (6) bytes each.
// rope_append: rows of q, k and v are q_stride, k_stride and v_stride floats apart. q_norm, k_norm (head_dim,). cos, sin
// (n_positions, half) float32, by position (ops.rope.rope_angles). positions (n_rows,) int32: below zero, there is no such
// row, and nothing is written. tables (n_rows, table_stride): blocks of the cache. q_out (n_rows, n_head, head_dim).
// Grid: x rows, y heads of Q, K and V one after another; block: 32 threads. Precondition: head_dim at most 128.
#include "norm.cuh"
#include "activations.cuh"

// Elements i, i + 256, … are thread i's until all are there.
__device__ __forceinline__ void finish_norm(float* row, float* y, f16* out, float* scale, unsigned* sums, int n,
                                            float* scratch) {
  if (y)
    for (int i = threadIdx.x; i < n; i += THREADS) y[static_cast<long long>(blockIdx.x) * n + i] = row[i];
  if (!out) return;
  __syncthreads();
  row_as_halves(row, blockIdx.x, out, scale, sums, n, scratch);
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f16(const float* x, const float* weight, float* y, f16* out, float* scale, unsigned* sums, int n, float eps) {
  DYNAMIC_SHARED(float, row);
  __shared__ float scratch[THREADS / 32];
  let_next_begin();
  wait_for_previous();
  for (int i = threadIdx.x; i < n; i += THREADS) row[i] = x[static_cast<long long>(blockIdx.x) * n + i];
  float factor = rms_scale(row, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += THREADS) row[i] = row[i] * factor * weight[i];
  finish_norm(row, y, out, scale, sums, n, scratch);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f16(const float* x, const float* weight, const float* bias, float* y, f16* out, float* scale, unsigned* sums,
                   int n, float eps) {
  DYNAMIC_SHARED(float, row);
  __shared__ float scratch[THREADS / 32];
  let_next_begin();
  wait_for_previous();
  for (int i = threadIdx.x; i < n; i += THREADS) row[i] = x[static_cast<long long>(blockIdx.x) * n + i];
  Moments of = layer_moments(row, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += THREADS) row[i] = (row[i] - of.mean) * of.scale * weight[i] + bias[i];
  finish_norm(row, y, out, scale, sums, n, scratch);
}

constexpr int MOST_HEAD_DIM = 128;

// rms_norm_f32 of a head by one warp: the sums of eight warps of a block one after another.
__device__ __forceinline__ void norm_head(float* row, const float* weight, int n, float eps) {
  float total = 0.0f;
  for (int first = 0; first < n; first += 32) {
    int i = first + threadIdx.x;
    total += warp_sum(i < n ? __fmaf_rn(row[i], row[i], 0.0f) : 0.0f);
  }
  float factor = 1.0f / sqrtf(total / static_cast<float>(n) + eps);
  for (int i = threadIdx.x; i < n; i += 32) row[i] = row[i] * factor * weight[i];
}

extern "C" __global__ void __launch_bounds__(32)
    rope_append(const float* q, const float* k, const float* v, const float* q_norm, const float* k_norm, const float* cos,
                const float* sin, const int* positions, const int* tables, float* q_out, f16* k_cache, f16* v_cache,
                unsigned char* k_exponents, unsigned char* v_exponents, int q_stride, int k_stride, int v_stride,
                int n_head, int n_head_kv, int head_dim, int half, int neox, int block_size, int table_stride, float eps,
                float q_factor) {
  __shared__ float row[MOST_HEAD_DIM];
  let_next_begin();
  wait_for_previous();
  int token = blockIdx.x, lane = threadIdx.x, position = positions[token];
  if (position < 0) return;
  int head = blockIdx.y;
  bool of_q = head < n_head, of_k = !of_q && head < n_head + n_head_kv;
  if (!of_q) head -= of_k ? n_head : n_head + n_head_kv;
  const float* from = of_q ? q : of_k ? k : v;
  from += static_cast<long long>(token) * (of_q ? q_stride : of_k ? k_stride : v_stride) + head * head_dim;
  for (int i = lane; i < head_dim; i += 32) row[i] = from[i];
  const float* weight = of_q ? q_norm : of_k ? k_norm : nullptr;
  if (weight) norm_head(row, weight, head_dim, eps);
  __syncwarp(ALL_LANES);
  if (cos && (of_q || of_k))
    for (int i = lane; i < half; i += 32) {
      int first = neox ? i : 2 * i, second = neox ? i + half : first + 1;
      float c = cos[static_cast<long long>(position) * half + i], s = sin[static_cast<long long>(position) * half + i];
      float a = row[first], b = row[second];
      row[first] = __fadd_rn(__fmul_rn(a, c), -__fmul_rn(b, s));
      row[second] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
    }
  __syncwarp(ALL_LANES);
  if (of_q) {
    float* to = q_out + (static_cast<long long>(token) * n_head + head) * head_dim;
    for (int i = lane; i < head_dim; i += 32) to[i] = q_factor == 1.0f ? row[i] : __fmul_rn(row[i], q_factor);
    return;
  }
  long long slot = static_cast<long long>(tables[static_cast<long long>(token) * table_stride + position / block_size]) *
                       block_size +
                   position % block_size;
  long long at = slot * n_head_kv + head;
  float top = 0.0f;
  for (int i = lane; i < head_dim; i += 32) top = larger_or_nan(top, fabsf(row[i]));
  int e = row_exponent(warp_top(top));
  f16* values = of_k ? k_cache : v_cache;
  for (int i = lane; i < head_dim; i += 32) values[at * head_dim + i] = f32_to_f16(times_power(row[i], e));
  if (lane == 0) (of_k ? k_exponents : v_exponents)[at] = static_cast<unsigned char>(e + 127);
}
