// Products with quantised weights for up to 8 rows per block, of which a decode step mostly consists, in one kernel for all types
// and uses:
//
//   activation          matrices (n_out, n_in)                        y (n_rows, n_out)
//   NONE                up to three, one below another: a, b, c       x Wᵀ + bias + residual
//   GELU                a                                             gelu(x aᵀ + bias)
//   SWIGLU              a (gate) and b (up), side by side             swiglu(x aᵀ + bias, x bᵀ + bias)
//   SWIGLU_CLAMPED      likewise                                      swiglu_clamped(…)
//
// The order of additions is that of matmul.cu; the same bits as rows64_* followed by activation.cu. Matrices one below another begin
// with tiles 0, `second` and `third`; those side by side have the same shape. They may differ in type, but F16, which reads halves,
// is only beside F16: for a_kind, a_tile and so on see Matrices in few_rows.cuh. Biases (n_out,) and residual (n_rows, n_out)
// float32, or null; squares (n_rows, n_out / 16), the sums of squares of y (norm.cuh), or null. Groups of experts as in
// matmul.cu, for one matrix or two side by side.
//
// one_row (one_row.cuh) is for one row of floats, few_rows for all else.
//
// A block of threads computes tiles of 16 outputs, number blockIdx.x, blockIdx.x + gridDim.x, …. An item is a segment of one
// tile of one matrix. The items of a block are divided among its warps in turn. Each warp copies the weights of its next items
// into a ring of stages in shared memory, and asks for the first before the previous kernel has ended, so that the memory
// need not wait for a kernel to begin:
//
//   warp 0   copy items 0, W, 2W … |  wait for the previous kernel,  |  item 0, then copy 2W  |  item W, …  |
//   warp 1   copy items 1, W + 1 … |  prepare the rows               |  item 1, …             |             |  barrier; sums
//   …                              |                                 |                        |             |  of tiles
//
// Rows are in the form that products read (Activations), or the block makes this form itself, from the rows and, for a norm in
// front, their sums of squares, with the bits of rms_norm_rows or quantize_rows. Every block repeats that, which takes less
// time than another kernel.
//
// When a few tiles (`chunk`) are done, all threads add up the segments' sums, each for one output of one row, in order.
//
// Launch: block: W warps, any number. Grid: x any number up to the number of tiles, y groups of 8 rows. shift: the most
// rows in a block are 1 << shift. stage_bytes: those of an item. early: how many stages are filled before the previous kernel
// has ended; the others are requested after the rows, which would otherwise wait for them. tiles_each, entry_steps,
// segment_steps: see Work in few_rows.cuh. Dynamic shared memory: `shared_bytes` in
// cuda/kernels/few_rows.py. A block takes at most half a multiprocessor's registers and shared memory. Small products have
// one block for each multiprocessor, beside which those of the next kernels can already wait; large products have two. May
// be launched to overlap with the previous kernel.
#include "arguments.cuh"
#include "quants.cuh"
#include "activation.cuh"
#include "matmul.cuh"
#include "eight_rows.cuh"
#include "norm.cuh"
#include "quantize_rows.cuh"
#include "few_rows.cuh"
#include "one_row.cuh"

// Space for a block's converted rows in shared memory (quantize_rows.cuh): `pitch` bytes a row; sums (rows, n_segments, 16),
// scale (rows, n_segments).
struct Prepared {
  uint8_t* bytes;
  int pitch, *sums;
  float* scale;
};

// Makes the form that products read from rows of floats, with all threads of a block. Ends with a barrier.
__device__ __forceinline__ void prepare_rows(const Activations& x, const Rows& rows, bool halves, float eps, int n_in,
                                             const Prepared& to) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_segments = segments_of(n_in);
  int of_row = n_in / GROUP;
  float factor = 1.0f;  // of row `lane`
  if (x.norm)
#pragma unroll 1
    for (int i = 0; i < rows.count; i++) {
      const float* own = x.squares + static_cast<long long>(rows.of_x(i)) * of_row;
      float scale = norm_scale(sum_of_groups(load_groups(own, of_row), own, of_row), static_cast<float>(n_in), eps);
      if (lane == i) factor = scale;
    }
