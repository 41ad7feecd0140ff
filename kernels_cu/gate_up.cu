// The first half of a feed-forward in one kernel: products with gate and up, biases, activation; up to 8 rows per block.
//
//   gate_up_*   y = swiglu(x gateᵀ + gate_bias, x upᵀ + up_bias), or swiglu_clamped, by `clamped`
//   up_gelu_*   y = gelu(x upᵀ + up_bias)
//
// Gives the same bits as rows8_* of matmul.cu followed by activation.cu. Arguments, groups of experts, launch and order of
// additions are those of rows8_*; both matrices have the same shape and type. Dynamic shared memory of gate_up_*: 2048
// bytes per segment. This kernel saves writing and reading gate and up.
#include "arguments.cuh"
#include "quants.cuh"
#include "activation.cuh"
#include "matmul.cuh"

template <class Q>
__device__ __forceinline__ void gate_up(const Planes& gate, const Planes& up, const Activations& x, const Groups& groups,
                                        int n_rows, const float* gate_bias, const float* up_bias, float* y, int n_out,
                                        int clamped) {
  rows8<Q>(SideBySide<2>{{gate, up}}, x, groups, n_rows, n_out, [&](const Rows& rows, int tile, const MmaD (&total)[2]) {
    for_sums(rows, tile, 0, n_out, [&](int i, int number, int out) {
      float g = scaled_sum(total[0].x[i], x, rows, number, gate_bias, out, n_out);
      float u = scaled_sum(total[1].x[i], x, rows, number, up_bias, out, n_out);
      y[rows.of_y(number) * static_cast<long long>(n_out) + out] = clamped ? swiglu_clamped(g, u) : swiglu(g, u);
    });
  });
}

template <class Q>
__device__ __forceinline__ void up_gelu(const Planes& up, const Activations& x, int n_rows, const float* up_bias, float* y,
                                        int n_out) {
  rows8<Q>(SideBySide<1>{{up}}, x, Groups{}, n_rows, n_out,
              [&](const Rows& rows, int tile, const MmaD (&total)[1]) {
                for_sums(rows, tile, 0, n_out, [&](int i, int number, int out) {
                  y[rows.of_y(number) * static_cast<long long>(n_out) + out] =
                      gelu(scaled_sum(total[0].x[i], x, rows, number, up_bias, out, n_out));
                });
              });
}

#define GATE_UP(name, THREADS, Q)                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                       \
      name(Matrix gate, Matrix up, Activations x, Groups groups, const float* gate_bias, const float* up_bias,   \
           float* y, int n_out, int n_in, int n_rows, int clamped) {                                             \
    gate_up<Q>(planes_of(gate, n_in), planes_of(up, n_in), x, groups, n_rows, gate_bias, up_bias, y, n_out,      \
               clamped);                                                                                         \
  }
GATE_UP(gate_up_q4_0, 256, Q4_0)
GATE_UP(gate_up_q4_1, 256, Q4_1)
GATE_UP(gate_up_q5_0, 256, Q5_0)
GATE_UP(gate_up_q5_1, 256, Q5_1)
GATE_UP(gate_up_q8_0, 256, Q8_0)
GATE_UP(gate_up_q4_k, 256, Q4_K)
GATE_UP(gate_up_q5_k, 256, Q5_K)
GATE_UP(gate_up_q6_k, 256, Q6_K)
GATE_UP(gate_up_mxfp4, 256, MXFP4)
GATE_UP(gate_up_f16, 256, F16)

#define UP_GELU(name, THREADS, Q)                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                    \
      name(Matrix up, Activations x, const float* up_bias, float* y, int n_out, int n_in, int n_rows) {       \
    up_gelu<Q>(planes_of(up, n_in), x, n_rows, up_bias, y, n_out);                                            \
  }
UP_GELU(up_gelu_q4_0, 256, Q4_0)
UP_GELU(up_gelu_q4_1, 256, Q4_1)
UP_GELU(up_gelu_q5_0, 256, Q5_0)
UP_GELU(up_gelu_q5_1, 256, Q5_1)
UP_GELU(up_gelu_q8_0, 256, Q8_0)
UP_GELU(up_gelu_q4_k, 256, Q4_K)
UP_GELU(up_gelu_q5_k, 256, Q5_K)
UP_GELU(up_gelu_q6_k, 256, Q6_K)
UP_GELU(up_gelu_mxfp4, 256, MXFP4)
UP_GELU(up_gelu_f16, 256, F16)
