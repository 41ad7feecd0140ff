// Normalisation over rows. Twins: refengine.ops.norm.rms_norm and layer_norm.
//
//   rms_norm_f32    y = x · 1/√(mean(x²) + eps) · weight
//   layer_norm_f32  y = (x - mean) · 1/√(mean((x - mean)²) + eps) · weight + bias
//
// x, y (n_rows, n) float32; weight, bias (n,) float32. Grid: x rows; block: 256 threads, one row.
// Order of additions, of n alone: thread t adds elements t, t + 256, … in float32, then the block by block_sum. The row
// is read twice (layer_norm: three times), the later times from cache; 4 bytes an element out.
// A NaN or infinity in a row stays in that row.
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f32(const float* x, const float* weight, float* y, int n, float eps) {
  __shared__ float scratch[THREADS / 32];
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) squares = __fmaf_rn(row[i], row[i], squares);
  float mean = block_sum(squares, scratch) / static_cast<float>(n);
  float scale = 1.0f / sqrtf(mean + eps);
  for (int i = threadIdx.x; i < n; i += THREADS) out[i] = row[i] * scale * weight[i];
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f32(const float* x, const float* weight, const float* bias, float* y, int n, float eps) {
  __shared__ float scratch[THREADS / 32];
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) sum += row[i];
  float mean = block_sum(sum, scratch) / static_cast<float>(n);
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    float centred = row[i] - mean;
    squares = __fmaf_rn(centred, centred, squares);
  }
  float variance = block_sum(squares, scratch) / static_cast<float>(n);
  float scale = 1.0f / sqrtf(variance + eps);
  for (int i = threadIdx.x; i < n; i += THREADS) out[i] = (row[i] - mean) * scale * weight[i] + bias[i];
}
