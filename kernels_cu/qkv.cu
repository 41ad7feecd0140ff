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

#define QKV(name, THREADS, Q)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                         \
      name(Matrix wq, Matrix wk, Matrix wv, Activations x, const float* q_bias, const float* k_bias,               \
           const float* v_bias, float* y, int n_q, int n_k, int n_out, int n_in, int n_rows, int capacity,         \
           int stages, int chunk, float eps) {                                                                     \
    Stacked w = {{planes_of(wq, n_in), planes_of(wk, n_in), planes_of(wv, n_in)}, n_q / 16, (n_q + n_k) / 16};     \
    auto bias_of = [&](int tile) { return tile >= w.third ? v_bias : tile >= w.second ? k_bias : q_bias; };        \
    auto ahead = [&](int, int tile) {                                                                              \
      if (bias_of(tile)) prefetch(bias_of(tile) + w.within(tile) * 16);                                            \
    };                                                                                                             \
    auto finish = [&](const Rows& rows, int number, int tile, int out, float scale, const float(&sum)[1]) {        \
      float value = __fmul_rn(sum[0], scale);                                                                      \
      if (bias_of(tile)) value = __fadd_rn(value, bias_of(tile)[w.within(tile) * 16 + out]);                       \
      y[rows.of_y(number) * static_cast<long long>(n_out) + tile * 16 + out] = value;                              \
    };                                                                                                             \
    rows8<Q>(w, x, Groups{}, n_rows, n_out, n_in, {capacity, stages, chunk, eps}, ahead, finish);                  \
  }
QKV(qkv_q4_0, 256, Q4_0)
QKV(qkv_q4_1, 256, Q4_1)
QKV(qkv_q5_0, 256, Q5_0)
QKV(qkv_q5_1, 256, Q5_1)
QKV(qkv_q8_0, 256, Q8_0)
QKV(qkv_q4_k, 384, Q4_K)
QKV(qkv_q5_k, 256, Q5_K)
QKV(qkv_q6_k, 256, Q6_K)
QKV(qkv_mxfp4, 384, MXFP4)
QKV(qkv_f16, 256, F16)
