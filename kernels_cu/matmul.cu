// Products with quantised weights: y[t, o] = Σ_k W[o, k] x[t, k] + bias[o], for one row or thousands, one order of sums.
//
// Twin: refengine.ops.linear.linear. Activations come from `activations_f16` (activations.cu): halves in the order of
// layout.activation_order, each row multiplied by a power of two 1 / x_scale[t]; x_sums[t, b] is the sum of block b's
// 32 halves. Weights are planes as in layout.py. y (n_rows, n_out) float32; bias (n_out,) float32 or null.
//
// Order of additions, the same for every n_rows and both kernels:
//   block of 32 columns   p = two mma.sync.m16n8k16, columns 0-15 then 16-31, from zero (Q6_K: two sums of one mma)
//   segment of 256        s = fma(scale, p, s), then s = fma(-minimum, x_sum, s), blocks ascending, from zero
//   row                   y = (((s0 + s1) + s2) + …) · x_scale, then + bias
// The integers of a block are exact in half precision, so that only the activations are rounded.
//
// rows8_*:  up to 8 rows a block of threads: grid x tiles of 16 outputs, y groups of 8 rows; each warp takes every
//           n_warps-th segment, and warp 0 adds them in order. For few rows: all of the time is reading the weights.
//           Dynamic shared memory: 512 bytes a segment.
// rows64_*: 64 rows a warp: grid x groups of n_warps tiles, y groups of 64 rows; a warp walks all segments of its tile.
// Weights are read once for 8 (64) rows.
#include "quants.cuh"

struct Activations {
  const f16* x;
  const float *sums, *scale;
  int n_rows;
};

// The products of one block of 32 columns with 8 · N rows of activations, added to the sums of its segment.
template <class Q, int N>
__device__ __forceinline__ void add_block(const typename Q::Words& words, const typename Q::Scales (&scales)[2], int j,
                                          const Activations& x, int block, int n_blocks, int first, MmaD (&sums)[N]) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  MmaA a[2];
  Q::operands(words, a);
#pragma unroll
  for (int n = 0; n < N; n++) {
    int token = first + 8 * n + r;
    uint4 four = make_uint4(0, 0, 0, 0);
    if (token < x.n_rows)
      four = load_constant<uint4>(x.x + (static_cast<long long>(token) * n_blocks + block) * 32 + c * 8);
    MmaB b[2] = {{{four.x, four.y}}, {{four.z, four.w}}};
    MmaD p{};
    mma_m16n8k16(p, a[0], b[0]);
    if (Q::SPLIT) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n].x[i] = __fmaf_rn(Q::scale(scales[i / 2], j, 0), p.x[i], sums[n].x[i]);
      p = MmaD{};
    }
    mma_m16n8k16(p, a[1], b[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) sums[n].x[i] = __fmaf_rn(Q::scale(scales[i / 2], j, 1), p.x[i], sums[n].x[i]);
    if (Q::HAS_MINIMUM) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int column = first + 8 * n + 2 * c + i;
        float x_sum = column < x.n_rows ? x.sums[static_cast<long long>(column) * n_blocks + block] : 0.0f;
        sums[n].x[i] = __fmaf_rn(-Q::minimum(scales[0], j), x_sum, sums[n].x[i]);
        sums[n].x[2 + i] = __fmaf_rn(-Q::minimum(scales[1], j), x_sum, sums[n].x[2 + i]);
      }
    }
  }
}

// The sums of one segment. For few rows, several blocks' weights are asked for before the first is used: the time is in
// their way from memory. For many, registers are better spent on sums.
template <class Q, int N>
__device__ __forceinline__ void add_segment(const Planes& w, const Activations& x, long long tile, int segment,
                                            int first, MmaD (&sums)[N]) {
  int lane = threadIdx.x % 32, r = lane / 4, start = segment * SEGMENT, n = min(SEGMENT, w.n_blocks - start);
  typename Q::Scales scales[2] = {Q::scales(w, tile * w.n_segments + segment, r),
                                  Q::scales(w, tile * w.n_segments + segment, r + 8)};
  long long place = tile * w.n_blocks + start;
  if (N > 1 || n < SEGMENT) {
#pragma unroll 1
    for (int j = 0; j < n; j++)
      add_block<Q, N>(Q::load(w, place + j, lane), scales, j, x, start + j, w.n_blocks, first, sums);
    return;
  }
#pragma unroll
  for (int group = 0; group < SEGMENT; group += Q::AHEAD) {
    typename Q::Words words[Q::AHEAD];
#pragma unroll
    for (int j = 0; j < Q::AHEAD; j++) words[j] = Q::load(w, place + group + j, lane);
#pragma unroll
    for (int j = 0; j < Q::AHEAD; j++)
      add_block<Q, N>(words[j], scales, group + j, x, start + group + j, w.n_blocks, first, sums);
  }
}

