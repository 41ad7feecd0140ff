// The factor by which a norm multiplies a row, computed by a block of threads of any number of warps.
//
// The order of additions is that of 256 threads: number t adds elements t, t + 256, …, then 32 numbers each are added by
// warp_sum, then these eight sums in order. If the block has fewer or more warps, some compute several of the eight, or none.
constexpr int NORM_THREADS = 256;

// Σ over i < n of what add(sum so far, i, value(i)) adds. value is called for eight elements before the first is added, so
// that their loads overlap. scratch has eight floats; it may be reused after the next barrier.
template <class Value, class Add>
__device__ __forceinline__ float row_sum(int n, float* scratch, const Value& value, const Add& add) {
  constexpr int WARPS = NORM_THREADS / 32, TOGETHER = 8;
  for (int warp = threadIdx.x / 32; warp < WARPS; warp += blockDim.x / 32) {
    float sum = 0.0f;
    for (int first = warp * 32 + threadIdx.x % 32; first < n; first += TOGETHER * NORM_THREADS) {
      float values[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
        if (first + k * NORM_THREADS < n) values[k] = value(first + k * NORM_THREADS);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
        if (first + k * NORM_THREADS < n) sum = add(sum, first + k * NORM_THREADS, values[k]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) scratch[warp] = sum;
  }
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < WARPS; warp++) total += scratch[warp];
  return total;
}

// Element x[i] becomes (x[i] - mean) · scale · weight[i] + bias[i]. An RMS norm has neither mean nor bias.
struct Moments {
  float mean, scale;
};

// values: null, or (n,) to which the row is copied; element i is written by the thread that adds it up. scratch: 8 floats for
// an RMS norm, 16 for a layer norm.
__device__ __forceinline__ Moments rms_moments(const float* row, float* values, int n, float eps, float* scratch) {
  float squares = row_sum(n, scratch, [&](int i) { return row[i]; }, [&](float sum, int i, float x) {
    if (values) values[i] = x;
    return __fmaf_rn(x, x, sum);
  });
  return {0.0f, 1.0f / sqrtf(squares / static_cast<float>(n) + eps)};
}
__device__ __forceinline__ Moments layer_moments(const float* row, float* values, int n, float eps, float* scratch) {
  float mean = row_sum(n, scratch, [&](int i) { return row[i]; }, [&](float sum, int i, float x) {
    if (values) values[i] = x;
    return sum + x;
  }) / static_cast<float>(n);
  const float* kept = values ? values : row;
  float squares = row_sum(n, scratch + 8, [&](int i) { return kept[i] - mean; }, [&](float sum, int, float centred) {
    return __fmaf_rn(centred, centred, sum);
  });
  return {mean, 1.0f / sqrtf(squares / static_cast<float>(n) + eps)};
}

__device__ __forceinline__ float normed(float x, Moments of, const float* weight, const float* bias, int i) {
  return bias ? (x - of.mean) * of.scale * weight[i] + bias[i] : x * of.scale * weight[i];
}
