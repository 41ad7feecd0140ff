// Activations of the feed-forward, element by element. Twins: refengine.ops.activation.
//
//   swiglu_f32          gate / (1 + e^-gate) · up
//   swiglu_clamped_f32  g = min(gate, 7), u = clamp(up, -7, 7): g / (1 + e^(-1.702 g)) · (u + 1)
//   gelu_f32            x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))
//
// All arrays (n,) float32. Grid: x groups of 256 elements; block: 256 threads. 12 (8) bytes an element. A NaN stays.
extern "C" __global__ void swiglu_f32(const float* gate, const float* up, float* y, long long n) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void swiglu_clamped_f32(const float* gate, const float* up, float* y, long long n) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  // Comparisons that a NaN fails leave it as it is.
  float g = gate[i] > 7.0f ? 7.0f : gate[i], u = up[i] > 7.0f ? 7.0f : up[i] < -7.0f ? -7.0f : up[i];
  y[i] = g / (1.0f + expf(-1.702f * g)) * (u + 1.0f);
}

extern "C" __global__ void gelu_f32(const float* x, float* y, long long n) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i], inner = 0.7978845608f * v * (1.0f + 0.044715f * v * v);
  y[i] = 0.5f * v * (1.0f + tanhf(inner));
}
