// The first half of a feed-forward in one kernel: products with gate and up, biases, activation; up to 8 rows per block.
//
//   gate_up_*   y = swiglu(x gateᵀ + gate_bias, x upᵀ + up_bias), or swiglu_clamped, by `clamped`
//   up_gelu_*   y = gelu(x upᵀ + up_bias)
//
// Gives the same bits as rows8_* of matmul.cu followed by activation.cu. Arguments, groups of experts, launch and order of
// additions are those of rows8_*; both matrices have the same shape and type. This kernel saves writing and
// reading gate and up.
#include "arguments.cuh"
#include "quants.cuh"
#include "activation.cuh"
#include "matmul.cuh"
#include "norm.cuh"
#include "quantize_rows.cuh"
#include "few_rows.cuh"

#define GATE_UP(name, THREADS, Q)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
      name(Matrix gate, Matrix up, Activations x, Groups groups, const float* gate_bias, const float* up_bias,      \
           float* y, int n_out, int n_in, int n_rows, int clamped, int capacity, int stages, int chunk, float eps) { \
    auto ahead = [&](int expert, int tile) {                                                                        \
      long long at = static_cast<long long>(expert) * n_out + tile * 16;                                            \
      if (gate_bias) prefetch(gate_bias + at);                                                                      \
      if (up_bias) prefetch(up_bias + at);                                                                          \
    };                                                                                                              \
    auto finish = [&](const Rows& rows, int number, int tile, int out, float scale, const float(&sums)[2]) {        \
      out += tile * 16;                                                                                             \
      long long of_bias = static_cast<long long>(rows.expert) * n_out + out;                                        \
      float g = __fmul_rn(sums[0], scale), u = __fmul_rn(sums[1], scale);                                           \
      if (gate_bias) g = __fadd_rn(g, gate_bias[of_bias]);                                                          \
      if (up_bias) u = __fadd_rn(u, up_bias[of_bias]);                                                              \
      y[rows.of_y(number) * static_cast<long long>(n_out) + out] = clamped ? swiglu_clamped(g, u) : swiglu(g, u);   \
    };                                                                                                              \
    rows8<Q>(SideBySide<2>{{planes_of(gate, n_in), planes_of(up, n_in)}}, x, groups, n_rows, n_out, n_in,           \
             {capacity, stages, chunk, eps}, ahead, finish);                                                        \
  }
GATE_UP(gate_up_q4_0, 256, Q4_0)
GATE_UP(gate_up_q4_1, 256, Q4_1)
GATE_UP(gate_up_q5_0, 256, Q5_0)
GATE_UP(gate_up_q5_1, 256, Q5_1)
GATE_UP(gate_up_q8_0, 256, Q8_0)
GATE_UP(gate_up_q4_k, 384, Q4_K)
GATE_UP(gate_up_q5_k, 256, Q5_K)
GATE_UP(gate_up_q6_k, 256, Q6_K)
GATE_UP(gate_up_mxfp4, 384, MXFP4)
GATE_UP(gate_up_f16, 256, F16)

#define UP_GELU(name, THREADS, Q)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                          \
      name(Matrix up, Activations x, const float* up_bias, float* y, int n_out, int n_in, int n_rows, int capacity, \
           int stages, int chunk, float eps) {                                                                      \
    auto ahead = [&](int, int tile) {                                                                               \
      if (up_bias) prefetch(up_bias + tile * 16);                                                                   \
    };                                                                                                              \
    auto finish = [&](const Rows& rows, int number, int tile, int out, float scale, const float(&sum)[1]) {         \
      out += tile * 16;                                                                                             \
      float u = __fmul_rn(sum[0], scale);                                                                           \
      if (up_bias) u = __fadd_rn(u, up_bias[out]);                                                                  \
      y[rows.of_y(number) * static_cast<long long>(n_out) + out] = gelu(u);                                         \
    };                                                                                                              \
    rows8<Q>(SideBySide<1>{{planes_of(up, n_in)}}, x, Groups{}, n_rows, n_out, n_in, {capacity, stages, chunk, eps}, \
             ahead, finish);                                                                                        \
  }
UP_GELU(up_gelu_q4_0, 256, Q4_0)
UP_GELU(up_gelu_q4_1, 256, Q4_1)
UP_GELU(up_gelu_q5_0, 256, Q5_0)
UP_GELU(up_gelu_q5_1, 256, Q5_1)
UP_GELU(up_gelu_q8_0, 256, Q8_0)
UP_GELU(up_gelu_q4_k, 384, Q4_K)
UP_GELU(up_gelu_q5_k, 256, Q5_K)
UP_GELU(up_gelu_q6_k, 256, Q6_K)
UP_GELU(up_gelu_mxfp4, 384, MXFP4)
UP_GELU(up_gelu_f16, 256, F16)
