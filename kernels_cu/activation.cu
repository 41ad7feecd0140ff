// Activations of the feed-forward, element by element. The array code for each is in refengine.ops.activation.
//
//   swiglu_f32          gate / (1 + e^-gate) · up
//   swiglu_clamped_f32  g = min(gate, 7), u = clamp(up, -7, 7): g / (1 + e^(-1.702 g)) · (u + 1)
//   add_f32             x + y
//   scale_f32           x · factor
//   gelu_f32            x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
//
// All arrays are (n,) float32. Grid: x groups of 256 elements; block: 256 threads. Moves 12 (gelu: 8) bytes per element.
// NaN gives NaN. May be launched to overlap with the previous kernel.
#include "activation.cuh"

extern "C" __global__ void swiglu_f32(const float* gate, const float* up, float* y, long long n) {
  let_next_begin();
  wait_for_previous();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = swiglu(gate[i], up[i]);
}

extern "C" __global__ void swiglu_clamped_f32(const float* gate, const float* up, float* y, long long n) {
  let_next_begin();
  wait_for_previous();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = swiglu_clamped(gate[i], up[i]);
}

extern "C" __global__ void add_f32(const float* x, const float* y, float* out, long long n) {
  let_next_begin();
  wait_for_previous();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __fadd_rn(x[i], y[i]);
}

extern "C" __global__ void scale_f32(const float* x, float* y, float factor, long long n) {
  let_next_begin();
  wait_for_previous();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __fmul_rn(x[i], factor);
}

extern "C" __global__ void gelu_f32(const float* x, float* y, long long n) {
  let_next_begin();
  wait_for_previous();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = gelu(x[i]);
}