#pragma unroll 1
  for (int job = warp; job < rows.count * n_segments; job += n_warps) {
    int row = job / n_segments, segment = job - row * n_segments;
    EightColumns columns[] = {columns_of_row(x.floats + static_cast<long long>(rows.of_x(row)) * n_in, segment, n_in)};
    if (x.norm) {
      EightColumns weight = columns_of_row(x.norm, segment, n_in);
      float of = __shfl_sync(ALL_LANES, factor, row);
#pragma unroll
      for (int k = 0; k < 8; k++) columns[0].x[k] = normed(columns[0].x[k], {0.0f, of}, weight.x[k]);
    }
    Converted converted[1];
    convert(columns, halves, converted);
    put_segment(converted[0], to.bytes + row * to.pitch + segment * ROW_BYTES, to.sums + job * ROW_SUMS, to.scale + job);
  }
  __syncthreads();
}

__device__ __forceinline__ void multiply_few_rows(uint8_t* memory, const Matrices& matrices, const Activations& x,
                                                  const Groups& groups, const float* residual, float* y, float* squares,
                                                  int second, int third, int activation, int n_out, int n_in, int n_rows,
                                                  int shift, int chunk, int stage_bytes, int early, int tiles_each,
                                                  int entry_steps, int segment_steps, float eps) {
  let_next_begin();
  Work work(matrices, memory, activation, second, third, n_out, n_in, shift, stage_bytes, tiles_each, entry_steps, segment_steps);
  bool grouped = groups.group;
  if (!grouped) work.request_until(early);

  int lane = threadIdx.x % 32, n_warps = blockDim.x / 32, n_segments = work.n_segments, capacity = 1 << shift;
  // Shared memory after the entries, in this order; cuda/kernels/few_rows.py has the same.
  float* sums_of_items = work.after_entries;  // (2, chunk · sides, capacity, 16, of_sums)
  int half_of_sums = chunk * work.sides() * work.of_entry;
  Prepared prepared;
  prepared.bytes = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (capacity, pitch)
  prepared.pitch = n_segments * ROW_BYTES + 64;  // 64 bytes more, so that lanes that read several rows meet no bank twice
  prepared.sums = reinterpret_cast<int*>(prepared.bytes + capacity * prepared.pitch);  // (capacity, n_segments, 16)
  prepared.scale = reinterpret_cast<float*>(prepared.sums + capacity * n_segments * ROW_SUMS);  // (capacity, n_segments)
  work.pad_sums(sums_of_items, 2 * half_of_sums);
  if (int tile = work.tile_of(threadIdx.x); static_cast<int>(threadIdx.x) < work.my_tiles && !grouped) {
    if (work.bias_of(tile)) prefetch(work.bias_of(tile) + work.within(tile) * 16);
    if (work.paired && matrices.b_bias) prefetch(matrices.b_bias + tile * 16);
  }

  wait_for_previous();
  Rows rows = rows_of(groups, n_rows, 8);
  if (!rows.count) return;
  work.first_tile = rows.expert * work.n_tiles;
  work.request_until(STAGES);
  work.put_entries();
  // Output number i of a chunk, if it exists.
  auto place = [&](int i, int done, int& number, int& tile, int& out) {
    out = i % 16, number = i / 16 & (capacity - 1), tile = work.tile_of(done + (i >> (4 + shift)));
    return number < rows.count && tile * 16 + out < n_out;
  };
  auto output_of = [&](int number, int tile, int out) {
    long long of_bias = static_cast<long long>(rows.expert) * n_out + work.within(tile) * 16 + out;
    const float *bias = work.bias_of(tile), *other = work.paired ? matrices.b_bias : nullptr;
    Output output{place_of(rows, number, tile * 16 + out, n_out), 0.0f, 0.0f, bias != nullptr, other || residual};
    if (bias) output.first = bias[of_bias];
    if (other) output.second = other[of_bias];
    if (residual) output.second = residual[output.at];
    return output;
  };

  // Rows that a lane needs: with one of their bytes, and with their sums and scales (matmul.cuh). Rows of a mma do not affect each
  // other, so the last one stands for those that do not exist.
  bool halves = (matrices.a_kind & 255) == HALVES_TYPE, prepares = !x.x;
  const uint8_t* bytes = prepared.bytes;
  const int* sums_of_rows = prepared.sums;
  const float* scale_of_rows = prepared.scale;
  int pitch = prepared.pitch;
  if (prepares)
    prepare_rows(x, rows, halves, eps, n_in, prepared);
  else
    bytes = x.x, pitch = n_segments * ROW_BYTES, sums_of_rows = x.sums, scale_of_rows = x.scale;
  if (!prepares) __syncthreads();  // for the entries
  auto existing = [&](int number) {
    number = min(number, rows.count - 1);
    return prepares ? number : rows.of_x(number);
  };
  bool by_eight = halves || rows.count > 4;  // of a group of experts, often few of its rows exist
  int with_bytes = existing(by_eight ? lane / 4 : lane / 8), with_sums = existing(by_eight ? lane / 4 : lane % 4);
  Output output{};  // this thread's of the first chunk; loaded while items are computed
  {
    int number, tile, out;
    if (place(threadIdx.x, 0, number, tile, out)) output = output_of(number, tile, out);
  }

  int half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < work.my_tiles; done += chunk) {
    int end = min(done + chunk, work.my_tiles);
    float* sums_of_tiles = sums_of_items + half;
    half = half_of_sums - half;
    work.for_items(done, end, sums_of_tiles, [&](const uint8_t* weights, int segment, int n_pairs, int type, float* to) {
      auto put = [&](int number, int out, float sum) {
        float scale = scale_of_rows[existing(number) * n_segments + segment];
        if (number < capacity) to[(number * 16 + out) * work.of_sums] = __fmul_rn(sum, scale);
      };
      const uint8_t* columns = bytes + (with_bytes * pitch + segment * ROW_BYTES);
      if (halves) {
        MmaD sums = half_sums<InShared>(weights, n_pairs, columns + lane % 4 * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) put(lane % 4 * 2 + i % 2, lane / 4 + 8 * (i / 2), sums.x[i]);
      } else {
        auto sums_of_row = [&](int row) { return sums_of_rows + (row * n_segments + segment) * ROW_SUMS; };
        for_type(type, [&](auto q) {
          using Q = decltype(q);
          Planes planes = planes_at<Q>(weights, n_pairs);
          int r = lane / 4, c = lane % 4;
          if (computed_anew(rows.count) > 4) {  // anew, since remembering the answer would take a register
            eight_row_sums<Q, 1, 2>(
                planes, n_pairs, lane, [&](int) { return columns + c * 16; }, [&](int) { return sums_of_row(with_sums); },
                [&](int, int i) { return sums_of_row(existing(2 * c + i)); },
                [&](int, const float(&sums)[4]) {
#pragma unroll
                  for (int v = 0; v < 4; v++) put(2 * c + v % 2, r + 8 * (v / 2), sums[v]);
                });
          } else {
            float total[2];
            four_row_sums<Q>(planes, n_pairs, columns + c * 16 + r % 2 * 8, sums_of_row(with_sums), total);
#pragma unroll
            for (int i = 0; i < 2; i++) put(c, r + 8 * i, total[i]);
          }
        });
      }
    });
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - done) * 16 << shift; i += blockDim.x) {
      int number, tile, out;
      if (!place(i, done, number, tile, out)) continue;
      if (done > 0 || i >= static_cast<int>(blockDim.x)) output = output_of(number, tile, out);
      int side = (i >> (4 + shift)) * work.sides();
      const float* from = sums_of_tiles + (side * work.of_entry + (number * 16 + out) * work.of_sums);
      float of[2] = {};
      sums_of_output(work, from, of);
      float value = finished(output, activation, of[0], of[1]);
      y[output.at] = value;
      if (squares)  // then n_out is a multiple of 16, so that all lanes of a group are here
        put_squares(squares, output.at, value, out == 0, 0xffffu << (lane & 16));
    }
  }
}

