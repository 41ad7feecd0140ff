// Products with quantised weights: y[t, o] = Σ_k W[o, k] x[t, k] + bias[o] + residual[t, o], for any number of rows, with
// one order of additions.
//
// Array code: refengine.ops.linear.linear and linear_experts. Activations come from `quantize_rows_f16` (quantize_rows.cu):
// halves in the order of layout.activation_order, each row multiplied by a power of two 1 / x_scale[t]; x_sums[t, b] is
// 1/32 of the sum of block b's 32 halves, as two halves whose sum it is. Weights are as in layout.py. y (n_rows,
// n_out) float32; bias (n_out,) and residual (n_rows, n_out) float32 or null.
//
// Order of additions, the same for every n_rows, every grouping of rows, and the kernels of few_rows.cu:
//   block of 32 columns   two mma.sync.m16n8k16, columns 0-15 then 16-31
//   segment of 256        SCALED types (codes · small scales are exact halves): the mma of columns 0-15 of all blocks, one
//                         after another, into one sum from zero; those of columns 16-31 likewise; s = the first sum + the
//                         second. Others: p = mma, mma from zero (Q6_K: two of one mma each), then s = fma(factor, p, s),
//                         blocks ascending. WHOLE: then s · d. With minimums, instead: s = fma(d, s, m), where m is
//                         32 dmin · one mma of the eight minimums with both halves of the eight block sums
//   row                   y = (((s0 + s1) + s2) + …) · x_scale, then + bias, then + residual
// The integers of a block are exact in half precision, so only the activations are rounded. For some types a power of
// two is in d instead (quants.cuh), which changes no rounding.
//
// rows64_*: 64 rows per warp. Grid: x groups of n_warps tiles, y groups of 64 rows; a warp takes all segments of its tile.
// Weights are read once for 64 rows. Up to 8 rows: few_rows.cu, with the same bits.
//
// Experts: with groups (from group_experts, moe.cu), group blockIdx.y is (expert, first slot, number of slots). Slot s
// reads row x_rows[s] of the activations and writes row y_rows[s] of y; bias is (n_expert, n_out). Without groups, slots
// are the rows in order.
#include "arguments.cuh"
#include "quants.cuh"
#include "matmul.cuh"

#define ROWS64(name, Q)                                                                                            \
  extern "C" __global__ void __launch_bounds__(128, 1)                                                             \
      name(const unsigned char* w, Activations x, Groups groups, const float* bias, const float* residual, float* y, int n_out,  \
           int n_in, int n_rows) {                                                                                 \
    rows64<Q>(Tiles{w, n_in / 32}, x, groups, n_rows, bias, residual, y, n_out, n_in);                              \
  }
ROWS64(rows64_q4_0, Q4_0)
ROWS64(rows64_q4_1, Q4_1)
ROWS64(rows64_q5_0, Q5_0)
ROWS64(rows64_q5_1, Q5_1)
ROWS64(rows64_q8_0, Q8_0)
ROWS64(rows64_q4_k, Q4_K)
ROWS64(rows64_q5_k, Q5_K)
ROWS64(rows64_q6_k, Q6_K)
ROWS64(rows64_mxfp4, MXFP4)
ROWS64(rows64_f16, F16)
