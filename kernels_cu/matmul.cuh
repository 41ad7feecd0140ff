// Products: the code that matmul.cu, gate_up.cu and qkv.cu share. The order of additions is described in matmul.cu.
//
// A warp multiplies one tile of W, 16 outputs x 32 columns, with 8 rows of activations, in two mma.sync.m16n8k16: the first
// has columns 0-15, the second columns 16-31. Each of the 32 lanes has a part of every operand. The numbers below are
// lanes; lane = 4 r + c, with r from 0 to 7 and c from 0 to 3.
//
//   W (operand a)                  columns                               x (operand b)           columns
//               0-3  4-7  8-11 12-15 | 16-19 20-23 24-27 28-31                   0-3  4-7  8-11 12-15 | 16-19 … 28-31
//   output  0    0    1    2    3    |   0     1     2     3          row 0       0    1    2    3    |   0   …   3
//           1    4    5    6    7    |   4     5     6     7              1       4    5    6    7    |   4   …   7
//           …                        |                                    …                           |
//           7   28   29   30   31    |  28    29    30    31              7      28   29   30   31    |  28   …  31
//           8    0    1    2    3    |   0     1     2     3
//           …                        |                                a lane holds 4 + 4 columns of row r: 16 bytes, next to
//          15   28   29   30   31    |  28    29    30    31          each other in memory (layout.activation_order)
//
//   a lane holds 4 + 4 columns of outputs r and r + 8: a[0] and a[1]
//
//   sums (operand d)   row      0  1 | 2  3 | 4  5 | 6  7
//               output  0       0  0 | 1  1 | 2  2 | 3  3             a lane holds the sums of outputs r and r + 8 for rows
//                       …            |      |      |                  2c and 2c + 1:
//                       7      28 28 |29 29 |30 30 |31 31               d[0] (r, 2c)      d[1] (r, 2c + 1)
//                       8       0  0 | 1  1 | 2  2 | 3  3               d[2] (r + 8, 2c)  d[3] (r + 8, 2c + 1)
//                       …            |      |      |
//                      15      28 28 |29 29 |30 30 |31 31
//
// By definition, an mma has columns 2c, 2c + 1, 2c + 8 and 2c + 9 in lane c. The order of columns does not change its
// result if both operands have the same order. So column 2c + i of an mma is column 4c + i here, and column 2c + 8 + i is
// column 4c + 2 + i, which makes a lane's four columns adjacent.
//
// matmul_plain.cuh computes the same sums in a plain loop; read it first.

// The rows of activations that a block of threads multiplies, numbered from 0 to count - 1.
struct Rows {
  int expert, first, count;
  const int *x_rows, *y_rows;
  __device__ __forceinline__ int of_x(int i) const { return x_rows ? x_rows[first + i] : first + i; }
  __device__ __forceinline__ int of_y(int i) const { return y_rows ? y_rows[first + i] : first + i; }
};

__device__ __forceinline__ Rows rows_of(const Groups& groups, int n_rows, int size) {
  if (groups.group) {
    const int* group = groups.group + 3 * blockIdx.y;
    return {group[0], group[1], group[2], groups.x_rows, groups.y_rows};
  }
  int first = blockIdx.y * size;
  return {0, first, min(size, n_rows - first), nullptr, nullptr};
}

// The address of a lane's columns in a row's segment. Lanes whose row does not exist use the last row: the rows of an mma
// do not affect each other, and sums of rows that do not exist are not stored.
__device__ __forceinline__ const f16* columns_of(const Activations& x, int row, int start, int n_blocks) {
  return x.x + (static_cast<long long>(row) * n_blocks + start) * 32 + threadIdx.x % 4 * 8;
}

// Adds the products of one block of 32 columns with 8 rows of activations to the segment's sums. four: the lane's columns
// of its row.
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

// Completes the sums of a segment: multiplies by the scale of the whole segment, and subtracts the minimums' part.
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

