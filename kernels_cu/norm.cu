// Normalisation over rows. Array code: refengine.ops.norm.rms_norm and layer_norm.
//
//   rms_norm_f32    y = x · 1/√(mean(x²) + eps) · weight
//   layer_norm_f32  y = (x - mean) · 1/√(mean((x - mean)²) + eps) · weight + bias
//   rms_norm_rows, layer_norm_rows  the same, then quantize_rows (quantize_rows.cu), for rows that products read, with the bits
//                   of the two kernels one after another
//   row_squares     the sums of squares of every 16 columns of rows, n a multiple of 16, from any kernel that does not give them
//
// x, y (n_rows, n) float32; weight, bias (n,) float32. Grid: x rows, row_squares: y blocks of 256 columns; block: 256 threads,
// one row. Dynamic shared memory: the sums of 2 · n_groups(n) groups; in the kernels *_rows, n floats before them.
// In the kernels *_rows, y may be null; out, scale and sums are as in quantize_rows.cu, or out is null. They may be launched
// to overlap with the previous kernel, and read a row once.
// The order of additions depends on n only: see norm.cuh. The kernels *_f32 read the row twice (layer_norm: three times),
// after the first time from cache; they write 4 bytes per element. NaN or infinity in a row does not affect other rows.
#include "norm.cuh"
#include "quantize_rows.cuh"

__device__ __forceinline__ float normed(float x, Moments of, const float* weight, const float* bias, int i) {
  float value = normed(x, of, weight[i]);
  return bias ? value + bias[i] : value;
}

__device__ __forceinline__ void norm_f32(const float* x, const float* weight, const float* bias, float* y, int n, float eps) {
  DYNAMIC_SHARED(float, groups);
  const float* row = x + static_cast<long long>(blockIdx.x) * n;
  float* out = y + static_cast<long long>(blockIdx.x) * n;
  Moments of = moments(row, bias, n, eps, groups);
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) out[i] = normed(row[i], of, weight, bias, i);
}

__device__ __forceinline__ void norm_rows(const float* x, const float* weight, const float* bias, float* y, unsigned char* out,
                                          float* scale, int* sums, int n, int halves, float eps) {
  DYNAMIC_SHARED(float, row);
  let_next_begin();
  wait_for_previous();
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) row[i] = x[static_cast<long long>(blockIdx.x) * n + i];
  // Until the next barrier but one, only thread i uses elements i, i + 256, ….
  Moments of = moments(row, bias, n, eps, row + n);
  for (int i = threadIdx.x; i < n; i += NORM_THREADS) {
    float value = normed(row[i], of, weight, bias, i);
    if (y) y[static_cast<long long>(blockIdx.x) * n + i] = value;
    row[i] = value;
  }
  if (!out) return;
  __syncthreads();
  convert_row(row, blockIdx.x, halves, out, scale, sums, n, threadIdx.x / 32, NORM_THREADS / 32);
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_f32(const float* x, const float* weight, float* y, int n, float eps) {
  norm_f32(x, weight, nullptr, y, n, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_f32(const float* x, const float* weight, const float* bias, float* y, int n, float eps) {
  norm_f32(x, weight, bias, y, n, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    rms_norm_rows(const float* x, const float* weight, float* y, unsigned char* out, float* scale, int* sums, int n, int halves,
                  float eps) {
  norm_rows(x, weight, nullptr, y, out, scale, sums, n, halves, eps);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_rows(const float* x, const float* weight, const float* bias, float* y, unsigned char* out, float* scale, int* sums,
                    int n, int halves, float eps) {
  norm_rows(x, weight, bias, y, out, scale, sums, n, halves, eps);
}

extern "C" __global__ void __launch_bounds__(256) row_squares(const float* x, float* squares, int n) {
  let_next_begin();
  wait_for_previous();
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  long long at = static_cast<long long>(blockIdx.x) * n + i;
  put_squares(squares, at, i < n ? x[at] : 0.0f, i < n && i % GROUP == 0, ALL_LANES);
}
