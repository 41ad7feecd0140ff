// Products: what one_row.cu, few_rows.cu and matmul.cu share, and the sums of one row and of four. The order of additions is described in matmul.cu.
//
// A warp multiplies a pair of blocks of W, each 16 outputs x 32 columns, with activations of two signed bytes, 256 h + l, in
// mma.sync.m16n8k32. Its eight columns of activations are h and l of four rows. Each of the 32 lanes has a part of every operand.
// The numbers below are lanes; lane = 4 r + c, with r from 0 to 7 and c from 0 to 3.
//
//   W (operand a)                  columns                               x (operand b)           columns
//               0-3  4-7  8-11 12-15 | 16-19 20-23 24-27 28-31                   0-3  4-7  8-11 12-15 | 16-19 … 28-31
//   output  0    0    1    2    3    |   0     1     2     3          row 0  h    0    1    2    3    |   0   …   3
//           1    4    5    6    7    |   4     5     6     7                 l    4    5    6    7    |   4   …   7
//           …                        |                                row 1  h    8    9   10   11    |   8   …  11
//           7   28   29   30   31    |  28    29    30    31                 l   12   13   14   15    |  12   …  15
//           8    0    1    2    3    |   0     1     2     3             …                            |
//           …                        |                                row 3  l   28   29   30   31    |  28   …  31
//          15   28   29   30   31    |  28    29    30    31
//
//   a lane holds 4 + 4 columns of outputs r and r + 8            a lane holds 4 + 4 columns of a byte of row r / 2
//
//   sums (operand d)   row      0     | 1     | 2     | 3
//                      byte     h  l  | h  l  | h  l  | h  l
//               output  0       0  0  | 1  1  | 2  2  | 3  3          a lane holds the sums of outputs r and r + 8 for row c:
//                       …             |       |       |                 d[0] (r, h)      d[1] (r, l)
//                       7      28 28  |29 29  |30 30  |31 31            d[2] (r + 8, h)  d[3] (r + 8, l)
//                       8       0  0  | 1  1  | 2  2  | 3  3
//                       …             |       |       |
//
// If there is only one row (one_row.cu), the columns of the mma are h and l of four blocks instead, each in the mma of this block
// and zero in the others. So a lane has the sums of block c, and its scales are multiplied once for four blocks.
//
// Integers make all that exact, and where sums of blocks become floats, the order is the same everywhere.
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

__device__ __forceinline__ long long place_of(const Rows& rows, int number, int out, int n_out) {
  return static_cast<long long>(rows.of_y(number)) * n_out + out;
}

// Σ over the columns of a pair's blocks, of codes times h and codes times l: for one output and one row.
struct Bytes {
  int h, l;
};

// The sum of a segment of integers, from Σ code · h · scale, Σ code · l · scale, and Σ of sums of activations times minimums or,
// if codes have an offset, times scales; all of them are exact.
template <class Q>
__device__ __forceinline__ float integer_sum(const typename Q::Whole& whole, int i, int h, int l, int subtracted) {
  if constexpr (Q::HAS_MINIMUM)
    return __fmaf_rn(Q::d(whole, i), __fmaf_rn(256.0f, static_cast<float>(h), static_cast<float>(l)),
                     -__fmul_rn(Q::dmin(whole, i), static_cast<float>(subtracted)));
  // OFFSET · subtracted is taken from 256 h + l: its multiple of 256 from h, the rest from l.
  static_assert(Q::HAS_MINIMUM || Q::OFFSET == 32, "8 · 32 is 256");
  h -= subtracted >> 3, l -= 32 * (subtracted & 7);
  return __fmul_rn(Q::d(whole, i), __fmaf_rn(256.0f, static_cast<float>(h), static_cast<float>(l)));
}

// Adds block k of a pair, of which `of` are the sums and `of_row` the sum of its activations, to the sum of the pair.
template <class Q, int OFFSET = Q::OFFSET>
__device__ __forceinline__ float block_sum(const typename Q::Scales& scales, int i, int k, const Bytes& of, int of_row, float sum) {
  float products = static_cast<float>(of.h * 256 + of.l - OFFSET * of_row), factor = Q::factor(scales, i, k);
  sum = k ? __fmaf_rn(factor, products, sum) : __fmul_rn(factor, products);
  return Q::HAS_MINIMUM ? __fmaf_rn(Q::minimum(scales, i, k), static_cast<float>(of_row), sum) : sum;
}
__device__ __forceinline__ int whole_block(const int2& halves) { return halves.x + halves.y; }

