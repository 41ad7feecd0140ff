// Norms and the sums over a row that they need.
//
// The order of additions, for any number of threads: 16 elements each, a group, are added by a butterfly; lane l of a warp
// adds groups l, l + 32, …, and the lanes are added by warp_sum. A kernel that makes rows can leave the groups' sums of squares
// to the kernels that read them: see put_squares.
constexpr int GROUP = 16;

// The sum of 16 values, one in each of 16 adjacent lanes. lanes: those that take part, whole groups.
__device__ __forceinline__ float group_sum(float x, unsigned lanes = ALL_LANES) {
#pragma unroll
  for (int offset = GROUP / 2; offset; offset /= 2) x += __shfl_xor_sync(lanes, x, offset);
  return x;
}
// Writes the sum of squares of a group, of which each lane has a column: element number `at` of all rows, whose width is a
// multiple of 16. squares: (n_rows, n / 16). writes: whether the lane has the first column of a group that exists. lanes: as in
// group_sum.
__device__ __forceinline__ void put_squares(float* squares, long long at, float value, bool writes, unsigned lanes) {
  float sum = group_sum(__fmul_rn(value, value), lanes);
  if (writes) squares[static_cast<uint64_t>(at) / GROUP] = sum;
}
// Calls take(element(i)) for i = first, first + step, … below n, in this order. The calls of element overlap, TOGETHER at a time, also
// the last ones; take gets what T{} is in place of elements that do not exist.
template <class T, int TOGETHER = 8, class Element, class Take>
__device__ __forceinline__ void for_each(int first, int n, int step, const Element& element, const Take& take) {
#pragma unroll 1
  for (; first < n; first += TOGETHER * step) {
    T elements[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
      elements[k] = T{};
      if (first + k * step < n) elements[k] = element(first + k * step);
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) take(elements[k]);
  }
}
// The first sums of groups that a lane adds up, so that other work can be done until they are loaded.
struct FirstGroups {
  static constexpr int N = 8;
  float sums[N];
};
__device__ __forceinline__ FirstGroups load_groups(const float* groups, int n) {
  FirstGroups first{};
#pragma unroll
  for (int k = 0; k < FirstGroups::N; k++) {
    int g = k * 32 + threadIdx.x % 32;
    if (g < n) first.sums[k] = groups[g];
  }
  return first;
}
// The sum of n groups by a warp, in all its lanes. Adding zero changes no sum of squares.
__device__ __forceinline__ float sum_of_groups(const FirstGroups& first, const float* groups, int n) {
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < FirstGroups::N; k++) total += first.sums[k];
  for_each<float>(FirstGroups::N * 32 + threadIdx.x % 32, n, 32, [&](int g) { return groups[g]; }, [&](float sum) { total += sum; });
  return warp_sum(total);
}
// The sum over a row of n ≤ 32 J elements by a warp, in all its lanes. element(j): number 32 j + lane.
template <int J, class Element>
__device__ __forceinline__ float sum_by_warp(int n, const Element& element) {
  int lane = threadIdx.x % 32;
  float mine = 0.0f;  // of group `lane`
#pragma unroll
  for (int j = 0; j < J; j++) {
    float sum = __shfl_sync(ALL_LANES, group_sum(j * 32 + lane < n ? element(j) : 0.0f), lane % 2 * GROUP);
    if (lane / 2 == j) mine = sum;
  }
  return warp_sum(mine);
}

constexpr int NORM_THREADS = 256;
__device__ __forceinline__ int n_groups(int n) { return (n + GROUP - 1) / GROUP; }

// Element x[i] becomes (x[i] - mean) · scale · weight[i] + bias[i]. An RMS norm has neither mean nor bias.
struct Moments {
  float mean, scale;
};
__device__ __forceinline__ float normed(float x, const Moments& of, float weight) {
  return (x - of.mean) * of.scale * weight;
}
__device__ __forceinline__ float norm_scale(float squares, float n, float eps) { return 1.0f / sqrtf(squares / n + eps); }
// Eight elements after an RMS norm. factor: `norm_scale` of the row.
template <class EightColumns>
__device__ __forceinline__ EightColumns normed_columns(const EightColumns& columns, const EightColumns& weight, float factor) {
  EightColumns to;
#pragma unroll
  for (int i = 0; i < 8; i++) to.x[i] = normed(columns.x[i], {0.0f, factor}, weight.x[i]);
  return to;
}

// The sum over a row by a block of threads, in all of them. groups (n_groups(n),), in shared memory.
template <class Element>
__device__ __forceinline__ float row_sum(int n, float* groups, const Element& element) {
#pragma unroll 2
  for (int first = 0; first < n; first += blockDim.x) {
    int i = first + threadIdx.x;
    float sum = group_sum(i < n ? element(i) : 0.0f);
    if (i < n && i % GROUP == 0) groups[i / GROUP] = sum;
  }
  __syncthreads();
  return sum_of_groups(load_groups(groups, n_groups(n)), groups, n_groups(n));
}

// groups: (2 · n_groups(n),)
__device__ __forceinline__ Moments moments(const float* row, bool centred, int n, float eps, float* groups) {
  float mean = 0.0f;
  if (centred)
    mean = row_sum(n, groups + n_groups(n), [&](int i) { return row[i]; }) / static_cast<float>(n);
  float squares = row_sum(n, groups, [&](int i) { return __fmul_rn(row[i] - mean, row[i] - mean); });
  return {mean, norm_scale(squares, static_cast<float>(n), eps)};
}
