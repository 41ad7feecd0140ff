// Sums over a row in the order of a block of 256 threads, for a block of any number of warps: number t adds elements t,
// t + 256, …, then 32 numbers each are added by warp_sum, then these eight parts one after another.
constexpr int NORM_THREADS = 256, PARTS = NORM_THREADS / 32;

// Part `part` of a sum over row (n,), the same in all lanes of the warp that computes it. add(sum so far, element): the sum
// with the element.
template <class Add>
__device__ __forceinline__ float part_of_sum(const float* row, int n, int part, const Add& add) {
  constexpr int TOGETHER = 8;  // loads that overlap
  float sum = 0.0f;
  for (int first = part * 32 + threadIdx.x % 32; first < n; first += TOGETHER * NORM_THREADS) {
    float values[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++)
      if (first + k * NORM_THREADS < n) values[k] = row[first + k * NORM_THREADS];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++)
      if (first + k * NORM_THREADS < n) sum = add(sum, values[k]);
  }
  return warp_sum(sum);
}
__device__ __forceinline__ float sum_of_parts(const float* parts) {
  float total = 0.0f;
  for (int part = 0; part < PARTS; part++) total += parts[part];
  return total;
}

// Element x[i] becomes (x[i] - mean) · scale · weight[i] + bias[i]. An RMS norm has neither mean nor bias; its halves are those of
// x[i] · weight[i], and its scale becomes part of the row's.
struct Moments {
  float mean, scale;
};
__device__ __forceinline__ float normed(float x, const Moments& of, float weight) {
  return (x - of.mean) * of.scale * weight;
}

__device__ __forceinline__ float rms_scale(const float* parts, float n, float eps) {
  return 1.0f / sqrtf(sum_of_parts(parts) / n + eps);
}

// The sum over a row by a block of 256 threads. scratch (8,) may be reused after the next barrier.
template <class Add>
__device__ __forceinline__ float row_sum(const float* row, int n, float* scratch, const Add& add) {
  float sum = part_of_sum(row, n, threadIdx.x / 32, add);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  return sum_of_parts(scratch);
}

// scratch: (16,)
__device__ __forceinline__ Moments moments(const float* row, bool centred, int n, float eps, float* scratch) {
  float mean = 0.0f;
  if (centred)
    mean = row_sum(row, n, scratch + 8, [](float sum, float x) { return sum + x; }) / static_cast<float>(n);
  float squares = row_sum(row, n, scratch, [&](float sum, float x) { return __fmaf_rn(x - mean, x - mean, sum); });
  return {mean, 1.0f / sqrtf(squares / static_cast<float>(n) + eps)};
}
