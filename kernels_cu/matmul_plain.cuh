// The computation of matmul.cu, few_rows.cu and one_row.cu for one output and one row, as a plain loop. Read this file first.
//
// The kernels add the same numbers, those that are not integers in the same order, but divide the work among lanes, warps and
// blocks. No kernel includes this file: tests/kernels/test_matmul.py compares its bits with theirs. Include arguments.cuh,
// quants.cuh, matmul.cuh and quantize_rows.cuh before it.

// The sum over all columns, before the bias and the residual. x: see Activations.
template <class Q>
__device__ float plain_sum(const Tiles& w, const Activations& x, int row, int out) {
  int tile = out / 16, of_tile = out % 16, r = of_tile % 8, i = of_tile / 8;
  float total = 0.0f;
  for (int segment = 0; segment < w.n_segments(); segment++) {
    int n_pairs = w.n_pairs(segment);
    long long at = static_cast<long long>(row) * w.n_segments() + segment;
    const uint8_t* bytes = x.x + at * ROW_BYTES;
    const int* sums = x.sums + at * ROW_SUMS;
    Planes planes = planes_of<Q>(w, tile, segment);
    // Of one half of a block: Σ code · h, Σ code · l, and Σ (256 h + l).
    auto half_sums = [&](int block, int half, int& of_row) {
      Bytes of{};
      of_row = sums[block * 2 + half];
      for (int c = 0; c < 4; c++) {
        Codes codes = Q::template codes<InGlobal>(lane_of<Q>(planes, 4 * r + c), block % n_pairs);
        for (int column = 0; column < 4; column++) {  // column 16 half + 4 c + column of the block
          int byte = byte_of(codes.x[block / n_pairs].x[2 * half + i], column);
          int code = Q::SIGNED ? static_cast<int8_t>(byte) : byte;
          const uint8_t* of_column = bytes + block * 64 + c * 16 + half * 4 + column;
          of.h += code * static_cast<int8_t>(of_column[0]), of.l += code * static_cast<int8_t>(of_column[8]);
        }
      }
      return of;
    };
    float sum = 0.0f;
    if constexpr (Q::INTEGER) {
      Bytes all{};
      int subtracted = 0;
      for (int block = 0; block < 2 * n_pairs; block++)
        for (int half = 0; half < 2; half++) {
          int j = block % n_pairs, k = block / n_pairs, of_row;
          auto scales = Q::template scales<InGlobal>(planes, lane_of_scales<Q>(r, j, half));
          int scale = Q::integer(scales, i, number_of_scale<Q>(j, k));
          Bytes of = half_sums(block, half, of_row);
          all.h += of.h * scale, all.l += of.l * scale;
          if constexpr (Q::HAS_MINIMUM)
            subtracted += Q::integer_minimum(scales, i, k) * of_row;
          else
            subtracted += scale * of_row;
        }
      sum = integer_sum<Q>(Q::template whole<InGlobal>(planes, r), i, all.h, all.l, subtracted);
    } else {
      float of_pair[MOST_PAIRS] = {};
      for (int j = 0; j < n_pairs; j++)
        for (int k = 0; k < 2; k++) {
          int block = j + k * n_pairs, of_row[2];
          Bytes first = half_sums(block, 0, of_row[0]), second = half_sums(block, 1, of_row[1]);
          auto scales = Q::template scales<InGlobal>(planes, 4 * r + j);
          of_pair[j] = block_sum<Q>(scales, i, k, {first.h + second.h, first.l + second.l}, of_row[0] + of_row[1], of_pair[j]);
        }
      sum = ((of_pair[0] + of_pair[1]) + (of_pair[2] + of_pair[3])) * Q::UNIT;
    }
    total = __fadd_rn(total, __fmul_rn(sum, x.scale[at]));
  }
  return total;
}
