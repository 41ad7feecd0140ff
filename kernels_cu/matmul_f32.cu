// Products with F32 and BF16 weights in float32, because tensor cores would round them.
//
// Array code: refengine.ops.linear.linear and linear_experts. y[t, o] = Σ_k W[o, k] x[t, k] + bias[o] + residual[t, o];
// x (·, n_in) float32, W rows as in the file, y (·, n_out) float32, bias (n_out,) and residual (as y) float32 or null;
// groups and bias of experts as in matmul.cu. May be launched to overlap with the previous kernel.
// The order of additions depends on n_in only: lane l adds columns l, l + 32, … with fused multiply-adds, then warp_sum.
// Grid: x groups of n_warps outputs, y groups of 8 rows; a warp computes one output. Weights are read once for 8 rows.
#include "arguments.cuh"
#include "floats.cuh"

template <class W>
__device__ __forceinline__ void product(const W* w, const float* x, const Groups& groups, const float* bias,
                                        const float* residual, float* y, int n_out, int n_in, int n_rows) {
  let_next_begin();
  wait_for_previous();
  constexpr int N = 8;
  int lane = threadIdx.x % 32, out = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  int expert = 0, first = blockIdx.y * N, count = min(N, n_rows - first);
  if (groups.group) {
    const int* group = groups.group + 3 * blockIdx.y;
    expert = group[0], first = group[1], count = group[2];
  }
  if (out >= n_out || !count) return;
  const W* row = w + (static_cast<long long>(expert) * n_out + out) * n_in;
  const float* from[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    int slot = first + min(n, count - 1);
    from[n] = x + static_cast<long long>(groups.x_rows ? groups.x_rows[slot] : slot) * n_in;
  }
  float sums[N] = {};
  for (int k = lane; k < n_in; k += 32) {
    float weight = value_of(row[k]);
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = __fmaf_rn(weight, from[n][k], sums[n]);
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    float sum = warp_sum(sums[n]);
    if (n >= count || lane) continue;
    if (bias) sum = __fadd_rn(sum, bias[static_cast<long long>(expert) * n_out + out]);
    int slot = first + n;
    long long at = static_cast<long long>(groups.y_rows ? groups.y_rows[slot] : slot) * n_out + out;
    y[at] = residual ? __fadd_rn(sum, residual[at]) : sum;
  }
}

extern "C" __global__ void rows8_f32(const float* w, const float* x, Groups groups, const float* bias,
                                      const float* residual, float* y, int n_out, int n_in, int n_rows) {
  product(w, x, groups, bias, residual, y, n_out, n_in, n_rows);
}

extern "C" __global__ void rows8_bf16(const unsigned short* w, const float* x, Groups groups, const float* bias,
                                      const float* residual, float* y, int n_out, int n_in, int n_rows) {
  product(w, x, groups, bias, residual, y, n_out, n_in, n_rows);
}
