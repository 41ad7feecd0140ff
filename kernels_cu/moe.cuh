// The order of experts and the softmax of their scores, for moe.cu and router.cu.

// Whether (a, i) ranks before (b, j): scores and experts. NaN ranks above every number.
__device__ __forceinline__ bool before(float a, int i, float b, int j) {
  bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  return a > b || (!(a < b) && i < j);
}

// e^(x_i - max) / total for number i of n; sums in ascending order.
__device__ __forceinline__ float soft_max(const float* x, int n, int i) {
  float top = x[0], total = 0.0f;
  for (int j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
  for (int j = 0; j < n; j++) total += expf(x[j] - top);
  return expf(x[i] - top) / total;
}
