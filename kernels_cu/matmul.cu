// Products with quantised weights: y[t, o] = Σ_k W[o, k] x[t, k] + bias[o], for one row or thousands, one order of sums.
//
// Twins: refengine.ops.linear.linear and linear_experts. Activations come from `activations_f16` (activations.cu): halves
// in the order of layout.activation_order, each row multiplied by a power of two 1 / x_scale[t]; x_sums[t, b] is 1/32 of
// the sum of block b's 32 halves, as two halves that add up to it. Weights are planes as in layout.py. y (n_rows, n_out)
// float32; bias (n_out,) float32 or null.
//
// Order of additions, the same for every n_rows, every grouping of rows, and both kernels:
//   block of 32 columns   two mma.sync.m16n8k16, columns 0-15 then 16-31
//   segment of 256        SCALED types (codes · small scales are exact halves): the mma of all blocks one after another into
//                         one sum from zero. Others: p = mma, mma from zero (Q6_K: two of one mma), s = fma(factor, p, s),
//                         blocks ascending. WHOLE: then s · d. With minimums: s = fma(32 dmin, one mma of the eight
//                         minimums with both halves of the eight block sums, s)
//   row                   y = (((s0 + s1) + s2) + …) · x_scale, then + bias
// The integers of a block are exact in half precision, so that only the activations are rounded.
//
// rows8_*:  up to 8 rows a block of threads: grid x any number, block b takes tiles b, b + grid, … of 16 outputs; y groups
//           of 8 rows; each warp takes every n_warps-th segment, asking for the next weights before it multiplies; one warp
//           adds the segments of a tile in order. For few rows: all of the time is reading the weights. Dynamic shared
//           memory: 1024 bytes a segment. May be launched to overlap with the kernel before it.
// rows64_*: 64 rows a warp: grid x groups of n_warps tiles, y groups of 64 rows; a warp walks all segments of its tile.
// Weights are read once for 8 (64) rows.
//
// Experts: with `groups` (from group_experts, moe.cu), group blockIdx.y is (expert, first slot, number of slots), slot s
// takes row x_rows[s] of the activations and goes to row y_rows[s] of y; bias is (n_expert, n_out). Without, slots are
// rows in their order.
#include "quants.cuh"

struct Activations {
  const f16* x;
  const f16x2* sums;
  const float* scale;
};

// The rows of activations that a block of threads has: numbers 0 … count - 1.
struct Rows {
  int expert, first, count;
  const int *x_rows, *y_rows;
  __device__ __forceinline__ int of_x(int i) const { return x_rows ? x_rows[first + i] : first + i; }
  __device__ __forceinline__ int of_y(int i) const { return y_rows ? y_rows[first + i] : first + i; }
};

__device__ __forceinline__ Rows rows_of(const int* groups, const int* x_rows, const int* y_rows, int n_rows, int size) {
  if (groups) {
    const int* group = groups + 3 * blockIdx.y;
    return {group[0], group[1], group[2], x_rows, y_rows};
  }
  int first = blockIdx.y * size;
  return {0, first, min(size, n_rows - first), nullptr, nullptr};
}

// Where a lane's columns of a row's segment begin. Lanes of rows beyond the last take the last: no column of an mma knows
// another, and what is not stored may be anything.
__device__ __forceinline__ const f16* columns_of(const Activations& x, int row, int start, int n_blocks) {
  return x.x + (static_cast<long long>(row) * n_blocks + start) * 32 + threadIdx.x % 4 * 8;
}

// The products of one block of 32 columns with 8 rows of activations, added to the sums of its segment. four: a lane's
// columns.
template <class Q>
__device__ __forceinline__ void add_block(const MmaA (&a)[2], const typename Q::Scales (&scales)[2], int j,
                                          const uint4& four, MmaD& sums) {
  MmaB b[2] = {{{four.x, four.y}}, {{four.z, four.w}}};
  if constexpr (Q::SCALED) {
    mma_m16n8k16(sums, a[0], b[0]);
    mma_m16n8k16(sums, a[1], b[1]);
  } else {
    MmaD p{};
    mma_m16n8k16(p, a[0], b[0]);
    if (Q::SPLIT) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums.x[i] = __fmaf_rn(Q::factor(scales[i / 2], j, 0), p.x[i], sums.x[i]);
      p = MmaD{};
    }
    mma_m16n8k16(p, a[1], b[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) sums.x[i] = __fmaf_rn(Q::factor(scales[i / 2], j, 1), p.x[i], sums.x[i]);
  }
}

