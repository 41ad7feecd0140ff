// Dequantised rows of the embedding matrix: out[t, k] = W[ids[t], k], bit for bit ggml's value.
//
// Array code: refengine.ops.linear.embedding. ids (n_tokens,) int32; out (n_tokens, n_in) float32.
// Grid: x tokens, y 32-column blocks in groups of 8; block: 32 threads, thread 4·b + c has lane c's columns of block b.
// Reads each row once and writes 4 bytes per column. No sums.
// Precondition: every id is below n_out. An id below zero (no row) gives zeros. F32 and BF16: rows as stored in the file.
#include "arguments.cuh"
#include "quants.cuh"

template <class Q>
__device__ __forceinline__ void embed(const Tiles& w, const int* ids, float* out, int n_in) {
  int id = max(ids[blockIdx.x], 0), row = id % 16, block = blockIdx.y * 8 + threadIdx.x / 4, c = threadIdx.x % 4;
  long long tile = id / 16;
  if (block >= w.n_blocks) return;
  MmaA a[2];
  Planes planes = planes_of<Q>(w, tile, block / SEGMENT);
  Q::operands(Q::template load<InGlobal>(lane_of<Q>(planes, block % SEGMENT, row % 8 * 4 + c), 0), a);
  auto scales = Q::template scales<InGlobal>(planes, row);
  float* to = out + static_cast<long long>(blockIdx.x) * n_in + block * 32;
  float minimum = Q::minimum(scales, block % SEGMENT);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float scale = Q::scale(scales, block % SEGMENT, half);
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      f16x2 codes = row < 8 ? a[half].x[2 * pair] : a[half].x[2 * pair + 1];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // Rounded twice, as in ggml: the product, then the difference. Adding 0 turns a code of -0 (ggml has 0) into 0.
        float code = __fadd_rn(f16_to_f32(codes >> 16 * i & 0xffffu), 0.0f);
        float value = __fmul_rn(code, scale);
        if (Q::HAS_MINIMUM) value = __fadd_rn(value, -minimum);
        to[half * 16 + c * 4 + pair * 2 + i] = value;
      }
    }
  }
}

#define EMBEDDING(name, Q)                                                                   \
  extern "C" __global__ void name(const unsigned char* w, const int* ids, float* out, int n_in) { \
    embed<Q>(Tiles{w, n_in / 32}, ids, out, n_in);                                           \
  }
EMBEDDING(embedding_q4_0, Q4_0)
EMBEDDING(embedding_q4_1, Q4_1)
EMBEDDING(embedding_q5_0, Q5_0)
EMBEDDING(embedding_q5_1, Q5_1)
EMBEDDING(embedding_q8_0, Q8_0)
EMBEDDING(embedding_q4_k, Q4_K)
EMBEDDING(embedding_q5_k, Q5_K)
EMBEDDING(embedding_q6_k, Q6_K)
EMBEDDING(embedding_mxfp4, MXFP4)
EMBEDDING(embedding_f16, F16)

// Rows that are stored as in the file. Grid: x tokens; block: any.
extern "C" __global__ void embedding_f32(const float* w, const int* ids, float* out, int n_in) {
  const float* row = w + static_cast<long long>(max(ids[blockIdx.x], 0)) * n_in;
  for (int i = threadIdx.x; i < n_in; i += blockDim.x) out[static_cast<long long>(blockIdx.x) * n_in + i] = row[i];
}

extern "C" __global__ void embedding_bf16(const unsigned short* w, const int* ids, float* out, int n_in) {
  const unsigned short* row = w + static_cast<long long>(max(ids[blockIdx.x], 0)) * n_in;
  for (int i = threadIdx.x; i < n_in; i += blockDim.x)
    out[static_cast<long long>(blockIdx.x) * n_in + i] = __uint_as_float(static_cast<uint32_t>(row[i]) << 16);
}
