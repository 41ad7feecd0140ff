// What attention.cu and attention_step.cu share. The order of additions is described in attention.cu.
constexpr int TILE = 64, WARPS = 8;
constexpr float LOG2_E = 1.4426950408889634f, NOTHING = -1.0f;

// The cache of one sequence.
struct Cache {
  const f16 *k, *v;
  const unsigned char *k_exponents, *v_exponents;
  const int* table;
  int block_size, n_head_kv, head_dim, n_kv;
};

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
// 2^(m - M) for m ≤ M; both may be -infinity.
__device__ __forceinline__ float weight(float m, float M) { return m == M ? 1.0f : exp2f(m - M); }
__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Folds (other_m, other_l) into (m, l); gives the factors for o and the other o. NOTHING: the other one is left out.
__device__ __forceinline__ void fold(float& m, float& l, float other_m, float other_l, float& keep, float& add) {
  bool is_empty = other_m == minus_infinity() && other_l == 0.0f;
  float M = fmaxf(m, other_m), of_smaller = exp2f(fminf(m, other_m) - M);
  keep = is_empty || m == M ? 1.0f : of_smaller;
  add = is_empty ? NOTHING : other_m == M ? 1.0f : of_smaller;
  l = is_empty ? l : __fadd_rn(__fmul_rn(l, keep), __fmul_rn(other_l, add));
  m = M;
}
__device__ __forceinline__ float folded(float o, float other, float keep, float add) {
  return __fadd_rn(__fmul_rn(o, keep), __fmul_rn(other, add));
}

// Folds the sink into (m, l); the result is the factor by which o is multiplied to give y.
__device__ __forceinline__ float finish(float m, float l, const float* sinks, int head) {
  if (!sinks) return 1.0f / l;
  float sink = __fmul_rn(sinks[head], LOG2_E), M = fmaxf(m, sink), keep = weight(m, M);
  return keep / __fadd_rn(__fmul_rn(l, keep), weight(sink, M));
}
