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

// y = swiglu(gate + bias, up + bias)
struct Gated {
  const float *gate_bias, *up_bias;
  float* y;
  int n_out, clamped;
  struct Loaded {
    float gate_bias, up_bias;
  };
  __device__ __forceinline__ void ahead(int tile) const {
    if (gate_bias) prefetch(gate_bias + tile * 16);
    if (up_bias) prefetch(up_bias + tile * 16);
  }
  __device__ __forceinline__ Loaded load(const Rows& rows, int, int tile, int out) const {
    long long at = static_cast<long long>(rows.expert) * n_out + tile * 16 + out;
    return {gate_bias ? gate_bias[at] : 0.0f, up_bias ? up_bias[at] : 0.0f};
  }
  __device__ __forceinline__ void put(const Rows& rows, int number, int tile, int out, const float (&sums)[2],
                                      const Loaded& loaded) const {
    float g = gate_bias ? __fadd_rn(sums[0], loaded.gate_bias) : sums[0];
    float u = up_bias ? __fadd_rn(sums[1], loaded.up_bias) : sums[1];
    y[place_of(rows, number, tile * 16 + out, n_out)] = clamped ? swiglu_clamped(g, u) : swiglu(g, u);
  }
};

#define GATE_UP(name, THREADS, Q)                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                        \
      name(Matrix gate, Matrix up, Activations x, Groups groups, const float* gate_bias, const float* up_bias,    \
           float* y, int n_out, int n_in, int n_rows, int clamped, int shift,    int chunk, float eps) {          \
    rows8<Q>(SideBySide<2>{{planes_of(gate, n_in), planes_of(up, n_in)}}, x, groups, n_rows, n_out, n_in,         \
             {shift, chunk, eps}, Gated{gate_bias, up_bias, y, n_out, clamped});                               \
  }
GATE_UP(gate_up_q4_0, 320, Q4_0)
GATE_UP(gate_up_q4_1, 320, Q4_1)
GATE_UP(gate_up_q5_0, 320, Q5_0)
GATE_UP(gate_up_q5_1, 320, Q5_1)
GATE_UP(gate_up_q8_0, 320, Q8_0)
GATE_UP(gate_up_q4_k, 320, Q4_K)
GATE_UP(gate_up_q5_k, 320, Q5_K)
GATE_UP(gate_up_q6_k, 320, Q6_K)
GATE_UP(gate_up_mxfp4, 320, MXFP4)
GATE_UP(gate_up_f16, 320, F16)

// y = gelu(up + bias)
struct Gelu {
  const float* bias;
  float* y;
  int n_out;
  struct Loaded {
    float bias;
  };
  __device__ __forceinline__ void ahead(int tile) const {
    if (bias) prefetch(bias + tile * 16);
  }
  __device__ __forceinline__ Loaded load(const Rows&, int, int tile, int out) const {
    return {bias ? bias[tile * 16 + out] : 0.0f};
  }
  __device__ __forceinline__ void put(const Rows& rows, int number, int tile, int out, const float (&sum)[1],
                                      const Loaded& loaded) const {
    y[place_of(rows, number, tile * 16 + out, n_out)] = gelu(bias ? __fadd_rn(sum[0], loaded.bias) : sum[0]);
  }
};

#define UP_GELU(name, THREADS, Q)                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                        \
      name(Matrix up, Activations x, const float* up_bias, float* y, int n_out, int n_in, int n_rows,             \
           int shift,    int chunk, float eps) {                                                                  \
    rows8<Q>(SideBySide<1>{{planes_of(up, n_in)}}, x, Groups{}, n_rows, n_out, n_in, {shift, chunk, eps},      \
             Gelu{up_bias, y, n_out});                                                                            \
  }
UP_GELU(up_gelu_q4_0, 320, Q4_0)
UP_GELU(up_gelu_q4_1, 320, Q4_1)
UP_GELU(up_gelu_q5_0, 320, Q5_0)
UP_GELU(up_gelu_q5_1, 320, Q5_1)
UP_GELU(up_gelu_q8_0, 320, Q8_0)
UP_GELU(up_gelu_q4_k, 320, Q4_K)
UP_GELU(up_gelu_q5_k, 320, Q5_K)
UP_GELU(up_gelu_q6_k, 320, Q6_K)
UP_GELU(up_gelu_mxfp4, 320, MXFP4)
UP_GELU(up_gelu_f16, 320, F16)
