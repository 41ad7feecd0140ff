// The sums of a segment for groups of eight rows, whose weights are in shared memory. Include matmul.cuh before it.
//
// The sums are those of matmul.cuh, bit for bit. The eight columns of an mma are one byte of eight
// rows: an mma for h and another one for l of the same rows, so that a lane reads both bytes of a row at once:
//
//   sums (operand d)   row     0  1 | 2  3 | 4  5 | 6  7     a lane holds the sums of outputs r and r + 8
//               output  0      0  0 | 1  1 | 2  2 | 3  3     for rows 2 c and 2 c + 1: d[2 i + k] is of
//                       1      4  4 | 5  5 | 6  6 | 7  7     output r + 8 i and row 2 c + k
//                       …
//
//   INTEGER types   Σ code · h · scale and Σ code · l · scale of a segment take a multiply-add for each sum. What is subtracted, Σ of
//                   sums of activations times minimums (or scales), is exact in any order, so three mma.sync.m16n8k16 compute it
//                   for a whole segment, with sums of activations as three signed bytes.
//   other types     Codes are signed: the offset is subtracted from them, so that sums of activations are not needed. An mma adds
//                   to integers that are, as floats, 1.5 · 2^23. So a multiply-add, which is exact, and an addition make the float
//                   next to 256 h + l, instead of a shift, an addition and a conversion.

constexpr int FROM = 0x4b400000;  // the bits of 1.5 · 2^23, whose last bit counts one

// The float next to 256 h + l, from FROM + h and FROM + l, where h and l are below 2^22.
__device__ __forceinline__ float from_bytes(int high, int low) {
  constexpr float MIDDLE = 12582912.0f;  // 1.5 · 2^23
  return __fadd_rn(__fmaf_rn(256.0f, __int_as_float(high), -257.0f * MIDDLE), __int_as_float(low));  // (256 h - MIDDLE) + (MIDDLE + l)
}

// The codes minus their offset, as signed bytes.
template <class Q>
__device__ __forceinline__ MmaCodes without_offset(const MmaCodes& codes) {
  MmaCodes to = codes;
  if constexpr (Q::OFFSET != 0)
#pragma unroll
    for (int i = 0; i < 4; i++) to.x[i] = (codes.x[i] + (128 - Q::OFFSET) * 0x01010101u) ^ 0x80808080u;
  return to;
}

// Σ of a segment's sums of activations times minimums or scales, in the order of an mma's sums. bytes: the lane's minimums or scales
// of both outputs, for four columns of an mma; sums_of(n): the sums of row r that belong to column n.
template <class Q, class SumsOf>
__device__ __forceinline__ void subtracted_sums(const uint2& bytes, const SumsOf& sums_of, int (&subtracted)[4]) {
  uint32_t of[4], plane[3];  // a sum is 65536 d2 + 256 d1 + d0, each a signed byte
#pragma unroll
  for (int n = 0; n < (Q::HALVES ? 4 : 2); n++) of[n] = static_cast<uint32_t>(sums_of(n) + 0x8080);  // d1 + 128, d0 + 128
  if constexpr (Q::HALVES) {
    uint32_t first = __byte_perm(of[0], of[1], 0x5140), second = __byte_perm(of[2], of[3], 0x5140);
    plane[0] = __byte_perm(first, second, 0x5410), plane[1] = __byte_perm(first, second, 0x7632);
    plane[2] = __byte_perm(__byte_perm(of[0], of[1], 0x0062), __byte_perm(of[2], of[3], 0x0062), 0x5410);
  } else {
#pragma unroll
    for (int d = 0; d < 3; d++) plane[d] = __byte_perm(of[0], of[1], 0x0040 + 0x0011 * d);
  }
  MmaInts sums[3] = {};
#pragma unroll
  for (int d = 0; d < 3; d++)  // scales of halves are signed, minimums are not
    mma_half_codes<Q::HALVES>(sums[d], {{bytes.x, bytes.y, 0, 0}}, 0, d == 2 ? plane[d] : plane[d] ^ 0x80808080u);
#pragma unroll
  for (int v = 0; v < 4; v++) subtracted[v] = (sums[2].x[v] * 256 + sums[1].x[v]) * 256 + sums[0].x[v];
}

