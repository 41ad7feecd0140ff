// Products with F32 and BF16 weights in float32, because tensor cores would round them.
//
// Array code: refengine.ops.linear.linear and linear_experts. y[t, o] = Σ_k W[o, k] x[t, k] + bias[o] + residual[t, o];
// x (·, n_in) float32, W rows as in the file, y (·, n_out) float32, bias (n_out,) and residual (as y) float32 or null;
// groups and bias of experts as in matmul.cu. May be launched to overlap with the previous kernel.
// The order of additions depends on n_in only: lane l adds columns l, l + 32, … with fused multiply-adds, then warp_sum.
// Grid: x groups of n_warps outputs, y groups of 8 rows; a warp computes one output. Weights are read once for 8 rows.
#include "arguments.cuh"
#include "floats.cuh"

template <int N>
constexpr int AHEAD = N == 1 ? 16 : 2;  // columns a lane whose loads are in flight together

// Adds the products of columns k, k + 32, … to a lane's sums for N rows. Not WHOLE: only of columns before n_in.
template <bool WHOLE, int N, class W>
__device__ __forceinline__ void add_columns(float (&sums)[N], const W* row, const float* const (&from)[N], int k, int n_in) {
  float weights[AHEAD<N>], values[AHEAD<N>][N];
#pragma unroll
  for (int i = 0; i < AHEAD<N>; i++) {
    int column = WHOLE ? k + 32 * i : min(k + 32 * i, n_in - 1);
    weights[i] = value_of(row[column]);
#pragma unroll
    for (int n = 0; n < N; n++) values[i][n] = from[n][column];
  }
#pragma unroll
  for (int i = 0; i < AHEAD<N>; i++)
#pragma unroll
    for (int n = 0; n < N; n++)
      if (WHOLE || k + 32 * i < n_in) sums[n] = __fmaf_rn(weights[i], values[i][n], sums[n]);
}

// One output for up to N rows, of which there are `count`.
template <int N, class W>
__device__ __forceinline__ void multiply(const W* row, const float* x, const Groups& groups, const float* bias,
                                         const float* residual, float* y, int n_out, int n_in, int first, int count,
                                         int out) {
  int lane = threadIdx.x % 32;
  const float* from[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    int slot = first + min(n, count - 1);
    from[n] = x + static_cast<long long>(groups.x_rows ? groups.x_rows[slot] : slot) * n_in;
  }
  float sums[N] = {};
  int k = lane;
#pragma unroll 1
  for (; k - lane + 32 * AHEAD<N> <= n_in; k += 32 * AHEAD<N>) add_columns<true>(sums, row, from, k, n_in);
  if (k - lane < n_in) add_columns<false>(sums, row, from, k, n_in);
  float own = 0.0f;  // the sum that the lane writes: row n's in lane n
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sum = warp_sum(sums[n]);
    if (n == lane) own = sum;
  }
  if (lane >= count) return;
  if (bias) own = __fadd_rn(own, bias[out]);
  int slot = first + lane;
  long long at = static_cast<long long>(groups.y_rows ? groups.y_rows[slot] : slot) * n_out + out;
  y[at] = residual ? __fadd_rn(own, residual[at]) : own;
}

template <class W>
__device__ __forceinline__ void product(const W* w, const float* x, const Groups& groups, const float* bias,
                                        const float* residual, float* y, int n_out, int n_in, int n_rows) {
  let_next_begin();
  wait_for_previous();
  constexpr int N = 8;
  int out = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  int expert = 0, first = blockIdx.y * N, count = min(N, n_rows - first);
  if (groups.group) {
    const int* group = groups.group + 3 * blockIdx.y;
    expert = group[0], first = group[1], count = group[2];
  }
  if (out >= n_out || !count) return;
  const W* row = w + (static_cast<long long>(expert) * n_out + out) * n_in;
  const float* of_expert = bias ? bias + static_cast<long long>(expert) * n_out : nullptr;
  if (count == 1)
    multiply<1>(row, x, groups, of_expert, residual, y, n_out, n_in, first, count, out);
  else
    multiply<N>(row, x, groups, of_expert, residual, y, n_out, n_in, first, count, out);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    rows8_f32(const float* w, const float* x, Groups groups, const float* bias, const float* residual, float* y,
              int n_out, int n_in, int n_rows) {
  product(w, x, groups, bias, residual, y, n_out, n_in, n_rows);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    rows8_bf16(const unsigned short* w, const float* x, Groups groups, const float* bias, const float* residual,
               float* y, int n_out, int n_in, int n_rows) {
  product(w, x, groups, bias, residual, y, n_out, n_in, n_rows);
}
