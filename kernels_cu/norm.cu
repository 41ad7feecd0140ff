// Normalisation over rows. Twins: refengine.ops.norm.rms_norm and layer_norm.
//
//   rms_norm_f32    y = x · 1/√(mean(x²) + eps) · weight
//   layer_norm_f32  y = (x - mean) · 1/√(mean((x - mean)²) + eps) · weight + bias
//
// x, y (n_rows, n) float32; weight, bias (n,) float32. Grid: x rows; block: 256 threads, one row.
// Order of additions, of n alone: thread t adds elements t, t + 256, … in float32, then the block by block_sum. The row
// is read twice (layer_norm: three times), the later times from cache; 4 bytes an element out.
// A NaN or infinity in a row stays in that row.
#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f32(const float* x, const float* weight, float* y, int n, float eps) {
  __shared__ float scratch[THREADS / 32];
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  float scale = rms_scale(row, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += THREADS) out[i] = row[i] * scale * weight[i];
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f32(const float* x, const float* weight, const float* bias, float* y, int n, float eps) {
  __shared__ float scratch[THREADS / 32];
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  Moments of = layer_moments(row, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += THREADS) out[i] = (row[i] - of.mean) * of.scale * weight[i] + bias[i];
}
