// The factor by which a norm multiplies a row, computed by a block of 256 threads. scratch has a float for each warp.
constexpr int THREADS = 256;

__device__ __forceinline__ float rms_scale(const float* row, int n, float eps, float* scratch) {
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) squares = __fmaf_rn(row[i], row[i], squares);
  float mean = block_sum(squares, scratch) / static_cast<float>(n);
  return 1.0f / sqrtf(mean + eps);
}

struct Moments {
  float mean, scale;
};
__device__ __forceinline__ Moments layer_moments(const float* row, int n, float eps, float* scratch) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) sum += row[i];
  float mean = block_sum(sum, scratch) / static_cast<float>(n);
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    float centred = row[i] - mean;
    squares = __fmaf_rn(centred, centred, squares);
  }
  float variance = block_sum(squares, scratch) / static_cast<float>(n);
  return {mean, 1.0f / sqrtf(variance + eps)};
}