#define FEW_ROWS(name, ...)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)                                                                \
      name(const unsigned char* a, const unsigned char* b, const unsigned char* c, Activations x, Groups groups,               \
           const float* a_bias, const float* b_bias, const float* c_bias, const float* residual, float* y, float* squares,     \
           int a_kind, int b_kind, int c_kind, int a_tile, int b_tile, int c_tile, int second, int third, int activation,      \
           int n_out, int n_in, int n_rows, int shift, int chunk, int stage_bytes, int early, int tiles_each,                  \
           int entry_steps, int segment_steps, float eps) {                                                                    \
    DYNAMIC_SHARED(uint8_t, memory);                                                                                           \
    Matrices matrices{a, b, c, a_bias, b_bias, c_bias, a_kind, b_kind, c_kind, a_tile, b_tile, c_tile};                        \
    __VA_ARGS__;                                                                                                               \
  }
FEW_ROWS(one_row, multiply_one_row(memory, matrices, x, groups, residual, y, squares, second, third, activation, n_out, n_in, chunk,
                                   stage_bytes, early, tiles_each, entry_steps, segment_steps, eps))
FEW_ROWS(few_rows, multiply_few_rows(memory, matrices, x, groups, residual, y, squares, second, third, activation, n_out, n_in,
                                     n_rows, shift, chunk, stage_bytes, early, tiles_each, entry_steps, segment_steps, eps))
