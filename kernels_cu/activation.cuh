// Activations of the feed-forward for one element. NaN gives NaN: the comparisons keep it, because they are false for it.

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

__device__ __forceinline__ float swiglu_clamped(float gate, float up) {
  float g = gate > 7.0f ? 7.0f : gate, u = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return g / (1.0f + expf(-1.702f * g)) * (u + 1.0f);
}

__device__ __forceinline__ float gelu(float x) {
  float inner = 0.7978845608f * x * (1.0f + 0.044715f * x * x);
  return 0.5f * x * (1.0f + tanhf(inner));
}
