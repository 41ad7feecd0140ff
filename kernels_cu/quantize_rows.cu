// Converts rows of activations to the form that products read: integers of 16 bits with an exact power of two for every
// segment of 256 columns, as two signed bytes; or halves.
//
//   integers   q = round(x / 2^e) = 256 h + l, for the least e ≥ -126 for which every |q| ≤ 32,639; out has for each block of
//              32 columns, in lanes 4 r + c of four lanes c: h of columns 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3, then l of them.
//              sums[t, b]: Σ q over 16 columns
//   halves     half(x / 2^e), the largest in [2^14, 2^15), for half-precision weights; in the same order of columns
//   scale[t, s] = 2^e of the segment
// So rows of 1e6 do not overflow and rows of 1e-6 do not vanish, and what is far from the largest element of a row keeps its
// precision. A segment with NaN or infinity has the scale NaN (halves: e = 0, and they are copied). Integers' products
// with integers are exact, so that the order in which tensor cores add them does not matter.
//
// If there is a norm, (n_in,) float32, an RMS norm with these weights comes first, with the bits of rms_norm_rows (norm.cu); it
// takes the rows' sums of squares from `squares` (n_rows, n_in / 16) float32 (norm.cuh).
//
// Array code: refengine.ops.integers and refengine.ops.halves. x (n_rows, n_in) float32; out (n_rows, n_segments, 512) bytes;
// sums (n_rows, n_segments, 16) int32; scale (n_rows, n_segments) float32; zeros after the row's end.
// Grid: x rows, y groups of as many segments as a block has warps. May be launched to overlap with the previous kernel. Reads 4
// bytes per element and writes 2.
#include "norm.cuh"
#include "quantize_rows.cuh"

extern "C" __global__ void quantize_rows(const float* x, const float* squares, const float* norm, unsigned char* out, float* scale,
                                         int* sums, int n_in, int halves, float eps) {
  let_next_begin();
  int segment = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, n_segments = segments_of(n_in), of_row = n_in / GROUP;
  EightColumns weight{};
  if (norm && segment < n_segments) weight = columns_of_row(norm, segment, n_in);
  wait_for_previous();
  if (segment >= n_segments) return;
  EightColumns columns[] = {columns_of_row(x + static_cast<long long>(blockIdx.x) * n_in, segment, n_in)};
  if (norm) {
    const float* own = squares + static_cast<long long>(blockIdx.x) * of_row;
    float factor = norm_scale(sum_of_groups(load_groups(own, of_row), own, of_row), static_cast<float>(n_in), eps);
    columns[0] = normed_columns(columns[0], weight, factor);
  }
  Converted converted[1];
  convert(columns, halves, converted);
  long long at = static_cast<long long>(blockIdx.x) * n_segments + segment;
  put_segment(converted[0], out + at * ROW_BYTES, sums + at * ROW_SUMS, scale + at);
}