// The sum of a segment for one row and, in lanes of even c, output r, of odd c, output r + 8. columns, sums: of the row's segment.
template <class Q, class M>
__device__ __forceinline__ float one_row_sum(const Planes& w, int n_pairs, const uint8_t* columns, const int* sums) {
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, own = r / 2;  // own: number of the columns of the mma
  constexpr int CHAINS = Q::HALVES ? 2 : 1;  // of mma, for each block of a pair
  MmaInts d[2][CHAINS] = {};
  columns += c * 16 + r % 2 * 8;
  uint2 b[2][CHAINS];
#pragma unroll
  for (int k = 0; k < 2; k++)
#pragma unroll
    for (int u = 0; u < CHAINS; u++) {
      if constexpr (Q::HALVES) {  // columns of half own % 2 of every second pair; zeros for the other half
        uint32_t word = load_near<uint32_t>(columns + (2 * u + own / 2 + k * n_pairs) * 64 + own % 2 * 4);
        b[k][u] = own % 2 ? make_uint2(0, word) : make_uint2(word, 0);
      } else {
        b[k][u] = load_near<uint2>(columns + (own + k * n_pairs) * 64);
      }
    }
  Lanes at = lane_of<Q>(w, lane);
  constexpr bool SPLIT = Q::SPLIT;
  constexpr int OFFSET = SPLIT ? 0 : Q::OFFSET;
  MmaInts negative[2] = {};
  uint32_t table = SPLIT ? in_register(0x03020100u) : 0;
#pragma unroll
  for (int j = 0; j < MOST_PAIRS; j++) {  // codes of pairs that do not exist are anything; scales are zero
    bool is_own = Q::HALVES ? own / 2 == j % 2 : own == j;
    if constexpr (SPLIT) {
      SignedCodes codes = Q::signed_codes(at, j, table);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint32_t x = is_own ? b[k][0].x : 0, y = is_own ? b[k][0].y : 0;
        mma_codes<false>(d[k][0], codes.positive.x[k], x, y);
        mma_codes<false>(negative[k], codes.negative.x[k], x, y);
      }
    } else {
      Codes codes = Q::template codes<M, false>(at, j);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const uint2& four = b[k][Q::HALVES ? j / 2 : 0];
        mma_codes<Q::SIGNED>(d[k][Q::HALVES ? j / 2 : 0], codes.x[k], is_own ? four.x : 0, is_own ? four.y : 0);
      }
    }
  }
  if constexpr (SPLIT)
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int v = 0; v < 4; v++) d[k][0].x[v] -= negative[k].x[v];
  auto scales = Q::template scales<M>(w, lane);
  auto bytes = [&](int k, int u, int i) {
    const int* of = d[k][u].x + 2 * i;
    return Bytes{k ? of[0] >> Q::SHIFT : of[0], k ? of[1] >> Q::SHIFT : of[1]};
  };
  if constexpr (Q::INTEGER) {
    int h[2] = {}, l[2] = {}, subtracted[2] = {};
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int u = 0; u < CHAINS; u++) {
        int of_row;
        if constexpr (Q::HALVES)
          of_row = load_near<int>(sums + (2 * u + c / 2 + k * n_pairs) * 2 + c % 2);
        else
          of_row = whole_block(load_near<int2>(sums + (c + k * n_pairs) * 2));
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int scale = Q::integer(scales, i, 2 * u + k);
          Bytes of = bytes(k, u, i);
          h[i] += of.h * scale, l[i] += of.l * scale;
          if constexpr (Q::HAS_MINIMUM)
            subtracted[i] += Q::integer_minimum(scales, i, k) * of_row;
          else
            subtracted[i] += scale * of_row;
        }
      }
    int odd = c % 2;
    auto over_lanes = [&](const int (&of)[2]) {
      int sum = (odd ? of[1] : of[0]) + __shfl_xor_sync(ALL_LANES, odd ? of[0] : of[1], 1);
      return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
    };
    int sum_h = over_lanes(h), sum_l = over_lanes(l), sum_subtracted = over_lanes(subtracted);
    return integer_sum<Q>(Q::template whole<M>(w, r), odd, sum_h, sum_l, sum_subtracted);
  } else {
    float of[2] = {};
    bool exists = c < n_pairs;
    int of_row[2];
#pragma unroll
    for (int k = 0; k < 2; k++)
      of_row[k] = exists && (OFFSET || Q::HAS_MINIMUM) ? whole_block(load_near<int2>(sums + (c + k * n_pairs) * 2)) : 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int k = 0; k < 2; k++) of[i] = block_sum<Q, OFFSET>(scales, i, k, bytes(k, 0, i), of_row[k], of[i]);
    int odd = c % 2;
    float sum = (odd ? of[1] : of[0]) + __shfl_xor_sync(ALL_LANES, odd ? of[0] : of[1], 1);
    return (sum + __shfl_xor_sync(ALL_LANES, sum, 2)) * Q::UNIT;
  }
}

