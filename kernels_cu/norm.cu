// Normalisation over rows. Array code: refengine.ops.norm.rms_norm and layer_norm.
//
//   rms_norm_f32    y = x · 1/√(mean(x²) + eps) · weight
//   layer_norm_f32  y = (x - mean) · 1/√(mean((x - mean)²) + eps) · weight + bias
//   rms_norm_f16    the same and, for products, the rows as halves: quantize_rows_f16 (quantize_rows.cu) of x · weight, whose
//                   scale is multiplied with 1/√(mean(x²) + eps), so that few_rows.cu can begin before that is known
//   layer_norm_f16  the same, then quantize_rows_f16, with the bits of the two kernels one after another
//
// x, y (n_rows, n) float32; weight, bias (n,) float32. Grid: x rows; block: 256 threads, one row.
// In the kernels *_f16, y may be null; out, scale and sums are as in quantize_rows.cu, or out is null. Dynamic shared
// memory: 4 n bytes. They may be launched to overlap with the previous kernel, and read a row once.
// The order of additions depends on n only: thread t adds elements t, t + 256, … in float32, then block_sum. The kernels
// *_f32 read the row twice (layer_norm: three times), after the first time from cache; they write 4 bytes per element.
// NaN or infinity in a row does not affect other rows.
#include "norm.cuh"
#include "quantize_rows.cuh"

__device__ __forceinline__ float normed(float x, Moments of, const float* weight, const float* bias, int i) {
  float value = normed(x, of, weight[i]);
  return bias ? value + bias[i] : value;
}

__device__ __forceinline__ void norm_f32(const float* x, const float* weight, const float* bias, float* y, int n,
                                         float eps, float* scratch) {
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  Moments of = moments(row, bias, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) out[i] = normed(row[i], of, weight, bias, i);
}

__device__ __forceinline__ void norm_f16(const float* x, const float* weight, const float* bias, float* y, f16* out,
                                         float* scale, unsigned* sums, int n, float eps, float* scratch, unsigned* tops) {
  DYNAMIC_SHARED(float, row);
  let_next_begin();
  wait_for_previous();
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) row[i] = x[static_cast<long long>(blockIdx.x) * n + i];
  // Until the next barrier but one, only thread i uses elements i, i + 256, ….
  Moments of = moments(row, bias, n, eps, scratch);
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) {
    float value = normed(row[i], of, weight, bias, i);
    if (y) y[static_cast<long long>(blockIdx.x) * n + i] = value;
    row[i] = bias ? value : row[i] * weight[i];
  }
  if (!out) return;
  __syncthreads();
  row_as_halves(row, blockIdx.x, out, scale, sums, n, tops, bias ? 1.0f : of.scale);
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f32(const float* x, const float* weight, float* y, int n, float eps) {
  __shared__ float scratch[16];
  norm_f32(x, weight, nullptr, y, n, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f32(const float* x, const float* weight, const float* bias, float* y, int n, float eps) {
  __shared__ float scratch[16];
  norm_f32(x, weight, bias, y, n, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f16(const float* x, const float* weight, float* y, f16* out, float* scale, unsigned* sums, int n, float eps) {
  __shared__ float scratch[16];
  __shared__ unsigned tops[PARTS];
  norm_f16(x, weight, nullptr, y, out, scale, sums, n, eps, scratch, tops);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f16(const float* x, const float* weight, const float* bias, float* y, f16* out, float* scale, unsigned* sums,
                   int n, float eps) {
  __shared__ float scratch[16];
  __shared__ unsigned tops[PARTS];
  norm_f16(x, weight, bias, y, out, scale, sums, n, eps, scratch, tops);
}
