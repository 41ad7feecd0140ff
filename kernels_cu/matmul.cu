// Products with quantised weights: y[t, o] = Σ_k W[o, k] x[t, k] + bias[o] + residual[t, o], for any number of rows, with
// one order of additions.
//
// Array code: refengine.ops.linear.linear and linear_experts. Activations come from `quantize_rows_f16` (quantize_rows.cu):
// halves in the order of layout.activation_order, each row multiplied by a power of two 1 / x_scale[t]; x_sums[t, b] is
// 1/32 of the sum of block b's 32 halves, as two halves whose sum it is. Weights are planes as in layout.py. y (n_rows,
// n_out) float32; bias (n_out,) and residual (n_rows, n_out) float32 or null.
//
// Order of additions, the same for every n_rows, every grouping of rows, and both kernels:
//   block of 32 columns   two mma.sync.m16n8k16, columns 0-15 then 16-31
//   segment of 256        SCALED types (codes · small scales are exact halves): the mma of all blocks, one after another,
//                         into one sum from zero. Others: p = mma, mma from zero (Q6_K: two of one mma each), then s =
//                         fma(factor, p, s), blocks ascending. WHOLE: then s · d. With minimums: s = fma(32 dmin, one mma
//                         of the eight minimums with both halves of the eight block sums, s)
//   row                   y = (((s0 + s1) + s2) + …) · x_scale, then + bias, then + residual
// The integers of a block are exact in half precision, so only the activations are rounded.
//
// rows8_*:  up to 8 rows per block of threads, for few rows, where reading the weights takes all of the time. Grid: x any
//           number, block b computes tiles b, b + grid, … of 16 outputs; y groups of 8 rows. Each warp takes every
//           n_warps-th segment and loads the next weights before it multiplies; one warp adds the segments of a tile in
//           order. Dynamic shared memory: 1024 bytes per segment. May be launched to overlap with the previous kernel.
//           Precondition: y has fewer than 2^32 elements.
// rows64_*: 64 rows per warp. Grid: x groups of n_warps tiles, y groups of 64 rows; a warp takes all segments of its tile.
// Weights are read once for 8 (64) rows.
//
// Experts: with groups (from group_experts, moe.cu), group blockIdx.y is (expert, first slot, number of slots). Slot s
// reads row x_rows[s] of the activations and writes row y_rows[s] of y; bias is (n_expert, n_out). Without groups, slots
// are the rows in order.
#include "arguments.cuh"
#include "quants.cuh"
#include "matmul.cuh"

template <class Q>
__device__ __forceinline__ void one_of_rows8(const Planes& w, const Activations& x, const Groups& groups, int n_rows,
                                             const float* bias, const float* residual, float* y, int n_out) {
  rows8<Q>(SideBySide<1>{{w}}, x, groups, n_rows, n_out, [&](const Rows& rows, int tile, const MmaD (&total)[1]) {
    store<1>(x, rows, tile, total, bias, residual, y, n_out);
  });
}

// Threads per block and blocks per multiprocessor; they limit the registers (cuda/kernels/matmul.py launches as many).
#define MATMUL(name, kernel, THREADS, BLOCKS, Q)                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
      name(Matrix w, Activations x, Groups groups, const float* bias, const float* residual, float* y, int n_out,  \
           int n_in, int n_rows) {                                                                                 \
    kernel<Q>(planes_of(w, n_in), x, groups, n_rows, bias, residual, y, n_out);                                    \
  }
MATMUL(rows8_q4_0, one_of_rows8, 256, 2, Q4_0)
MATMUL(rows8_q4_1, one_of_rows8, 256, 2, Q4_1)
MATMUL(rows8_q5_0, one_of_rows8, 256, 2, Q5_0)
MATMUL(rows8_q5_1, one_of_rows8, 256, 2, Q5_1)
MATMUL(rows8_q8_0, one_of_rows8, 320, 2, Q8_0)
MATMUL(rows8_q4_k, one_of_rows8, 320, 2, Q4_K)
MATMUL(rows8_q5_k, one_of_rows8, 256, 2, Q5_K)
MATMUL(rows8_q6_k, one_of_rows8, 256, 2, Q6_K)
MATMUL(rows8_mxfp4, one_of_rows8, 320, 2, MXFP4)
MATMUL(rows8_f16, one_of_rows8, 256, 2, F16)
MATMUL(rows64_q4_0, rows64, 128, 1, Q4_0)
MATMUL(rows64_q4_1, rows64, 128, 1, Q4_1)
MATMUL(rows64_q5_0, rows64, 128, 1, Q5_0)
MATMUL(rows64_q5_1, rows64, 128, 1, Q5_1)
MATMUL(rows64_q8_0, rows64, 128, 1, Q8_0)
MATMUL(rows64_q4_k, rows64, 128, 1, Q4_K)
MATMUL(rows64_q5_k, rows64, 128, 1, Q5_K)
MATMUL(rows64_q6_k, rows64, 128, 1, Q6_K)
MATMUL(rows64_mxfp4, rows64, 128, 1, MXFP4)
MATMUL(rows64_f16, rows64, 128, 1, F16)
