// Mixture of experts: chooses experts, computes their shares, groups their rows, and sums up their outputs.
//
//   top_experts_f32    chosen[t, k] = index of the k-th highest of scores[t], ties to the lower.   See ops.moe.top_experts
//   row_soft_max_f32   y[t] = e^(x - max) / Σ e^(x - max) over n ≤ 32 numbers.                    See ops.moe.row_soft_max
//   sum_experts_f32    y[t] = ((x[t, 0] + x[t, 1]) + x[t, 2]) + …, the router's rank order.       See ops.moe.sum_experts
//   group_experts      from chosen (n_pairs,), pairs of token and rank: groups of up to `size` pairs of one expert, in
//                      ascending order of pairs, as (expert, first slot, number of slots) for the products of matmul.cu;
//                      for slot s, y_rows[s] is its pair and x_rows[s] its pair / share. Unused groups have no slots.
//   route_f32          top_experts_f32 and row_soft_max_f32 of the chosen scores, for rows whose position (n_rows,) int32
//                      is not below zero; for other rows chosen is -1, which group_experts ignores
//   combine_f32        y[t] = sum_experts_f32 of x[t, k] · shares[t, k], then + residual[t]
//
// scores (n_rows, n_expert) float32; chosen (n_rows, n_used) int32. Grids: x rows (top_experts, row_soft_max, route: one
// warp each), x groups of 256 elements (sum_experts; combine: y rows), x experts (group_experts: one to 32 warps each, and
// 4 · n_expert bytes of dynamic shared memory).
// Sums run over ranks in ascending order, in one thread. NaN ranks above every number, so that it is not lost.
// group_experts reads all of chosen twice in every block, the second time from cache; each block counts the pairs of all
// experts, to know where the slots and groups of its own one begin. The counts are integers: their order does not matter.
// route, combine and group_experts may be launched to overlap with the previous kernel. router.cu does the work of route
// and group_experts for few rows.
#include "moe.cuh"
#include "norm.cuh"

// Finds the n_used best of a row with one warp; calls take(k, index, score) in every lane, k ascending.
template <class Take>
__device__ __forceinline__ void best_experts(const float* row, int n_expert, int n_used, const Take& take) {
  int lane = threadIdx.x % 32;
  // Each round takes the best of those that rank after the last one taken.
  float last = 0.0f;
  int last_index = -1;
  for (int k = 0; k < n_used; k++) {
    float best = 0.0f;
    int index = n_expert;
    for (int i = lane; i < n_expert; i += 32) {
      bool remains = last_index < 0 || before(last, last_index, row[i], i);
      if (remains && (index == n_expert || before(row[i], i, best, index))) best = row[i], index = i;
    }
    for (int offset = 16; offset; offset /= 2) {
      float other = __shfl_xor_sync(ALL_LANES, best, offset);
      int other_index = __shfl_xor_sync(ALL_LANES, index, offset);
      if (other_index < n_expert && (index == n_expert || before(other, other_index, best, index)))
        best = other, index = other_index;
    }
    take(k, index, best);
    last = best, last_index = index;
  }
}

extern "C" __global__ void top_experts_f32(const float* scores, int* chosen, int n_expert, int n_used) {
  best_experts(scores + static_cast<long long>(blockIdx.x) * n_expert, n_expert, n_used, [&](int k, int index, float) {
    if (threadIdx.x == 0) chosen[static_cast<long long>(blockIdx.x) * n_used + k] = index;
  });
}