template <class Q>
__device__ __forceinline__ void block_operands(const typename Q::Words& words, const typename Q::Scales (&scales)[2],
                                               int j, MmaA (&a)[2]) {
  if constexpr (Q::SCALED)
    Q::scaled_operands(words, scales, j, a);
  else
    Q::operands(words, a);
}

// What a segment's sums still lack: the scale of all of it, and the minimums.
template <class Q, int N>
__device__ __forceinline__ void finish_segment(const typename Q::Scales (&scales)[2], const Activations& x,
                                               const int (&row)[N], int start, int n_blocks, MmaD (&sums)[N]) {
  int c = threadIdx.x % 4;
  if constexpr (Q::WHOLE) {
    float d[2] = {Q::whole(scales[0]), Q::whole(scales[1])};
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n].x[i] = __fmul_rn(sums[n].x[i], d[i / 2]);
  }
  if constexpr (Q::HAS_MINIMUM) {
    f16x2 of_row[2][2];
    Q::minimum_operand(scales[0], c, of_row[0]);
    Q::minimum_operand(scales[1], c, of_row[1]);
    MmaA a = {{of_row[0][0], of_row[1][0], of_row[0][1], of_row[1][1]}};
    float whole[2] = {32.0f * Q::minimum_whole(scales[0]), 32.0f * Q::minimum_whole(scales[1])};
#pragma unroll
    for (int n = 0; n < N; n++) {
      MmaB b{};
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (start + c + 4 * i < n_blocks)
          b.x[i] = load_words<f16x2>(x.sums + static_cast<long long>(row[n]) * n_blocks + start + c + 4 * i);
      MmaD m{};
      mma_m16n8k16(m, a, b);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n].x[i] = __fmaf_rn(whole[i / 2], m.x[i], sums[n].x[i]);
    }
  }
}

template <int N>
__device__ __forceinline__ void store(const Activations& x, const Rows& rows, long long out_tile, const MmaD (&total)[N],
                                      const float* bias, float* y, int n_out) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int number = 8 * n + 2 * c + i % 2;
      long long out = out_tile * 16 + r + 8 * (i / 2);
      if (number >= rows.count || out >= n_out) continue;
      float value = __fmul_rn(total[n].x[i], x.scale[rows.of_x(number)]);
      if (bias) value = __fadd_rn(value, bias[static_cast<long long>(rows.expert) * n_out + out]);
      y[rows.of_y(number) * static_cast<long long>(n_out) + out] = value;
    }
}

// What a lane has of a segment, and where it goes on.
template <class Q>
struct Segment {
  Lanes at;
  const f16* columns;
  int left;  // blocks from its start to the end of the row; none where there is no such segment
  typename Q::Scales scales[2];

  __device__ __forceinline__ void place(const Planes& w, long long tile, int segment) {
    at = lane_of<Q>(w, tile * w.n_blocks + segment * SEGMENT, threadIdx.x % 32);
    left = w.n_blocks - segment * SEGMENT;
  }
  __device__ __forceinline__ void load_scales(const Planes& w, long long tile, int segment) {
    if (left <= 0) return;
#pragma unroll
    for (int i = 0; i < 2; i++) scales[i] = Q::scales(w, tile * w.n_segments + segment, threadIdx.x % 32 / 4 + 8 * i);
  }
};

constexpr int COLUMNS_AHEAD = 4;  // blocks whose activations are asked for before the first is used

