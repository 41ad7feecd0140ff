// Products with up to three matrices (Q, K, V) of the same type and row length in one kernel, for up to 8 rows per block.
// y[t] has their results one after another.
//
// Gives the same bits as rows8_* of matmul.cu for each matrix. Arguments, launch and order of additions are those of
// rows8_*. The matrices have n_q, n_k and n_out - n_q - n_k outputs (0: no third matrix); biases
// may be null. y (n_rows, n_out) float32. Precondition: n_q and n_k are multiples of 16. Saves launches, which for so few
// outputs take longer than reading the weights.
#include "arguments.cuh"
#include "quants.cuh"
#include "matmul.cuh"
#include "norm.cuh"
#include "quantize_rows.cuh"
#include "few_rows.cuh"

// y = sum + the bias of its matrix
struct Projected {
  Stacked w;
  const float *q_bias, *k_bias, *v_bias;
  float* y;
  int n_out;
  struct Loaded {
    float bias;
  };
  __device__ __forceinline__ const float* bias_of(int tile) const {
    const float* bias = tile >= w.third ? v_bias : tile >= w.second ? k_bias : q_bias;
    return bias ? bias + w.within(tile) * 16 : nullptr;
  }
  __device__ __forceinline__ void ahead(int tile) const {
    if (bias_of(tile)) prefetch(bias_of(tile));
  }
  __device__ __forceinline__ Loaded load(const Rows&, int, int tile, int out) const {
    return {bias_of(tile) ? bias_of(tile)[out] : 0.0f};
  }
  __device__ __forceinline__ void put(const Rows& rows, int number, int tile, int out, const float (&sum)[1],
                                      const Loaded& loaded) const {
    y[place_of(rows, number, tile * 16 + out, n_out)] = bias_of(tile) ? __fadd_rn(sum[0], loaded.bias) : sum[0];
  }
};

#define QKV(name, THREADS, Q)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                         \
      name(Matrix wq, Matrix wk, Matrix wv, Activations x, const float* q_bias, const float* k_bias,               \
           const float* v_bias, float* y, int n_q, int n_k, int n_out, int n_in, int n_rows, int shift,            \
           int chunk, float eps) {                                                                                 \
    Stacked w = {{planes_of(wq, n_in), planes_of(wk, n_in), planes_of(wv, n_in)}, n_q / 16, (n_q + n_k) / 16};     \
    rows8<Q>(w, x, Groups{}, n_rows, n_out, n_in, {shift, chunk, eps},                                          \
             Projected{w, q_bias, k_bias, v_bias, y, n_out});                                                      \
  }
QKV(qkv_q4_0, 320, Q4_0)
QKV(qkv_q4_1, 320, Q4_1)
QKV(qkv_q5_0, 320, Q5_0)
QKV(qkv_q5_1, 320, Q5_1)
QKV(qkv_q8_0, 320, Q8_0)
QKV(qkv_q4_k, 320, Q4_K)
QKV(qkv_q5_k, 320, Q5_K)
QKV(qkv_q6_k, 320, Q6_K)
QKV(qkv_mxfp4, 320, MXFP4)
QKV(qkv_f16, 320, F16)
