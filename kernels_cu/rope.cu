// Rotary position embedding of Q or K. Array code: refengine.ops.rope.rope_neox and rope_norm.
//
//   rope_neox_f32  rotates pairs (i, i + half);  rope_norm_f32  pairs (2i, 2i + 1);  by the angle of the token and i:
//   (a, b) → (a · cos - b · sin, a · sin + b · cos); each product and difference is rounded. Elements from 2 · half on are
//   copied.
//
// x, y (n_tokens, n_head, head_dim) float32, y may be x; cos, sin (n_tokens, half) float32, computed on the host by
// ops.rope.rope_angles with YaRN and frequency factors. Grid: x tokens, y heads; block: at least half threads.
// No sums. Moves 8 bytes per element.

template <bool NEOX>
__device__ __forceinline__ void rotate(const float* x, const float* cos, const float* sin, float* y, int half,
                                       int head_dim) {
  long long start = (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * head_dim;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    long long first = start + (NEOX ? i : 2 * i), second = NEOX ? first + half : first + 1;
    float c = cos[static_cast<long long>(blockIdx.x) * half + i], s = sin[static_cast<long long>(blockIdx.x) * half + i];
    float a = x[first], b = x[second];
    y[first] = __fadd_rn(__fmul_rn(a, c), -__fmul_rn(b, s));
    y[second] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
  }
  for (int i = 2 * half + threadIdx.x; i < head_dim; i += blockDim.x) y[start + i] = x[start + i];
}

extern "C" __global__ void rope_neox_f32(const float* x, const float* cos, const float* sin, float* y, int half,
                                         int head_dim) {
  rotate<true>(x, cos, sin, y, half, head_dim);
}

extern "C" __global__ void rope_norm_f32(const float* x, const float* cos, const float* sin, float* y, int half,
                                         int head_dim) {
  rotate<false>(x, cos, sin, y, half, head_dim);
}