// Calls take(g, sums) with the sums of a segment for G groups of eight rows, in the order of an mma's sums. lane: 4 r + c. The
// activations of group g: columns(g), those of lane c of row r; sums(g), the sums of row r; own_sums(g, i), those of row 2 c + i.
// UNROLLED: pairs of blocks, of INTEGER types.
template <class Q, int G, int UNROLLED, class Columns, class Sums, class OwnSums, class Take>
__device__ __forceinline__ void eight_row_sums(const Planes& w, int n_pairs, unsigned lane, const Columns& columns, const Sums& sums_of_row,
                                               const OwnSums& own_sums, const Take& take) {
  unsigned r = lane / 4, c = lane % 4;
  Lanes at = lane_of<Q>(w, lane);
  auto columns_of = [&](int g, int block) { return load_near<uint4>(columns(g) + block * 64); };
  if constexpr (Q::INTEGER) {
    constexpr int PARTS = Q::HALVES ? 2 : 1;
    int h[G][4] = {}, l[G][4] = {};
#pragma unroll(UNROLLED)
    for (int j = 0; j < MOST_PAIRS; j++) {
      Codes codes = Q::template codes<InShared>(at, j);
      typename Q::Scales scales[PARTS];
#pragma unroll
      for (int half = 0; half < PARTS; half++)
        scales[half] = Q::template scales<InShared>(w, lane_of_scales<Q>(r, j, half));
#pragma unroll
      for (int k = 0; k < 2; k++) {
        int scale[PARTS][2];
#pragma unroll
        for (int half = 0; half < PARTS; half++)
#pragma unroll
          for (int i = 0; i < 2; i++) scale[half][i] = Q::integer(scales[half], i, number_of_scale<Q>(j, k));
#pragma unroll
        for (int g = 0; g < G; g++) {
          uint4 four = columns_of(g, j + k * MOST_PAIRS);
#pragma unroll
          for (int half = 0; half < PARTS; half++) {
            MmaInts high{}, low{};
            if constexpr (Q::HALVES) {
              mma_half_codes<Q::SIGNED>(high, codes.x[k], half, half ? four.y : four.x);
              mma_half_codes<Q::SIGNED>(low, codes.x[k], half, half ? four.w : four.z);
            } else {
              mma_codes<Q::SIGNED>(high, codes.x[k], four.x, four.y);
              mma_codes<Q::SIGNED>(low, codes.x[k], four.z, four.w);
            }
#pragma unroll
            for (int v = 0; v < 4; v++) h[g][v] += high.x[v] * scale[half][v / 2], l[g][v] += low.x[v] * scale[half][v / 2];
          }
        }
      }
    }
    auto whole = Q::template whole<InShared>(w, r);
    auto scales = Q::template scales<InShared>(w, lane);
    uint2 bytes = Q::HALVES ? uint2{scales.x, scales.y} : uint2{scales.x >> 16, scales.y >> 16};
#pragma unroll
    for (int g = 0; g < G; g++) {
      const int* sums = sums_of_row(g);
      int subtracted[4];
      if constexpr (Q::HALVES)  // column 4 c + n: half c % 2 of block 2 (n / 2) + c / 2 of the pairs' first or second blocks
        subtracted_sums<Q>(bytes, [&](int n) { return load_near<int>(sums + c + n / 2 * 4 + n % 2 * 8); }, subtracted);
      else  // columns 4 c and 4 c + 1: blocks c and c + 4
        subtracted_sums<Q>(bytes, [&](int n) { return whole_block(load_near<int2>(sums + c * 2 + n * 8)); }, subtracted);
      float total[4];
#pragma unroll
      for (int v = 0; v < 4; v++) total[v] = integer_sum<Q>(whole, v / 2, h[g][v], l[g][v], subtracted[v]);
      take(g, total);
    }
  } else {
    float sums[2][G][4] = {};  // of pairs 0 and 1, and of 2 and 3
#pragma unroll
    for (int j = 0; j < MOST_PAIRS; j++) {
      if (j >= n_pairs) break;
      Codes codes = Q::template codes<InShared>(at, j);
      typename Q::Scales scales = Q::template scales<InShared>(w, 4 * r + j);
      MmaCodes signed_codes[2] = {without_offset<Q>(codes.x[0]), without_offset<Q>(codes.x[1])};
      float factor[2][2], minimum[2][2];
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) factor[k][i] = Q::factor(scales, i, k), minimum[k][i] = Q::minimum(scales, i, k);
#pragma unroll
      for (int g = 0; g < G; g++) {
        float of_pair[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int block = j + k * n_pairs;
          uint4 four = columns_of(g, block);
          MmaInts high{{FROM, FROM, FROM, FROM}}, low = high;
          mma_codes<true>(high, signed_codes[k], four.x, four.y);
          mma_codes<true>(low, signed_codes[k], four.z, four.w);
          float of_row[2] = {};
          if constexpr (Q::HAS_MINIMUM) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              of_row[i] = static_cast<float>(whole_block(load_near<int2>(own_sums(g, i) + block * 2)));
            }
          }
#pragma unroll
          for (int v = 0; v < 4; v++) {
            float products = from_bytes(high.x[v], low.x[v]);
            of_pair[v] = k ? __fmaf_rn(factor[k][v / 2], products, of_pair[v]) : __fmul_rn(factor[k][v / 2], products);
            if constexpr (Q::HAS_MINIMUM) of_pair[v] = __fmaf_rn(minimum[k][v / 2], of_row[v % 2], of_pair[v]);
          }
        }
#pragma unroll
        for (int v = 0; v < 4; v++) {
          float& sum = sums[j / 2][g][v];
          sum = j % 2 ? sum + of_pair[v] : of_pair[v];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float total[4];
#pragma unroll
      for (int v = 0; v < 4; v++) total[v] = (sums[0][g][v] + sums[1][g][v]) * Q::UNIT;
      take(g, total);
    }
  }
}
