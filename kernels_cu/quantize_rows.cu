// Converts activation rows to the form that products read: halves with an exact power of two per row, and sums of 32.
//
//   e = the exponent for which max |x[t]| · 2^-e is in [2^14, 2^15), at least -126; out = half(x · 2^-e) in the order of
//   layout.activation_order; scale[t] = 2^e; sums[t, b] = 1/32 of the sum of block b's 32 halves, as two halves whose sum
//   it is up to 2^-22
// So rows of 1e6 do not overflow and rows of 1e-6 do not vanish: elements above 2^-28 of the row's largest keep all 11
// bits. A row with NaN or infinity has e = 0, and they are copied unchanged. A row of zeros has e = 0.
//
// Array code: refengine.cuda.reference.quantize_rows. x (n_rows, n_in) float32; out (n_rows, padded) halves;
// scale (n_rows,); sums (n_rows, padded / 32) pairs of halves; padded: n_in rounded up to 256, with zeros.
// Grid: x rows; block: any number of warps. May be launched to overlap
// with the previous kernel. Block sums use the tree of warp_sum; the order of a maximum does not matter. Reads x twice
// (once from cache), writes 2 bytes per element.
#include "quantize_rows.cuh"

extern "C" __global__ void quantize_rows_f16(const float* x, f16* out, float* scale, unsigned* sums, int n_in) {
  __shared__ unsigned tops[32];
  let_next_begin();
  wait_for_previous();
  row_as_halves(x + static_cast<long long>(blockIdx.x) * n_in, blockIdx.x, out, scale, sums, n_in, tops);
}