// The sums of a segment for up to 8 rows. Words and columns are asked for a few blocks ahead, those of the following
// segment at last, and take the place of what has just been used.
template <class Q, bool FULL>
__device__ __forceinline__ void segment8(const Segment<Q>& now, const Segment<Q>& following,
                                         typename Q::Words (&words)[Q::AHEAD], uint4 (&columns)[COLUMNS_AHEAD],
                                         MmaD& sums) {
#pragma unroll
  for (int j = 0; j < SEGMENT; j++) {
    MmaA a[2];
    bool exists = FULL || j < now.left;
    if (exists) block_operands<Q>(words[j % Q::AHEAD], now.scales, j, a);
    int k = j + Q::AHEAD;
    if (k < SEGMENT ? FULL || k < now.left : k - SEGMENT < following.left)
      words[j % Q::AHEAD] = k < SEGMENT ? Q::load(now.at, k) : Q::load(following.at, k - SEGMENT);
    if (exists) add_block<Q>(a, now.scales, j, columns[j % COLUMNS_AHEAD], sums);
    k = j + COLUMNS_AHEAD;
    if (k < SEGMENT ? FULL || k < now.left : k - SEGMENT < following.left)
      columns[j % COLUMNS_AHEAD] = load_words<uint4>(k < SEGMENT ? now.columns + k * 32
                                                                 : following.columns + (k - SEGMENT) * 32);
  }
}

template <class Q>
__device__ __forceinline__ void rows8(const Planes& w, const Activations& x, const int* groups, const int* x_rows,
                                      const int* y_rows, int n_rows, const float* bias, float* y, int n_out) {
  DYNAMIC_SHARED(float, partial);  // (2, n_segments, 4, 32): of one tile, and of the one before it
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_tiles = (n_out + 15) / 16;
  long long first_tile = 0;  // of the expert
  Segment<Q> now, following;
  typename Q::Words words[Q::AHEAD] = {};
  auto begin = [&] {
    now.place(w, first_tile + blockIdx.x, warp);
#pragma unroll
    for (int j = 0; j < Q::AHEAD; j++)
      if (j < now.left) words[j] = Q::load(now.at, j);
    now.load_scales(w, first_tile + blockIdx.x, warp);
  };
  let_next_begin();
  if (!groups) begin();
  wait_for_previous();
  Rows rows = rows_of(groups, x_rows, y_rows, n_rows, 8);
  if (!rows.count) return;
  first_tile = static_cast<long long>(rows.expert) * n_tiles;
  if (groups) begin();
  const f16* row = columns_of(x, rows.of_x(min(lane / 4, rows.count - 1)), 0, w.n_blocks);
  now.columns = row + warp * SEGMENT * 32;
  uint4 columns[COLUMNS_AHEAD] = {};
#pragma unroll
  for (int j = 0; j < COLUMNS_AHEAD; j++)
    if (j < now.left) columns[j] = load_words<uint4>(now.columns + j * 32);
  int n_done = 0;
  for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x, n_done++) {
    float* sums_of_tile = partial + n_done % 2 * w.n_segments * 128;
    for (int segment = warp; segment < w.n_segments; segment += n_warps) {
      // After the last segment of a tile comes the first of the next.
      bool last = segment + n_warps >= w.n_segments;
      int next_tile = last ? tile + gridDim.x : tile, next_segment = last ? warp : segment + n_warps;
      following.place(w, first_tile + next_tile, next_segment);
      if (next_tile >= n_tiles) following.left = 0;
      following.columns = row + next_segment * SEGMENT * 32;
      following.load_scales(w, first_tile + next_tile, next_segment);
      MmaD sums[1] = {};
      if (now.left >= SEGMENT)
        segment8<Q, true>(now, following, words, columns, sums[0]);
      else
        segment8<Q, false>(now, following, words, columns, sums[0]);
      finish_segment<Q, 1>(now.scales, x, {rows.of_x(min(lane / 4, rows.count - 1))}, segment * SEGMENT, w.n_blocks, sums);
#pragma unroll
      for (int i = 0; i < 4; i++) sums_of_tile[(segment * 4 + i) * 32 + lane] = sums[0].x[i];
      now = following;
    }
    __syncthreads();
    if (warp != n_done % n_warps) continue;
    MmaD total[1] = {};
#pragma unroll 4
    for (int segment = 0; segment < w.n_segments; segment++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        total[0].x[i] = __fadd_rn(total[0].x[i], sums_of_tile[(segment * 4 + i) * 32 + lane]);
    store<1>(x, rows, tile, total, bias, y, n_out);
  }
}