// Calls put(i, row, output) for each of the lane's four sums whose row and output exist.
template <class Put>
__device__ __forceinline__ void for_sums(const Rows& rows, int tile, int n, int n_out, const Put& put) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int number = 8 * n + 2 * c + i % 2, out = tile * 16 + r + 8 * (i / 2);
    if (number < rows.count && out < n_out) put(i, number, out);
  }
}
// The output from a row's sum: times the row's scale, plus the bias.
__device__ __forceinline__ float scaled_sum(float sum, const Activations& x, const Rows& rows, int number,
                                            const float* bias, int out, int n_out) {
  float value = __fmul_rn(sum, x.scale[rows.of_x(number)]);
  return bias ? __fadd_rn(value, bias[static_cast<long long>(rows.expert) * n_out + out]) : value;
}
// The type of an index into y. For few rows y has fewer than 2^32 elements, and 32 bits save registers.
template <int N>
struct Place {
  typedef unsigned long long Index;
};
template <>
struct Place<1> {
  typedef uint32_t Index;
};
template <int N>
__device__ __forceinline__ void store(const Activations& x, const Rows& rows, int tile, const MmaD (&total)[N],
                                      const float* bias, const float* residual, float* y, int n_out) {
  typedef typename Place<N>::Index Index;
#pragma unroll
  for (int n = 0; n < N; n++)
    for_sums(rows, tile, n, n_out, [&](int i, int number, int out) {
      Index at = static_cast<Index>(rows.of_y(number)) * n_out + out;
      float value = scaled_sum(total[n].x[i], x, rows, number, bias, out, n_out);
      y[at] = residual ? __fadd_rn(value, residual[at]) : value;
    });
}

