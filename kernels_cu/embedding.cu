// Dequantised rows of the embedding matrix: out[t, k] = W[ids[t], k], bit for bit ggml's value.
//
// Array code: refengine.ops.linear.embedding. ids (n_tokens,) int32; out (n_tokens, n_in) float32.
// Grid: x tokens, y 32-column blocks in groups of 8; block: 32 threads, thread 4·b + c has lane c's columns of block b.
// Reads each row once and writes 4 bytes per column. squares: of quantised rows, the sums of squares of every 16 columns,
// (n_tokens, n_in / 16) float32, with the bits of row_squares (norm.cu); or null.
// Precondition: every id is below n_out. An id below zero (no row) gives zeros. F32 and BF16: rows as stored in the file.
#include "arguments.cuh"
#include "quants.cuh"
#include "norm.cuh"

// Writes the sum of squares of half a block's columns, of which each of four lanes has four: in the order of group_sum.
__device__ __forceinline__ void put_squares_of_half(float* squares, int n_in, int block, int half, const float* own) {
  float of[4];
#pragma unroll
  for (int i = 0; i < 4; i++) of[i] = __fmul_rn(own[i], own[i]);
#pragma unroll
  for (int distance = 2; distance; distance /= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) of[i] = __fadd_rn(of[i], __shfl_xor_sync(ALL_LANES, of[i], distance));
  float sum = __fadd_rn(__fadd_rn(of[0], of[2]), __fadd_rn(of[1], of[3]));
  if (threadIdx.x % 4 == 0 && block * 32 < n_in)
    squares[static_cast<long long>(blockIdx.x) * (n_in / GROUP) + block * 2 + half] = sum;
}

// Rounded twice, as in ggml: the product, then what is added.
template <class Q>
__device__ __forceinline__ void embed(const Tiles& w, const int* ids, float* out, float* squares, int n_in) {
  int id = max(ids[blockIdx.x], 0), row = id % 16, block = blockIdx.y * 8 + threadIdx.x / 4, c = threadIdx.x % 4;
  long long tile = id / 16;
  bool exists = block < w.n_blocks;
  if (!exists) block = 0;  // its lanes take part in sums
  int n_pairs = w.n_pairs(block / SEGMENT), j = block % SEGMENT % n_pairs, k = block % SEGMENT / n_pairs, r = row % 8, i = row / 8;
  Planes planes = planes_of<Q>(w, tile, block / SEGMENT);
  MmaCodes codes = Q::template codes<InGlobal>(lane_of<Q>(planes, 4 * r + c), j).x[k];
  auto whole = Q::template whole<InGlobal>(planes, r);
  float* to = out + static_cast<long long>(blockIdx.x) * n_in + block * 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    auto scales = Q::template scales<InGlobal>(planes, lane_of_scales<Q>(r, j, half));
    float scale, added = 0.0f;
    if constexpr (Q::INTEGER) {
      scale = __fmul_rn(Q::d(whole, i), static_cast<float>(Q::integer(scales, i, number_of_scale<Q>(j, k))));
      if constexpr (Q::HAS_MINIMUM)
        added = -__fmul_rn(Q::dmin(whole, i), static_cast<float>(Q::integer_minimum(scales, i, k)));
    } else {
      scale = Q::factor(scales, i, k), added = Q::minimum(scales, i, k);
    }
    float own[4];
#pragma unroll
    for (int column = 0; column < 4; column++) {
      int byte = byte_of(i ? codes.x[2 * half + 1] : codes.x[2 * half], column);
      float code = static_cast<float>((Q::SIGNED ? static_cast<int8_t>(byte) : byte) - Q::OFFSET);
      float value = __fmul_rn(__fmul_rn(code, Q::UNIT), scale);
      own[column] = Q::HAS_MINIMUM ? __fadd_rn(value, added) : value;
      if (exists) to[half * 16 + c * 4 + column] = own[column];
    }
    if (squares) put_squares_of_half(squares, n_in, exists ? block : w.n_blocks, half, own);
  }
}

extern "C" __global__ void embedding_f16(const unsigned char* w, const int* ids, float* out, float* squares, int n_in) {
  int id = max(ids[blockIdx.x], 0), row = id % 16, block = blockIdx.y * 8 + threadIdx.x / 4, c = threadIdx.x % 4;
  int n_blocks = (n_in + 63) / 64 * 2;  // with those that fill up a pair
  bool exists = block * 32 < n_in;
  int read = exists ? block : 0;
  const uint8_t* words = w + (static_cast<long long>(id / 16) * n_blocks + read) * 1024 + (row % 8 * 4 + c) * 32 + row / 8 * 16;
  uint4 eight = load_constant<uint4>(words);
  float own[8], *to = out + static_cast<long long>(blockIdx.x) * n_in + block * 32 + c * 4;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    own[i] = half_of(eight, i);
    if (exists) to[i / 4 * 16 + i % 4] = own[i];
  }
  if (squares)
#pragma unroll
    for (int half = 0; half < 2; half++) put_squares_of_half(squares, n_in, block, half, own + 4 * half);
}

#define EMBEDDING(name, Q)                                                                                        \
  extern "C" __global__ void name(const unsigned char* w, const int* ids, float* out, float* squares, int n_in) { \
    embed<Q>(Tiles{w, n_in / 32}, ids, out, squares, n_in);                                                       \
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