template <class Q>
__device__ __forceinline__ void rows64(const Planes& w, const Activations& x, const int* groups, const int* x_rows,
                                       const int* y_rows, int n_rows, const float* bias, float* y, int n_out) {
  Rows rows = rows_of(groups, x_rows, y_rows, n_rows, 64);
  int lane = threadIdx.x % 32, r = lane / 4, n_tiles = (n_out + 15) / 16;
  int out_tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (out_tile >= n_tiles || !rows.count) return;
  long long tile = static_cast<long long>(rows.expert) * n_tiles + out_tile;
  int row[8];
#pragma unroll
  for (int n = 0; n < 8; n++) row[n] = rows.of_x(min(8 * n + r, rows.count - 1));
  MmaD total[8] = {};
  for (int segment = 0; segment < w.n_segments; segment++) {
    int start = segment * SEGMENT, end = min(SEGMENT, w.n_blocks - start);
    typename Q::Scales scales[2] = {Q::scales(w, tile * w.n_segments + segment, r),
                                    Q::scales(w, tile * w.n_segments + segment, r + 8)};
    Lanes at = lane_of<Q>(w, tile * w.n_blocks + start, lane);
    MmaD sums[8] = {};
#pragma unroll 1
    for (int j = 0; j < end; j++) {
      MmaA a[2];
      block_operands<Q>(Q::load(at, j), scales, j, a);
#pragma unroll
      for (int n = 0; n < 8; n++)
        add_block<Q>(a, scales, j, load_words<uint4>(columns_of(x, row[n], start + j, w.n_blocks)), sums[n]);
    }
    finish_segment<Q, 8>(scales, x, row, start, w.n_blocks, sums);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[n].x[i] = __fadd_rn(total[n].x[i], sums[n].x[i]);
  }
  store<8>(x, rows, out_tile, total, bias, y, n_out);
}

// Threads of a block, and blocks on a multiprocessor, bound the registers of each (cuda/ops.py launches as many).
#define MATMUL(name, kernel, THREADS, BLOCKS, Q)                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                         \
      name(const unsigned char* low, const unsigned char* high, const unsigned char* scales, const unsigned char* d,   \
           const f16* x, const unsigned* x_sums, const float* x_scale, const int* groups, const int* x_rows,           \
           const int* y_rows, const float* bias, float* y, int n_out, int n_in, int n_rows) {                          \
    kernel<Q>(planes_of(low, high, scales, d, n_in), Activations{x, x_sums, x_scale}, groups, x_rows, y_rows, n_rows,  \
              bias, y, n_out);                                                                                         \
  }
MATMUL(rows8_q4_0, rows8, 256, 2, Q4_0)
MATMUL(rows8_q4_1, rows8, 256, 2, Q4_1)
MATMUL(rows8_q5_0, rows8, 256, 2, Q5_0)
MATMUL(rows8_q5_1, rows8, 256, 2, Q5_1)
MATMUL(rows8_q8_0, rows8, 320, 2, Q8_0)
MATMUL(rows8_q4_k, rows8, 320, 2, Q4_K)
MATMUL(rows8_q5_k, rows8, 256, 2, Q5_K)
MATMUL(rows8_q6_k, rows8, 256, 2, Q6_K)
MATMUL(rows8_mxfp4, rows8, 320, 2, MXFP4)
MATMUL(rows8_f16, rows8, 256, 2, F16)
MATMUL(rows64_q4_0, rows64, 128, 1, Q4_0)
MATMUL(rows64_q4_1, rows64, 128, 1, Q4_1)
MATMUL(rows64_q5_0, rows64, 128, 1, Q5_0)
MATMUL(rows64_q5_1, rows64, 128, 1, Q5_1)
MATMUL(rows64_q8_0, rows64, 128, 1, Q8_0)
MATMUL(rows64_q4_k, rows64, 128, 1, Q4_K)
MATMUL(rows64_q5_k, rows64, 128, 1, Q5_K)
MATMUL(rows64_q6_k, rows64, 128, 1, Q6_K)
MATMUL(rows64_mxfp4, rows64, 128, 1, MXFP4)
MATMUL(rows64_f16, rows64, 128, 1, F16)
