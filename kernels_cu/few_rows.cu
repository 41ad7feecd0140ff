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
// is only beside F16: a_type … are ggml's numbers of the types, and a_bytes … their bytes (request_item). Biases (n_out,) and
// residual (n_rows, n_out) float32, or null; squares (n_rows, n_out / 16), the sums of squares of y (norm.cuh), or null. Groups of
// experts as in matmul.cu, for one matrix or two side by side.
//
// one_row is for one row of floats, for which it has the fewest instructions (one_row_sum in matmul.cuh); few_rows for all else.
//
// A block of threads computes tiles of 16 outputs, number blockIdx.x, blockIdx.x + gridDim.x, …. An item is a segment of one
// tile of one matrix. The items of a block are divided among its warps in turn. Each warp copies the weights of its next items
// into a ring of stages in shared memory, and asks for the first before the previous kernel has ended, so that the memory
// never waits for a kernel to begin:
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
// rows in a block are 1 << shift. stage_bytes: those of an item. Dynamic shared memory: `shared_bytes` in
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

constexpr int STAGES = 2;          // of a warp's ring
constexpr int MOST_THREADS = 256;  // they limit the registers; cuda/kernels/few_rows.py has the same
constexpr int NONE = 0, SWIGLU = 1, SWIGLU_CLAMPED = 2, GELU = 3;
constexpr int HALVES_TYPE = 1;  // ggml's number of F16

// Copies segment `segment` of a tile with all lanes of a warp, and zeros behind a segment that is not whole. bytes: those of a
// pair of blocks of a tile, and, 16 bits higher, of a segment's scales.
__device__ __forceinline__ void request_item(uint8_t* stage, const Tiles& w, unsigned bytes, uint32_t tile, int segment) {
  uint32_t of_pair = bytes & 0xffff, of_scales = bytes >> 16, whole = MOST_PAIRS * of_pair + of_scales;
  uint32_t of_tile = (w.n_blocks + 1) / 2 * of_pair + w.n_segments() * of_scales, at = threadIdx.x % 32 * 16;
  int n_bytes = w.n_pairs(segment) * of_pair + of_scales, left = n_bytes;
  const uint8_t* from = w.data + static_cast<uint64_t>(tile) * of_tile + segment * whole + at;
  uint8_t* to = stage + at;
  constexpr int AT_ONCE = 2048;
#pragma unroll 1
  for (; left >= AT_ONCE; left -= AT_ONCE, from += AT_ONCE, to += AT_ONCE)
#pragma unroll
    for (int k = 0; k < AT_ONCE; k += 512) copy16(to + k, from + k);
#pragma unroll 1
  for (; left > 0; left -= 512, from += 512, to += 512)
    if (static_cast<int>(at) < left) copy16(to, from);
#pragma unroll 1
  for (uint32_t i = n_bytes + at; i < whole; i += 512) copy16(stage + i, from, false);
}

// An item of a block: the number of its tile among the block's tiles, and its place among the items of that tile.
struct Item {
  int tile, part;
};

// Where an output goes, and what is added to it: biases of both matrices, or bias and residual.
struct Output {
  long long at;
  float first, second;
};

// Space for a block's converted rows in shared memory (quantize_rows.cuh): `pitch` bytes a row; sums (rows, n_segments, 16),
// scale (rows, n_segments). norm (n_in,): the norm's weights.
struct Prepared {
  uint8_t* bytes;
  int pitch, *sums;
  float *scale, *norm;
};