template <int N>
__device__ __forceinline__ void store(const Activations& x, long long tile, int first, const MmaD (&total)[N],
                                      const float* bias, float* y, int n_out) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = first + 8 * n + 2 * c + i % 2;
      long long out = tile * 16 + r + 8 * (i / 2);
      if (token >= x.n_rows || out >= n_out) continue;
      float value = __fmul_rn(total[n].x[i], x.scale[token]);
      y[token * static_cast<long long>(n_out) + out] = bias ? __fadd_rn(value, bias[out]) : value;
    }
}

template <class Q>
__device__ __forceinline__ void rows8(const Planes& w, const Activations& x, const float* bias, float* y, int n_out) {
  DYNAMIC_SHARED(float, partial);  // (n_segments, 4, 32)
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  for (int segment = warp; segment < w.n_segments; segment += n_warps) {
    MmaD sums[1] = {};
    add_segment<Q, 1>(w, x, blockIdx.x, segment, blockIdx.y * 8, sums);
#pragma unroll
    for (int i = 0; i < 4; i++) partial[(segment * 4 + i) * 32 + lane] = sums[0].x[i];
  }
  __syncthreads();
  if (warp) return;
  MmaD total[1] = {};
  for (int segment = 0; segment < w.n_segments; segment++)
#pragma unroll
    for (int i = 0; i < 4; i++) total[0].x[i] = __fadd_rn(total[0].x[i], partial[(segment * 4 + i) * 32 + lane]);
  store<1>(x, blockIdx.x, blockIdx.y * 8, total, bias, y, n_out);
}

template <class Q>
__device__ __forceinline__ void rows64(const Planes& w, const Activations& x, const float* bias, float* y, int n_out) {
  int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, first = blockIdx.y * 64;
  if (tile >= (n_out + 15) / 16) return;
  MmaD total[8] = {};
  for (int segment = 0; segment < w.n_segments; segment++) {
    MmaD sums[8] = {};
    add_segment<Q, 8>(w, x, tile, segment, first, sums);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[n].x[i] = __fadd_rn(total[n].x[i], sums[n].x[i]);
  }
  store<8>(x, tile, first, total, bias, y, n_out);
}

// The most threads that a block may have bounds the registers of each: 64 or 128 (rows8, at most 16 warps), 255 (rows64).
#define MATMUL(name, kernel, THREADS, Q)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      name(const unsigned char* low, const unsigned char* high, const unsigned char* scales, const unsigned char* d,  \
           const f16* x, const float* x_sums, const float* x_scale, const float* bias, float* y, int n_out, int n_in, \
           int n_rows) {                                                                                              \
    kernel<Q>(planes_of(low, high, scales, d, n_in), Activations{x, x_sums, x_scale, n_rows}, bias, y, n_out);        \
  }
MATMUL(rows8_q4_0, rows8, 1024, Q4_0)
MATMUL(rows8_q4_1, rows8, 1024, Q4_1)
MATMUL(rows8_q5_0, rows8, 1024, Q5_0)
MATMUL(rows8_q5_1, rows8, 512, Q5_1)
MATMUL(rows8_q8_0, rows8, 1024, Q8_0)
MATMUL(rows8_q4_k, rows8, 1024, Q4_K)
MATMUL(rows8_q5_k, rows8, 1024, Q5_K)
MATMUL(rows8_q6_k, rows8, 1024, Q6_K)
MATMUL(rows8_mxfp4, rows8, 1024, MXFP4)
MATMUL(rows8_f16, rows8, 512, F16)
MATMUL(rows64_q4_0, rows64, 256, Q4_0)
MATMUL(rows64_q4_1, rows64, 256, Q4_1)
MATMUL(rows64_q5_0, rows64, 256, Q5_0)
MATMUL(rows64_q5_1, rows64, 256, Q5_1)
MATMUL(rows64_q8_0, rows64, 256, Q8_0)
MATMUL(rows64_q4_k, rows64, 256, Q4_K)
MATMUL(rows64_q5_k, rows64, 256, Q5_K)
MATMUL(rows64_q6_k, rows64, 256, Q6_K)
MATMUL(rows64_mxfp4, rows64, 256, MXFP4)
MATMUL(rows64_f16, rows64, 256, F16)
