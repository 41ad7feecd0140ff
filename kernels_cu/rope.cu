// Rotary position embedding of Q or K. Array code: refengine.ops.rope.rope_neox and rope_norm.
//
//   rope_neox_f32  rotates pairs (i, i + half);  rope_norm_f32  pairs (2i, 2i + 1);  by the angle of the token and i:
//   (a, b) → (a · cos - b · sin, a · sin + b · cos); each product and difference is rounded. Elements from 2 · half on are
//   copied.
//
// x, y (n_tokens, n_head, head_dim) float32, y may be x; cos, sin (n_tokens, half) float32, computed on the host by
// ops.rope.rope_angles with YaRN and frequency factors. Grid: x tokens, y heads; block: at least half threads.
// No sums. Moves 8 bytes per element.
//
//   rope_append  for n_rows new tokens, in prompts: RMS norm of the heads of Q and K (if q_norm and k_norm are given), the
//                rotation (if cos is given), Q times q_factor (if it is not 1); writes K and V to the cache like
//                kv_append_f16 (attention.cu). Gives the same bits as those kernels one after another.
// Rows of Q, K and V begin at qkv; their distances are q_stride, k_stride and v_stride floats. q_norm, k_norm (head_dim,).
// cos, sin (n_positions, half) float32, by position. positions (n_rows,) int32: below zero there is no row, and nothing is
// written. tables (n_rows, table_stride): blocks of the cache. q_out (n_rows, n_head, head_dim). Grid: x rows, y heads of
// Q, K and V one after another; block: 32 threads. Precondition: head_dim is at most 128. May be launched to overlap with
// the previous kernel.
#include "arguments.cuh"
#include "norm.cuh"

template <bool NEOX>
__device__ __forceinline__ void rotate(const float* x, const float* cos, const float* sin, float* y, int half,
                                       int head_dim) {
  long long start = (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * head_dim;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    long long first = start + (NEOX ? i : 2 * i), second = NEOX ? first + half : first + 1;
    float c = cos[static_cast<long long>(blockIdx.x) * half + i], s = sin[static_cast<long long>(blockIdx.x) * half + i];
    float a = x[first], b = x[second];
    y[first] = __fadd_rn(__fmul_rn(a, c), -__fmul_rn(b, s));
    y[second] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
  }
  for (int i = 2 * half + threadIdx.x; i < head_dim; i += blockDim.x) y[start + i] = x[start + i];
}

extern "C" __global__ void rope_neox_f32(const float* x, const float* cos, const float* sin, float* y, int half,
                                         int head_dim) {
  rotate<true>(x, cos, sin, y, half, head_dim);
}

extern "C" __global__ void rope_norm_f32(const float* x, const float* cos, const float* sin, float* y, int half,
                                         int head_dim) {
  rotate<false>(x, cos, sin, y, half, head_dim);
}

constexpr int MOST_HEAD_DIM = 128;

// rms_norm_f32 of a head by one warp.
__device__ __forceinline__ void norm_head(float* row, const float* weight, int n, float eps) {
  float squares = sum_by_warp<MOST_HEAD_DIM / 32>(n, [&](int j) {
    float x = row[j * 32 + threadIdx.x];
    return __fmul_rn(x, x);
  });
  float factor = norm_scale(squares, static_cast<float>(n), eps);
  for (int i = threadIdx.x; i < n; i += 32) row[i] = row[i] * factor * weight[i];
}

extern "C" __global__ void __launch_bounds__(32)
    rope_append(Projections qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin,
                const int* positions, const int* tables, float* q_out, NewRows k_cache, NewRows v_cache, int q_stride,
                int k_stride, int v_stride, int n_head, int n_head_kv, int head_dim, int half, int neox, int block_size,
                int table_stride, float eps, float q_factor) {
  __shared__ float row[MOST_HEAD_DIM];
  let_next_begin();
  wait_for_previous();
  int token = blockIdx.x, lane = threadIdx.x, position = positions[token];
  if (position < 0) return;
  int head = blockIdx.y;
  bool of_q = head < n_head, of_k = !of_q && head < n_head + n_head_kv;
  if (!of_q) head -= of_k ? n_head : n_head + n_head_kv;
  const float* from = of_q ? qkv.q : of_k ? qkv.k : qkv.v;
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
  int block = tables[static_cast<long long>(token) * table_stride + position / block_size];
  long long at = cached_row(block, n_head_kv, head, block_size, position % block_size);
  float top = 0.0f;
  for (int i = lane; i < head_dim; i += 32) top = larger_or_nan(top, fabsf(row[i]));
  int e = row_exponent(warp_top(top));
  f16* values = of_k ? k_cache.values : v_cache.values;
  for (int i = lane; i < head_dim; i += 32) values[at * head_dim + i] = f32_to_f16(times_power(row[i], e));
  if (lane == 0) (of_k ? k_cache.exponents : v_cache.exponents)[at] = static_cast<unsigned char>(e + 127);
}
