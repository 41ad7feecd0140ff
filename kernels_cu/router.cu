// The router of a mixture of experts in one launch, for up to 128 pairs of row and rank.
//
// From rows x (n_rows, n_in) float32, for W (n_expert, n_in) float32 or bfloat16, norm (n_in,) and bias (n_expert,)
// float32 or null, positions (n_rows,) int32:
//
//   scores (n_rows, n_expert)  W · rms_norm(x) + bias; without norm, of x itself    rms_norm_f32, rows8_* of matmul_f32.cu
//   shares (n_rows, n_used)    the softmax of the n_used best scores                route_f32 of moe.cu
//   groups, x_rows, y_rows     the pairs by expert                                  group_experts of moe.cu, share n_used
//
// The same bits as the kernels named, one after another; their headers have the orders of additions. Rows whose position
// is below zero choose no experts.
// Grid: x groups of `each` ≤ 8 experts, y rows; block: 256 threads. A block begins to copy its experts' weights before it
// waits for the previous kernel, norms its row, and computes one score with each warp. The last block of the grid that
// arrives at the counter does the rest, and sets the counter to zero, as it must be before.
// Dynamic shared memory, the larger of: each · n_in weights, 2 · n_in and 2 · n_groups(n_in) floats; n_rows · n_expert floats.
// Rows of W are
// multiples of 16 bytes, and n_in is a multiple of 4. Reads W once for each row; may overlap with the previous kernel.
#include "floats.cuh"
#include "moe.cuh"
#include "norm.cuh"

constexpr int THREADS = NORM_THREADS, MOST_PAIRS = 128, WARPS = THREADS / 32;

struct Routing {
  int arrived;
  int exists[MOST_PAIRS];  // whether there is a sequence, for each row
  int expert[MOST_PAIRS];  // of each pair; -1 for rows without a sequence
  float score[MOST_PAIRS];
  int begins[MOST_PAIRS];  // whether a group begins with the pair
};

__device__ __forceinline__ void copy_all(void* shared, const void* global, int n_bytes) {
#pragma unroll 1  // a copy does not wait for the one before it, and short code is loaded sooner
  for (int at = 16 * threadIdx.x; at < n_bytes; at += 16 * THREADS)
    copy16(static_cast<unsigned char*>(shared) + at, static_cast<const unsigned char*>(global) + at);
}

// The scores of one row for the block's experts. Returns whether the block is the last of the grid to get here.
template <class W>
__device__ __forceinline__ bool last_to_score(Routing& space, unsigned char* shared, const W* w, const float* x,
                                              const float* norm, const float* bias, float* scores, int* counter, int n_in,
                                              int n_expert, int each, float eps) {
  let_next_begin();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * each, own = min(each, n_expert - first);
  int n_bytes = n_in * static_cast<int>(sizeof(float));
  float *row = reinterpret_cast<float*>(shared), *factors = row + n_in, *groups = factors + n_in;
  W* weights = reinterpret_cast<W*>(groups + (n_groups(n_in) + 1) / 2 * 4);  // a multiple of 16 bytes further
  copy_all(weights, w + static_cast<long long>(first) * n_in, own * n_in * static_cast<int>(sizeof(W)));
  if (norm) copy_all(factors, norm, n_bytes);
  float added = bias && warp < own ? bias[first + warp] : 0.0f;
  wait_for_previous();
  copy_all(row, x + static_cast<long long>(blockIdx.y) * n_in, n_bytes);
  end_of_copies();
  wait_for_copies<0>();
  __syncthreads();
  if (norm) {
    float scale = moments(row, false, n_in, eps, groups).scale;
    __syncthreads();
    for (int i = threadIdx.x; i < n_in; i += THREADS) row[i] = row[i] * scale * factors[i];
    __syncthreads();
  }
  if (warp < own) {
    const W* of_expert = weights + warp * n_in;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = lane; k < n_in; k += 32) sum = __fmaf_rn(value_of(of_expert[k]), row[k], sum);
    sum = warp_sum(sum);
    if (lane == 0) scores[blockIdx.y * n_expert + first + warp] = bias ? __fadd_rn(sum, added) : sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) space.arrived = arrive(counter);
  __syncthreads();
  return space.arrived + 1 == static_cast<int>(gridDim.x * gridDim.y);
}