extern "C" __global__ void row_soft_max_f32(const float* x, float* y, int n) {
  if (threadIdx.x < n) y[static_cast<long long>(blockIdx.x) * n + threadIdx.x] =
      soft_max(x + static_cast<long long>(blockIdx.x) * n, n, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(32)
    route_f32(const float* scores, const int* positions, int* chosen, float* shares, int n_expert, int n_used) {
  __shared__ float taken[32];
  let_next_begin();
  wait_for_previous();
  long long row = blockIdx.x;
  bool exists = positions[row] >= 0;
  best_experts(scores + row * n_expert, n_expert, n_used, [&](int k, int index, float score) {
    if (threadIdx.x == 0) chosen[row * n_used + k] = exists ? index : -1, taken[k] = score;
  });
  __syncwarp(ALL_LANES);
  if (threadIdx.x < n_used) shares[row * n_used + threadIdx.x] = soft_max(taken, n_used, threadIdx.x);
}

extern "C" __global__ void combine_f32(const float* x, const float* shares, const float* residual, float* y, float* squares,
                                       int n_used, int n) {
  let_next_begin();
  wait_for_previous();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  long long at = static_cast<long long>(blockIdx.y) * n + i;
  float total = 0.0f;
  if (i < n) {
    const float *from = x + static_cast<long long>(blockIdx.y) * n_used * n + i, *share = shares + blockIdx.y * n_used;
    total = __fmul_rn(from[0], share[0]);
    for (int rank = 1; rank < n_used; rank++)
      total = __fadd_rn(total, __fmul_rn(from[static_cast<long long>(rank) * n], share[rank]));
    y[at] = total = __fadd_rn(total, residual[at]);
  }
  if (squares) put_squares(squares, at, total, i < n && i % GROUP == 0, ALL_LANES);
}

extern "C" __global__ void sum_experts_f32(const float* x, float* y, int n_used, int n, long long n_elements) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_elements) return;
  const float* from = x + i / n * n_used * n + i % n;
  float total = from[0];
  for (int rank = 1; rank < n_used; rank++) total += from[static_cast<long long>(rank) * n];
  y[i] = total;
}

// Calls take(pair, expert) in every lane of a warp for pairs first … end - 1, 32 at a time in ascending order. A lane
// without a pair gets expert -1. The loads of eight times 32 pairs are in flight together.
template <class Take>
__device__ __forceinline__ void for_pairs(const int* chosen, int first, int end, const Take& take) {
  constexpr int AHEAD = 8;
  int lane = threadIdx.x % 32;
  for (int start = first; start < end; start += 32 * AHEAD) {
    int experts[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int pair = start + 32 * i + lane;
      experts[i] = pair < end ? chosen[pair] : -1;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) take(start + 32 * i + lane, experts[i]);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
    group_experts(const int* chosen, int* groups, int* x_rows, int* y_rows, int n_pairs, int n_expert, int n_groups,
                  int size, int share) {
  DYNAMIC_SHARED(int, count);    // (n_expert,), the pairs of each expert
  __shared__ int of_warps[32];  // the pairs of the block's expert in each warp's part
  let_next_begin();
  wait_for_previous();
  int own = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  int part = (n_pairs + threads - 1) / threads * 32;
  int begin = min(n_pairs, warp * part), end = min(n_pairs, begin + part);
  for (int expert = threadIdx.x; expert < n_expert; expert += threads) count[expert] = 0;
  __syncthreads();
  int of_warp = 0;
  for_pairs(chosen, begin, end, [&](int, int expert) {
    of_warp += __popc(__ballot_sync(ALL_LANES, expert == own));
    if (expert >= 0) atomicAdd(&count[expert], 1);
  });
  if (lane == 0) of_warps[warp] = of_warp;
  __syncthreads();
  // Every warp: the slots and groups of the experts before the block's own, and all groups.
  int slot = 0, group = 0, n_filled = 0;
  for (int expert = lane; expert < n_expert; expert += 32) {
    int of_expert = (count[expert] + size - 1) / size;
    n_filled += of_expert;
    if (expert < own) slot += count[expert], group += of_expert;
  }
  slot = __reduce_add_sync(ALL_LANES, slot), group = __reduce_add_sync(ALL_LANES, group);
  n_filled = __reduce_add_sync(ALL_LANES, n_filled);
  for (int i = threadIdx.x; i * size < count[own]; i += threads) {
    int* to = groups + 3 * (group + i);
    to[0] = own, to[1] = slot + i * size, to[2] = min(size, count[own] - i * size);
  }
  if (own == 0)
    for (int i = 3 * n_filled + threadIdx.x; i < 3 * n_groups; i += threads) groups[i] = 0;
  slot += __reduce_add_sync(ALL_LANES, lane < warp ? of_warps[lane] : 0);
  for_pairs(chosen, begin, end, [&](int pair, int expert) {
    unsigned same = __ballot_sync(ALL_LANES, expert == own);
    int at = slot + __popc(same & ((1u << lane) - 1));
    if (expert == own) y_rows[at] = pair, x_rows[at] = pair / share;
    slot += __popc(same);
  });
}
