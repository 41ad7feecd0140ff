// Products: the code that rows64 and few_rows.cu share, and rows64. The order of additions is described in matmul.cu.
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
__device__ __forceinline__ const f16* columns_of(const Activations& x, int row, int start, int n_in) {
  return x.x + static_cast<long long>(row) * padded(n_in) + start * 32 + threadIdx.x % 4 * 8;
}

// A lane's sums of a segment's blocks, with 8 rows of activations. SCALED: those of columns 0-15 and of columns 16-31 are
// separate, so that an mma waits only for every second one before it.
template <class Q>
struct BlockSums {
  MmaD x[Q::SCALED ? 2 : 1];
};

// Adds the products of one block of 32 columns. four: the lane's columns of its row.
template <class Q>
__device__ __forceinline__ void add_block(const MmaA (&a)[2], const typename Q::Scales (&scales)[2], int j,
                                          const uint4& four, BlockSums<Q>& sums) {
  MmaB b[2] = {{{four.x, four.y}}, {{four.z, four.w}}};
  if constexpr (Q::SCALED) {
    mma_m16n8k16(sums.x[0], a[0], b[0]);
    mma_m16n8k16(sums.x[1], a[1], b[1]);
  } else {
    float* s = sums.x[0].x;
    MmaD p{};
    mma_m16n8k16(p, a[0], b[0]);
    if (Q::SPLIT) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[i] = __fmaf_rn(Q::factor(scales[i / 2], j, 0), p.x[i], s[i]);
      p = MmaD{};
    }
    mma_m16n8k16(p, a[1], b[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = __fmaf_rn(Q::factor(scales[i / 2], j, 1), p.x[i], s[i]);
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

__device__ __forceinline__ long long place_of(const Rows& rows, int number, int out, int n_out) {
  return static_cast<long long>(rows.of_y(number)) * n_out + out;
}
// HAS_MINIMUM: the minimums' part of a lane's sums of a segment. of_blocks: the segment's block sums in its row.
template <class Q>
__device__ __forceinline__ MmaD minimums_part(const typename Q::Scales (&scales)[2], const unsigned* of_blocks) {
  MmaD part{};
  if constexpr (Q::HAS_MINIMUM) {
    int c = threadIdx.x % 4;
    f16x2 of_row[2][2];
    Q::minimum_operand(scales[0], c, of_row[0]);
    Q::minimum_operand(scales[1], c, of_row[1]);
    MmaA a = {{of_row[0][0], of_row[1][0], of_row[0][1], of_row[1][1]}};
    MmaB b = {{of_blocks[c], of_blocks[c + 4]}};
    mma_m16n8k16(part, a, b);
#pragma unroll
    for (int i = 0; i < 4; i++) part.x[i] = __fmul_rn(Q::minimum_whole(scales[i / 2]), part.x[i]);
  }
  return part;
}

// A lane's sum number i of a whole segment.
template <class Q>
__device__ __forceinline__ float segment_sum(const typename Q::Scales (&scales)[2], const BlockSums<Q>& sums,
                                             const MmaD& part, int i) {
  float s = sums.x[0].x[i];
  if constexpr (Q::SCALED) s = __fadd_rn(s, sums.x[1].x[i]);
  if constexpr (Q::WHOLE) {
    float whole = Q::whole(scales[i / 2]);
    return Q::HAS_MINIMUM ? __fmaf_rn(whole, s, part.x[i]) : __fmul_rn(whole, s);
  }
  return s;
}

// Stores a lane's sums.
template <int N>
__device__ __forceinline__ void store(const Activations& x, const Rows& rows, int tile, const MmaD (&total)[N],
                                      const float* bias, const float* residual, float* y, int n_out) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int number = 8 * n + 2 * c + i % 2, out = tile * 16 + r + 8 * (i / 2);
      if (number >= rows.count || out >= n_out) continue;
      float value = __fmul_rn(total[n].x[i], x.scale[rows.of_x(number)]);
      if (bias) value = __fadd_rn(value, bias[static_cast<long long>(rows.expert) * n_out + out]);
      long long at = place_of(rows, number, out, n_out);
      y[at] = residual ? __fadd_rn(value, residual[at]) : value;
    }
}

// Multiplies one tile per warp with up to 64 rows, segment after segment.
template <class Q>
__device__ __forceinline__ void rows64(const Tiles& w, const Activations& x, const Groups& groups, int n_rows,
                                       const float* bias, const float* residual, float* y, int n_out,
                                       int n_in) {
  Rows rows = rows_of(groups, n_rows, 64);
  int lane = threadIdx.x % 32, r = lane / 4, n_tiles = (n_out + 15) / 16;
  int out_tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (out_tile >= n_tiles || !rows.count) return;
  long long tile = static_cast<long long>(rows.expert) * n_tiles + out_tile;
  int row[8];
  const f16* columns[8];
#pragma unroll
  for (int n = 0; n < 8; n++) {
    row[n] = rows.of_x(min(8 * n + r, rows.count - 1));
    columns[n] = columns_of(x, row[n], 0, n_in);
  }
  MmaD total[8] = {};
  for (int segment = 0; segment < w.n_segments(); segment++) {
    int start = segment * SEGMENT, end = min(SEGMENT, w.n_blocks - start);
    Planes planes = planes_of<Q>(w, tile, segment);
    typename Q::Scales scales[2] = {Q::template scales<InGlobal>(planes, r), Q::template scales<InGlobal>(planes, r + 8)};
    Lanes at = lane_of<Q>(planes, 0, lane);
    BlockSums<Q> sums[8] = {};
#pragma unroll 1
    for (int half = 0; half < end; half += SEGMENT / 2) {
#pragma unroll
      for (int j = 0; j < SEGMENT / 2; j++) {
        if (half + j >= end) break;
        MmaA a[2];
        block_operands<Q>(Q::template load<InGlobal>(at, j), scales, j, a);
#pragma unroll
        for (int n = 0; n < 8; n++) add_block<Q>(a, scales, j, load_words<uint4>(columns[n] + j * 32), sums[n]);
      }
      at = {at.low + SEGMENT / 2 * 32 * Q::LOW, at.high + SEGMENT / 2 * 32 * Q::HIGH};
#pragma unroll
      for (int n = 0; n < 8; n++) columns[n] += SEGMENT / 2 * 32;
#pragma unroll
      for (int i = 0; i < 2; i++) Q::second_half(scales[i]);
    }
    // Minimums are read once more, since keeping them would take registers.
#pragma unroll
    for (int i = 0; i < 2; i++)
      if constexpr (Q::HAS_MINIMUM) scales[i] = Q::template scales<InGlobal>(planes, r + 8 * i);
#pragma unroll
    for (int n = 0; n < 8; n++) {
      MmaD part = minimums_part<Q>(scales, x.sums + static_cast<long long>(row[n]) * (padded(n_in) / 32) + start);
#pragma unroll
      for (int i = 0; i < 4; i++) total[n].x[i] = __fadd_rn(total[n].x[i], segment_sum<Q>(scales, sums[n], part, i));
    }
  }
  store<8>(x, rows, out_tile, total, bias, residual, y, n_out);
}