// The best experts of all rows, their shares, and the groups, by one block.
__device__ __forceinline__ void choose(Routing& space, float* all, const float* scores, const int* positions, int* counter,
                                       float* shares, int* groups, int* x_rows, int* y_rows, int n_expert, int n_used,
                                       int n_groups, int size) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_rows = gridDim.y, n_pairs = n_rows * n_used;
  if (threadIdx.x == 0) *counter = 0;
  if (threadIdx.x < n_rows) space.exists[threadIdx.x] = positions[threadIdx.x] >= 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < n_rows * n_expert; i += THREADS) all[i] = scores[i];
  __syncthreads();
  // An expert's rank is the number of those before it. The first n_used are the pairs of the row.
  constexpr int N = 4;  // experts at a time
  for (int row = 0; row < n_rows; row++)
    for (int first = N * warp; first < n_expert; first += N * WARPS) {
      const float* of_row = all + row * n_expert;
      int ranks[N] = {};
      for (int other = lane; other - lane < n_expert; other += 32) {
        float score = other < n_expert ? of_row[other] : 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
          int expert = min(first + i, n_expert - 1);
          bool ahead = other < n_expert && before(score, other, of_row[expert], expert);
          ranks[i] += __popc(__ballot_sync(ALL_LANES, ahead));
        }
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        int expert = first + i, pair = row * n_used + ranks[i];
        if (lane || expert >= n_expert || ranks[i] >= n_used) continue;
        space.expert[pair] = space.exists[row] ? expert : -1;
        space.score[pair] = of_row[expert];
      }
    }
  __syncthreads();
  // A thread for each pair finds its slot; the other half of the block computes the shares.
  int pair = threadIdx.x, expert = pair < n_pairs ? space.expert[pair] : -1, slot = 0, ahead = 0, of_expert = 0;
  if (expert >= 0)
#pragma unroll 4
    for (int other = 0; other < n_pairs; other++) {
      int its = space.expert[other];
      slot += its >= 0 && (its < expert || (its == expert && other < pair));
      ahead += its == expert && other < pair, of_expert += its == expert;
    }
  bool begins = expert >= 0 && ahead % size == 0;
  if (pair < n_pairs) space.begins[pair] = begins;
  if (expert >= 0) y_rows[slot] = pair, x_rows[slot] = pair / n_used;
  int later = threadIdx.x - MOST_PAIRS;
  if (later >= 0 && later < n_pairs)
    shares[later] = soft_max(space.score + later / n_used * n_used, n_used, later % n_used);
  __syncthreads();
  int group = 0, n_filled = 0;
#pragma unroll 4
  for (int other = 0; other < n_pairs; other++) {
    int its = space.expert[other];
    n_filled += space.begins[other];
    group += space.begins[other] && (its < expert || (its == expert && other < pair));
  }
  if (begins) groups[3 * group] = expert, groups[3 * group + 1] = slot, groups[3 * group + 2] = min(size, of_expert - ahead);
#pragma unroll 1
  for (int i = 3 * n_filled + threadIdx.x; i < 3 * n_groups; i += THREADS) groups[i] = 0;
}

extern "C" __global__ void __launch_bounds__(256)
    router_f32(const float* w, const float* x, const float* norm, const float* bias, const int* positions, float* scores,
               int* counter, float* shares, int* groups, int* x_rows, int* y_rows, int n_in, int n_expert, int n_used,
               int n_groups, int size, int each, float eps) {
  DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Routing space;
  if (last_to_score(space, shared, w, x, norm, bias, scores, counter, n_in, n_expert, each, eps))
    choose(space, reinterpret_cast<float*>(shared), scores, positions, counter, shares, groups, x_rows, y_rows, n_expert,
           n_used, n_groups, size);
}

extern "C" __global__ void __launch_bounds__(256)
    router_bf16(const unsigned short* w, const float* x, const float* norm, const float* bias, const int* positions,
                float* scores, int* counter, float* shares, int* groups, int* x_rows, int* y_rows, int n_in, int n_expert,
                int n_used, int n_groups, int size, int each, float eps) {
  DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Routing space;
  if (last_to_score(space, shared, w, x, norm, bias, scores, counter, n_in, n_expert, each, eps))
    choose(space, reinterpret_cast<float*>(shared), scores, positions, counter, shares, groups, x_rows, y_rows, n_expert,
           n_used, n_groups, size);
}
