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
// warp each), x groups of 256 elements (sum_experts; combine: y rows), one block of 256 threads (group_experts;
// 8 · n_expert bytes of dynamic shared memory).
// Sums run over ranks in ascending order, in one thread. NaN ranks above every number, so that it is not lost.
// route, combine and group_experts may be launched to overlap with the previous kernel.

// Whether (a, i) ranks before (b, j).
__device__ __forceinline__ bool before(float a, int i, float b, int j) {
  bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  return a > b || (!(a < b) && i < j);
}

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

// e^(x_i - max) / total for number i of n; sums in ascending order.
__device__ __forceinline__ float soft_max(const float* x, int n, int i) {
  float top = x[0], total = 0.0f;
  for (int j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
  for (int j = 0; j < n; j++) total += expf(x[j] - top);
  return expf(x[i] - top) / total;
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

extern "C" __global__ void combine_f32(const float* x, const float* shares, const float* residual, float* y, int n_used,
                                       int n) {
  let_next_begin();
  wait_for_previous();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float *from = x + static_cast<long long>(blockIdx.y) * n_used * n + i, *share = shares + blockIdx.y * n_used;
  float total = __fmul_rn(from[0], share[0]);
  for (int rank = 1; rank < n_used; rank++)
    total = __fadd_rn(total, __fmul_rn(from[static_cast<long long>(rank) * n], share[rank]));
  long long at = static_cast<long long>(blockIdx.y) * n + i;
  y[at] = __fadd_rn(total, residual[at]);
}

extern "C" __global__ void sum_experts_f32(const float* x, float* y, int n_used, int n, long long n_elements) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n_elements) return;
  const float* from = x + i / n * n_used * n + i % n;
  float total = from[0];
  for (int rank = 1; rank < n_used; rank++) total += from[static_cast<long long>(rank) * n];
  y[i] = total;
}

extern "C" __global__ void __launch_bounds__(256)
    group_experts(const int* chosen, int* groups, int* x_rows, int* y_rows, int n_pairs, int n_expert, int n_groups,
                  int size, int share) {
  DYNAMIC_SHARED(int, count);  // (n_expert,), and after it
  let_next_begin();
  wait_for_previous();
  int* first = count + n_expert;  // (n_expert,), each expert's first slot
  for (int expert = threadIdx.x; expert < n_expert; expert += blockDim.x) {
    int n = 0;
    for (int pair = 0; pair < n_pairs; pair++) n += chosen[pair] == expert;
    count[expert] = n;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int slot = 0, group = 0;
    for (int expert = 0; expert < n_expert; expert++) {
      first[expert] = slot;
      for (int done = 0; done < count[expert]; done += size, group++) {
        groups[3 * group] = expert;
        groups[3 * group + 1] = slot + done;
        groups[3 * group + 2] = min(size, count[expert] - done);
      }
      slot += count[expert];
    }
    for (; group < n_groups; group++) groups[3 * group] = groups[3 * group + 1] = groups[3 * group + 2] = 0;
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < n_expert; expert += blockDim.x) {
    int slot = first[expert];
    for (int pair = 0; pair < n_pairs; pair++)
      if (chosen[pair] == expert) {
        y_rows[slot] = pair;
        x_rows[slot++] = pair / share;
      }
  }
}
