// The computation of matmul.cu and few_rows.cu for one output and one row, as a plain loop. Read this file first.
//
// The kernels add the same numbers in the same order, but divide the work among lanes, warps and blocks. No kernel
// includes this file: tests/kernels/test_matmul.py compares its bits with theirs in the build for the CPU, where an mma
// rounds only once, at its end. Include arguments.cuh, quants.cuh and matmul.cuh before it.

// The sum over all columns, before the row's scale, the bias and the residual. x: see Activations.
template <class Q>
__device__ float plain_sum(const Tiles& w, const Activations& x, int row, int out) {
  int tile = out / 16, of_tile = out % 16, r = of_tile % 8, lower = of_tile / 8;
  float total = 0.0f;
  for (int segment = 0; segment < w.n_segments(); segment++) {
    int first = segment * SEGMENT, count = min(SEGMENT, w.n_blocks - first);
    Planes planes = planes_of<Q>(w, tile, segment);
    typename Q::Scales scale = Q::template scales<InGlobal>(planes, of_tile);
    typename Q::Scales scales[2] = {scale, scale};
    float sums[2] = {};  // of the segment; SCALED: of the two halves of its blocks
    for (int j = 0; j < count; j++) {
      const f16* columns = x.x + static_cast<long long>(row) * padded(32 * w.n_blocks) + (first + j) * 32;
      float products = 0.0f;  // of the block, or of half of it, if its scale is not part of the operand
      for (int half = 0; half < 2; half++) {
        double exact = Q::SCALED ? sums[half] : products;  // an mma rounds once here; on a GPU slightly differently
        for (int k = 0; k < 16; k++) {
          int c = k % 8 / 2, i = k % 2, second = k / 8;  // column 16 half + 4c + 2 second + i of the block
          typename Q::Words words = Q::template load<InGlobal>(lane_of<Q>(planes, j, 4 * r + c), 0);
          MmaA a[2];
          block_operands<Q>(words, scales, j, a);
          f16 weight = static_cast<f16>(a[half].x[2 * second + lower] >> 16 * i);
          f16 value = columns[8 * c + 4 * half + 2 * second + i];
          exact += static_cast<double>(f16_to_f32(weight)) * f16_to_f32(value);
        }
        (Q::SCALED ? sums[half] : products) = static_cast<float>(exact);
        if constexpr (!Q::SCALED)
          if (half == 1 || Q::SPLIT) {
            sums[0] = __fmaf_rn(Q::factor(scale, j, half), products, sums[0]);
            products = 0.0f;
          }
      }
    }
    float part = 0.0f;  // of the minimums
    if constexpr (Q::HAS_MINIMUM) {
      double exact = 0.0;  // Σ over blocks of the minimum times 1/32 of the block's sum of activations
      for (int second = 0; second < 2; second++)
        for (int c = 0; c < 4; c++) {
          int j = 4 * second + c;
          if (j >= count) continue;
          f16x2 minimums[2];  // of blocks c and c + 4, twice each
          Q::minimum_operand(scale, c, minimums);
          f16x2 parts = x.sums[static_cast<long long>(row) * (padded(32 * w.n_blocks) / 32) + first + j];
          for (int i = 0; i < 2; i++)
            exact += static_cast<double>(f16_to_f32(static_cast<f16>(minimums[second] >> 16 * i))) *
                     f16_to_f32(static_cast<f16>(parts >> 16 * i));
        }
      part = __fmul_rn(Q::minimum_whole(scale), static_cast<float>(exact));
    }
    float sum = Q::SCALED ? __fadd_rn(sums[0], sums[1]) : sums[0];
    if constexpr (Q::WHOLE) sum = Q::HAS_MINIMUM ? __fmaf_rn(Q::whole(scale), sum, part) : __fmul_rn(Q::whole(scale), sum);
    total = __fadd_rn(total, sum);
  }
  return total;
}