// The sums of a segment for four rows: total[i] of row c and output r + 8 i. columns, of the lane's byte of row r / 2, and sums, of
// row c, begin with the segment.
template <class Q>
__device__ __forceinline__ void four_row_sums(const Planes& w, int n_pairs, const uint8_t* columns, const int* sums,
                                              float (&total)[2]) {
  int lane = threadIdx.x % 32, r = lane / 4;
  constexpr bool OF_ROW = Q::OFFSET != 0 || Q::HAS_MINIMUM;
  constexpr int PARTS = Q::HALVES ? 2 : 1;
  Lanes at = lane_of<Q>(w, lane);
  int h[2] = {}, l[2] = {}, subtracted[2] = {};  // INTEGER
  float of_pairs[MOST_PAIRS][2] = {};            // others
#pragma unroll
  for (int j = 0; j < MOST_PAIRS; j++) {
    if (j >= n_pairs) break;
    Codes codes = Q::template codes<InShared>(at, j);
    typename Q::Scales scales[PARTS];
#pragma unroll
    for (int half = 0; half < PARTS; half++)
      scales[half] = Q::template scales<InShared>(w, lane_of_scales<Q>(r, j, half));
#pragma unroll
    for (int k = 0; k < 2; k++) {
      int block = j + k * n_pairs;
      uint2 four = load_near<uint2>(columns + block * 64);
      int2 of_halves = OF_ROW ? load_near<int2>(sums + block * 2) : int2{};
      MmaInts d[PARTS] = {};
      if constexpr (Q::HALVES) {
        mma_half_codes<Q::SIGNED>(d[0], codes.x[k], 0, four.x);
        mma_half_codes<Q::SIGNED>(d[PARTS - 1], codes.x[k], 1, four.y);
      } else {
        mma_codes<Q::SIGNED>(d[0], codes.x[k], four.x, four.y);
      }
#pragma unroll
      for (int half = 0; half < PARTS; half++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          Bytes of{d[half].x[2 * i], d[half].x[2 * i + 1]};
          if constexpr (Q::INTEGER) {
            int scale = Q::integer(scales[half], i, number_of_scale<Q>(j, k));
            h[i] += of.h * scale, l[i] += of.l * scale;
            if constexpr (Q::HAS_MINIMUM)
              subtracted[i] += Q::integer_minimum(scales[half], i, k) * whole_block(of_halves);
            else
              subtracted[i] += scale * (half ? of_halves.y : of_halves.x);
          } else {
            of_pairs[j][i] = block_sum<Q>(scales[half], i, k, of, whole_block(of_halves), of_pairs[j][i]);
          }
        }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
    if constexpr (Q::INTEGER)
      total[i] = integer_sum<Q>(Q::template whole<InShared>(w, r), i, h[i], l[i], subtracted[i]);
    else
      total[i] = ((of_pairs[0][i] + of_pairs[1][i]) + (of_pairs[2][i] + of_pairs[3][i])) * Q::UNIT;
}

// The sums of a segment of half-precision weights for 8 rows of halves: rows 2c and 2c + 1 of outputs r and r + 8, as MmaD. columns:
// the lane's of row r.
template <class M>
__device__ __forceinline__ MmaD half_sums(const uint8_t* w, int n_pairs, const uint8_t* columns) {
  MmaD sums[2] = {};  // of columns 0-15 and of columns 16-31 of all blocks
  const uint8_t* at = w + threadIdx.x % 32 * 32;
#pragma unroll
  for (int block = 0; block < SEGMENT; block++) {
    if (block >= 2 * n_pairs) break;
    uint4 upper = M::template load<uint4>(at + block * 1024), lower = M::template load<uint4>(at + block * 1024 + 16);
    uint4 four = load_near<uint4>(columns + block * 64);
    mma_m16n8k16(sums[0], {{upper.x, lower.x, upper.y, lower.y}}, {{four.x, four.y}});
    mma_m16n8k16(sums[1], {{upper.z, lower.z, upper.w, lower.w}}, {{four.z, four.w}});
  }
#pragma unroll
  for (int i = 0; i < 4; i++) sums[0].x[i] = __fadd_rn(sums[0].x[i], sums[1].x[i]);
  return sums[0];
}