// One segment of a tile, as a lane reads it.
template <class Q>
struct Segment {
  Lanes at;
  const f16* columns;
  int left;  // blocks from the segment's start to the end of the row; zero or less if the segment does not exist
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

constexpr int COLUMNS_AHEAD = 4;  // blocks whose activations are loaded before the first is used

// Adds up a segment for up to 8 rows. Words and columns are loaded a few blocks ahead and replace those just used; at the
// end of the segment, those of the next segment are loaded.
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

// M matrices of the same shape, multiplied with the same rows: a tile has n_segments items of each matrix, one matrix after
// another.
template <int M>
struct SideBySide {
  Planes w[M];
  static constexpr int N = M;  // sums of a tile
  __device__ __forceinline__ Planes of(int item, int) const {
    const Planes &a = w[0], &b = w[M - 1];
    bool first = M == 1 || item < a.n_segments;
    return Planes{first ? a.low : b.low, first ? a.high : b.high, first ? a.scales : b.scales, first ? a.d : b.d,
                  a.n_blocks, a.n_segments};
  }
  __device__ __forceinline__ int within(int tile) const { return tile; }
};
// Up to three matrices with the same row length, one below another: the second begins at tile `second`, the third at tile
// `third`.
struct Stacked {
  Planes w[3];
  int second, third;
  static constexpr int N = 1;
  __device__ __forceinline__ Planes of(int, int tile) const {
    int i = (tile >= second) + (tile >= third);
    return Planes{i == 0 ? w[0].low : i == 1 ? w[1].low : w[2].low, i == 0 ? w[0].high : i == 1 ? w[1].high : w[2].high,
                  i == 0 ? w[0].scales : i == 1 ? w[1].scales : w[2].scales, i == 0 ? w[0].d : i == 1 ? w[1].d : w[2].d,
                  w[0].n_blocks, w[0].n_segments};
  }
  __device__ __forceinline__ int within(int tile) const {
    return tile - (tile >= third ? third : tile >= second ? second : 0);
  }
};

// Multiplies the tiles of a block of threads with up to 8 rows. For every tile, all lanes of one warp call
// finish(rows, tile, sums) with its N sums of 16 x 8.
template <class Q, class W, class Finish>
__device__ __forceinline__ void rows8(const W& w, const Activations& x, const Groups& groups, int n_rows, int n_out,
                                      const Finish& finish) {
  constexpr int M = W::N;
  DYNAMIC_SHARED(float, partial);  // (2, M * n_segments, 4, 32): segments' sums of this tile and of the one before it
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_tiles = (n_out + 15) / 16;
  int n_blocks = w.w[0].n_blocks, n_segments = w.w[0].n_segments, n_items = M * n_segments;
  long long first_tile = 0;  // of the expert
  Segment<Q> now, following;
  typename Q::Words words[Q::AHEAD] = {};
  auto segment_of = [&](int item) { return M == 1 || item < n_segments ? item : item - n_segments; };
  auto begin = [&] {
    if (warp >= n_items) return;
    now.place(w.of(warp, blockIdx.x), first_tile + w.within(blockIdx.x), segment_of(warp));
#pragma unroll
    for (int j = 0; j < Q::AHEAD; j++)
      if (j < now.left) words[j] = Q::load(now.at, j);
    now.load_scales(w.of(warp, blockIdx.x), first_tile + w.within(blockIdx.x), segment_of(warp));
  };
  let_next_begin();
  if (!groups.group) begin();
  wait_for_previous();
  int x_row;
  {
    Rows rows = rows_of(groups, n_rows, 8);
    if (!rows.count) return;
    first_tile = static_cast<long long>(rows.expert) * n_tiles;
    x_row = rows.of_x(min(lane / 4, rows.count - 1));
  }
  if (groups.group) begin();
  const f16* row = columns_of(x, x_row, 0, n_blocks);
  now.columns = row + segment_of(warp) * SEGMENT * 32;
  uint4 columns[COLUMNS_AHEAD] = {};
  if (warp < n_items) {
#pragma unroll
    for (int j = 0; j < COLUMNS_AHEAD; j++)
      if (j < now.left) columns[j] = load_words<uint4>(now.columns + j * 32);
  }
  int n_done = 0;
  for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x, n_done++) {
    float* sums_of_tile = partial + n_done % 2 * n_items * 128;
    for (int item = warp; item < n_items; item += n_warps) {
      // The last segment of a tile is followed by the first one of the next tile.
      bool last = item + n_warps >= n_items;
      int next_tile = last ? tile + gridDim.x : tile, next_item = last ? warp : item + n_warps;
      following.place(w.of(next_item, next_tile), first_tile + w.within(next_tile), segment_of(next_item));
      if (next_tile >= n_tiles) following.left = 0;
      following.columns = row + segment_of(next_item) * SEGMENT * 32;
      following.load_scales(w.of(next_item, next_tile), first_tile + w.within(next_tile), segment_of(next_item));
      MmaD sums[1] = {};
      if (now.left >= SEGMENT)
        segment8<Q, true>(now, following, words, columns, sums[0]);
      else
        segment8<Q, false>(now, following, words, columns, sums[0]);
      finish_segment<Q, 1>(now.scales, x, {x_row}, segment_of(item) * SEGMENT, n_blocks, sums);
#pragma unroll
      for (int i = 0; i < 4; i++) sums_of_tile[(item * 4 + i) * 32 + lane] = sums[0].x[i];
      now = following;
    }
    __syncthreads();
    if (warp != n_done % n_warps) continue;
    MmaD total[M] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll 4
      for (int segment = 0; segment < n_segments; segment++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          total[m].x[i] =
              __fadd_rn(total[m].x[i], sums_of_tile[((m * n_segments + segment) * 4 + i) * 32 + lane]);
    }
    finish(rows_of(groups, n_rows, 8), tile, total);  // looked up again, since keeping it would take registers
  }
}

// Multiplies one tile per warp with up to 64 rows, segment after segment.
template <class Q>
__device__ __forceinline__ void rows64(const Planes& w, const Activations& x, const Groups& groups, int n_rows,
                                       const float* bias, const float* residual, float* y, int n_out) {
  Rows rows = rows_of(groups, n_rows, 64);
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
  store<8>(x, rows, out_tile, total, bias, residual, y, n_out);
}