// Makes the form that products read from rows of floats, with all threads of a block. Ends with a barrier, and waits for no
// other: the rows' squares give the norm's scale.
__device__ __forceinline__ void prepare_rows(const Activations& x, const Rows& rows, bool halves, float eps, int n_in,
                                             const Prepared& to) {
  constexpr int TOGETHER = 4;  // segments whose loads overlap
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_segments = segments_of(n_in);
  int n_rows = rows.count, of_row = n_in / GROUP;
  // A job is a segment of a row; a warp has jobs number warp, warp + n_warps, ….
  int row = 0, segment = warp;
  auto settle = [&] {
#pragma unroll 1
    for (; segment >= n_segments; segment -= n_segments) row++;
  };
  settle();
  float factor = 1.0f;  // of row `lane`
  bool is_first = true;
#pragma unroll 1
  do {
    EightColumns values[TOGETHER];
    int row_of[TOGETHER], segment_of[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) row_of[i] = n_rows, segment_of[i] = 0, values[i] = {};
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if (row >= n_rows) break;
      row_of[i] = row, segment_of[i] = segment;
      values[i] = columns_of_row(x.floats + static_cast<long long>(rows.of_x(row)) * n_in, segment, n_in);
      segment += n_warps;
      settle();
    }
    if (is_first && x.norm)
#pragma unroll 1
      for (int i = 0; i < n_rows; i++) {
        const float* own = x.squares + static_cast<long long>(rows.of_x(i)) * of_row;
        float sum = sum_of_groups(of_row, [&](int g) { return own[g]; });
        float scale = norm_scale(sum, static_cast<float>(n_in), eps);
        if (lane == i) factor = scale;
      }
    is_first = false;
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if (row_of[i] >= n_rows) break;
      if (x.norm) {
        float of = __shfl_sync(ALL_LANES, factor, row_of[i]);
        EightColumns weight = columns_of_row(to.norm, segment_of[i], n_in);
#pragma unroll
        for (int k = 0; k < 8; k++) values[i].x[k] = normed(values[i].x[k], {0.0f, of}, weight.x[k]);
      }
      int at = row_of[i] * n_segments + segment_of[i];
      convert_segment(values[i], halves, to.bytes + row_of[i] * to.pitch + segment_of[i] * ROW_BYTES, to.sums + at * ROW_SUMS,
                      to.scale + at);
    }
  } while (row < n_rows);
  __syncthreads();
}

// ONE: there is one row, of floats.
template <bool ONE>
__device__ __forceinline__ void multiply(uint8_t* memory, const unsigned char* a, const unsigned char* b, const unsigned char* c,
                                         const Activations& x, const Groups& groups, const float* a_bias, const float* b_bias,
                                         const float* c_bias, const float* residual, float* y, float* squares, int a_type,
                                         int b_type, int c_type, int a_bytes, int b_bytes, int c_bytes, int second, int third,
                                         int activation, int n_out, int n_in, int n_rows, int shift, int chunk, int stage_bytes,
                                         float eps) {
  bool paired = activation == SWIGLU || activation == SWIGLU_CLAMPED, grouped = groups.group;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, capacity = ONE ? 1 : 1 << shift;
  int n_tiles = (n_out + 15) / 16, n_blocks = n_in / 32, n_segments = (n_blocks + SEGMENT - 1) / SEGMENT;
  int per_tile = paired ? 2 * n_segments : n_segments;
  int my_tiles = (n_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);

  // Shared memory, in this order; cuda/kernels/few_rows.py has the same.
  uint8_t* ring = memory + warp * STAGES * stage_bytes;
  float* sums_of_items = reinterpret_cast<float*>(memory + n_warps * STAGES * stage_bytes);  // (2, chunk, per_tile, 16, capacity)
  int half_of_sums = chunk * per_tile * 16 << shift;
  Prepared prepared;
  prepared.bytes = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (capacity, pitch)
  prepared.pitch = n_segments * ROW_BYTES + 64;  // 64 bytes more, so that lanes that read several rows meet no bank twice
  prepared.sums = reinterpret_cast<int*>(prepared.bytes + capacity * prepared.pitch);  // (capacity, n_segments, 16)
  prepared.norm = reinterpret_cast<float*>(prepared.sums + capacity * n_segments * ROW_SUMS);  // (n_in,)
  prepared.scale = prepared.norm + (x.norm ? n_in : 0);  // (capacity, n_segments)

  // The matrix of a tile, or of an item of a tile of two side by side; and what belongs to it.
  auto matrix_of = [&](int tile, int part) { return paired ? part >= n_segments : (tile >= second) + (tile >= third); };
  auto one_of = [](int matrix, auto of_a, auto of_b, auto of_c) { return matrix == 0 ? of_a : matrix == 1 ? of_b : of_c; };
  auto within = [&](int tile) { return tile - (paired || tile < second ? 0 : tile >= third ? third : second); };
  auto bias_of = [&](int tile) { return one_of(matrix_of(tile, 0), a_bias, b_bias, c_bias); };

  uint32_t first_tile = 0;  // of the expert
  int tile_steps = n_warps / per_tile, part_steps = n_warps % per_tile;
  auto advance = [&](Item& item) {
    item.tile += tile_steps, item.part += part_steps;
    if (item.part >= per_tile) item.part -= per_tile, item.tile++;
  };
  auto segment_of = [&](const Item& item) { return paired && item.part >= n_segments ? item.part - n_segments : item.part; };
  auto tile_of = [&](const Item& item) { return static_cast<int>(blockIdx.x + item.tile * gridDim.x); };
  Item now = {warp / per_tile, warp % per_tile}, next = now;
  auto request = [&](int stage) {
    if (next.tile < my_tiles) {
      int tile = tile_of(next), matrix = matrix_of(tile, next.part);
      request_item(ring + stage * stage_bytes, Tiles{one_of(matrix, a, b, c), n_blocks},
                   one_of(matrix, a_bytes, b_bytes, c_bytes), first_tile + within(tile), segment_of(next));
    }
    end_of_copies();
    advance(next);
  };

  let_next_begin();
  if (x.norm)
    for (int i = threadIdx.x; i < n_in / 4; i += blockDim.x) copy16(prepared.norm + i * 4, x.norm + i * 4);
  end_of_copies();
  // The first weights are requested before the wait, if it is known which.
  Rows rows{};
#pragma unroll 1
  for (int waited = 0; waited < 2; waited++) {
    if (waited) {
      wait_for_previous();
      rows = rows_of(groups, n_rows, 8);
      if (!rows.count) return;
      first_tile = rows.expert * n_tiles;
    }
    if (waited == (grouped ? 1 : 0))
#pragma unroll 1
      for (int stage = 0; stage < STAGES; stage++) request(stage);
    if (!waited) {
      int tile = blockIdx.x + threadIdx.x * gridDim.x;
      if (static_cast<int>(threadIdx.x) < my_tiles) {
        if (bias_of(tile)) prefetch(bias_of(tile) + within(tile) * 16);
        if (paired && b_bias) prefetch(b_bias + tile * 16);
      }
      if (grouped)
        wait_for_copies<0>();
      else
        wait_for_copies<STAGES>();  // of the norm's weights
      __syncthreads();
    }
  }
  // Output number i of a chunk, if it exists.
  auto place = [&](int i, int done, int& number, int& tile, int& out) {
    out = i % 16, number = i / 16 & (capacity - 1), tile = blockIdx.x + (done + (i >> (4 + shift))) * gridDim.x;
    return number < rows.count && tile * 16 + out < n_out;
  };
  auto output_of = [&](int number, int tile, int out) {
    long long of_bias = static_cast<long long>(rows.expert) * n_out + within(tile) * 16 + out;
    const float* bias = bias_of(tile);
    Output output{place_of(rows, number, tile * 16 + out, n_out), bias ? bias[of_bias] : 0.0f, 0.0f};
    if (paired && b_bias) output.second = b_bias[of_bias];
    if (residual) output.second = residual[output.at];
    return output;
  };

  // Rows that a lane needs: with one of their bytes, and with their sums and scales (matmul.cuh). Rows of a mma do not affect each
  // other, so the last one stands for those that do not exist.
  bool halves = a_type == HALVES_TYPE, prepares = ONE || !x.x;
  const uint8_t* bytes = prepared.bytes;
  const int* sums_of_rows = prepared.sums;
  const float* scale_of_rows = prepared.scale;
  int pitch = prepared.pitch;
  if (prepares)
    prepare_rows(x, rows, halves, eps, n_in, prepared);
  else
    bytes = x.x, pitch = n_segments * ROW_BYTES, sums_of_rows = x.sums, scale_of_rows = x.scale;
  auto existing = [&](int number) {
    if (ONE) return 0;
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

  auto scale_of = [&](int number, int segment) { return scale_of_rows[existing(number) * n_segments + segment]; };

  int stage = 0, half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < my_tiles; done += chunk) {
    int end = min(done + chunk, my_tiles);
    float* sums_of_tiles = sums_of_items + half;
    half = half_of_sums - half;
#pragma unroll 1
    for (; now.tile < end; advance(now)) {
      int segment = segment_of(now), matrix = matrix_of(tile_of(now), now.part);
      wait_for_copies<STAGES - 1>();
      __syncwarp(ALL_LANES);
      float* to = sums_of_tiles + (((now.tile - done) * per_tile + now.part) * 16 << shift);
      auto put = [&](int number, int out, float sum) {
        if (number < capacity) to[(out << shift) + number] = __fmul_rn(sum, scale_of(number, segment));
      };
      const uint8_t* weights = ring + stage * stage_bytes;
      int n_pairs = Tiles{nullptr, n_blocks}.n_pairs(segment), type = one_of(matrix, a_type, b_type, c_type);
      const uint8_t* columns = bytes + (with_bytes * pitch + segment * ROW_BYTES);
      if (halves) {
        MmaD sums = half_sums<InShared>(weights, n_pairs, columns + lane % 4 * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) put(lane % 4 * 2 + i % 2, lane / 4 + 8 * (i / 2), sums.x[i]);
      } else if constexpr (ONE) {
        float sum = 0.0f;
        for_type(type, [&](auto q) {
          using Q = decltype(q);
          sum = one_row_sum<Q, InShared>(planes_at<Q>(weights, n_pairs), n_pairs, columns, sums_of_rows + segment * ROW_SUMS);
        });
        if (lane % 4 < 2) put(0, lane / 4 + 8 * (lane % 2), sum);
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
      __syncwarp(ALL_LANES);
      request(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - done) * 16 << shift; i += blockDim.x) {
      int number, tile, out;
      if (!place(i, done, number, tile, out)) continue;
      if (done > 0 || i >= static_cast<int>(blockDim.x)) output = output_of(number, tile, out);
      const float* from = sums_of_tiles + (((i >> (4 + shift)) * per_tile * 16 + out) << shift) + number;
      float gate = 0.0f, sum = 0.0f;
#pragma unroll 1
      for (int matrix = 0; matrix <= (paired ? 1 : 0); matrix++) {
        gate = sum, sum = 0.0f;
        for_each<float>(0, n_segments, 1, [&](int segment) { return from[segment * 16 << shift]; },
                        [&](float of_segment) { sum = __fadd_rn(sum, of_segment); });
        from += n_segments * 16 << shift;
      }
      if (paired) {
        if (a_bias) gate = __fadd_rn(gate, output.first);
        if (b_bias) sum = __fadd_rn(sum, output.second);
        sum = activation == SWIGLU ? swiglu(gate, sum) : swiglu_clamped(gate, sum);
      } else {
        if (bias_of(tile)) sum = __fadd_rn(sum, output.first);
        if (residual) sum = __fadd_rn(sum, output.second);
        if (activation == GELU) sum = gelu(sum);
      }
      y[output.at] = sum;
      if (squares)  // then n_out is a multiple of 16, so that all lanes of a group are here
        put_squares(squares, output.at, sum, out == 0, 0xffffu << (lane & 16));
    }
  }
}

#define FEW_ROWS(name, ONE)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)                                                                \
      name(const unsigned char* a, const unsigned char* b, const unsigned char* c, Activations x, Groups groups,               \
           const float* a_bias, const float* b_bias, const float* c_bias, const float* residual, float* y, float* squares,     \
           int a_type, int b_type, int c_type, int a_bytes, int b_bytes, int c_bytes, int second, int third, int activation,   \
           int n_out, int n_in, int n_rows, int shift, int chunk, int stage_bytes, float eps) {                                \
    DYNAMIC_SHARED(uint8_t, memory);                                                                                           \
    multiply<ONE>(memory, a, b, c, x, groups, a_bias, b_bias, c_bias, residual, y, squares, a_type, b_type, c_type, a_bytes,   \
                  b_bytes, c_bytes, second, third, activation, n_out, n_in, n_rows, ONE ? 0 : shift, chunk, stage_bytes, eps); \
  }
FEW_ROWS(one_row, true)
FEW_ROWS(few_rows, false)
