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
// with tiles 0, `second` and `third`; those side by side have the same shape. They may differ in type: a_type … are ggml's numbers
// of the types, and a_bytes … their bytes (request_item). Biases (n_out,) and residual (n_rows, n_out) float32, or null; stats
// (n_rows, n_out / 16, 2), of y, or null. Groups of experts as in matmul.cu, for one matrix or two side by side.
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
// Rows are in the form that products read (Activations), or the block makes this form itself, from the rows and their Stats
// (norm.cuh), with the bits of rms_norm_f16 or quantize_rows_f16. Every block repeats that, which takes less time than another
// kernel.
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
#include "norm.cuh"
#include "quantize_rows.cuh"

constexpr int STAGES = 2;          // of a warp's ring
constexpr int MOST_THREADS = 256;  // they limit the registers; cuda/kernels/few_rows.py has the same
constexpr int NONE = 0, SWIGLU = 1, SWIGLU_CLAMPED = 2, GELU = 3;

// Copies segment `segment` of a tile with all lanes of a warp, and zeros behind a segment that is not whole. bytes: those of a
// block of 32 columns of a tile, and, 16 bits higher, of a segment's scales.
__device__ __forceinline__ void request_item(uint8_t* stage, const Tiles& w, unsigned bytes, uint32_t tile, int segment) {
  uint32_t of_block = bytes & 0xffff, of_scales = bytes >> 16, whole = SEGMENT * of_block + of_scales;
  uint32_t of_tile = w.n_blocks * of_block + w.n_segments() * of_scales, at = threadIdx.x % 32 * 16;
  uint32_t n_bytes = min(w.n_blocks - segment * SEGMENT, SEGMENT) * of_block + of_scales;
  const uint8_t* from = w.data + static_cast<uint64_t>(tile) * of_tile + segment * whole + at;
  uint8_t* to = stage + at;
  int exist = n_bytes - at;
  constexpr int AT_ONCE = 2048;
#pragma unroll 1
  for (int i = whole / AT_ONCE; i > 0; i--, from += AT_ONCE, to += AT_ONCE, exist -= AT_ONCE)
#pragma unroll
    for (int k = 0; k < AT_ONCE; k += 512) copy16(to + k, from + k, k < exist);
#pragma unroll 1
  for (int rest = whole % AT_ONCE - at; rest > 0; rest -= 512, from += 512, to += 512, exist -= 512)
    copy16(to, from, exist > 0);
}

// The sums of an item, whose segment has n_blocks blocks. columns, block_sums: from the segment's start; zeros after the
// row's end, which are multiplied with whatever is behind the codes.
template <class Q>
__device__ __forceinline__ void item_sums(const uint8_t* stage, int n_blocks, const f16* columns, const unsigned* block_sums,
                                          MmaD& sums) {
  int lane = threadIdx.x % 32;
  Planes w = planes_at<Q>(stage, n_blocks);
  Lanes at = lane_of<Q>(w, 0, lane);
  typename Q::Scales scales[2];
#pragma unroll
  for (int i = 0; i < 2; i++) scales[i] = Q::template scales<InShared>(w, lane / 4 + 8 * i);
  BlockSums<Q> of_blocks{};
#pragma unroll  // without a loop, a tenth fewer instructions
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int j = 0; j < SEGMENT / 2; j++) {
      MmaA a[2];
      block_operands<Q>(Q::template load<InShared>(at, j), scales, j, a);
      add_block<Q>(a, scales, j, *reinterpret_cast<const uint4*>(columns + j * 32), of_blocks);
    }
    columns += SEGMENT / 2 * 32;
    at = {at.low + SEGMENT / 2 * 32 * Q::LOW, at.high + SEGMENT / 2 * 32 * Q::HIGH};
#pragma unroll
    for (int i = 0; i < 2; i++) Q::second_half(scales[i]);
  }
  int row = computed_anew(lane / 4);  // once more, since keeping them would take registers
#pragma unroll
  for (int i = 0; i < 2; i++) scales[i] = Q::template scales<InShared>(w, row + 8 * i);
  MmaD part = minimums_part<Q>(scales, block_sums);
#pragma unroll
  for (int i = 0; i < 4; i++) sums.x[i] = segment_sum<Q>(scales, of_blocks, part, i);
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

// Space for a block's rows in shared memory. halves: `pitch` bytes a row; sums (rows, padded / 32) and scale (8,) as in
// Activations. For making them: norm (n_in,), the norm's weights, and norm_tops (n_warps,), the largest magnitudes of parts of
// them, as bits.
struct Prepared {
  uint8_t* halves;
  int pitch;
  unsigned *sums, *norm_tops;
  float *scale, *norm;
  __device__ __forceinline__ f16* row(int i) const { return reinterpret_cast<f16*>(halves + i * pitch); }
};

// Makes the form that products read from rows of floats, with all threads of a block. Ends with a barrier, and waits for no
// other: the rows' Stats give their exponents and, for a norm, its scale.
__device__ __forceinline__ void prepare_rows(const Activations& x, const Rows& rows, float eps, int n_in,
                                             const Prepared& to) {
  constexpr int TOGETHER = 4;  // segments whose loads overlap
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_segments = padded(n_in) / 256;
  int n_rows = rows.count, of_row = n_in / GROUP;
  const float2* stats = reinterpret_cast<const float2*>(x.stats);
  // A job is a segment of a row; a warp has jobs number warp, warp + n_warps, ….
  int row = 0, segment = warp;
  auto settle = [&] {
#pragma unroll 1
    for (; segment >= n_segments; segment -= n_segments) row++;
  };
  settle();
  int exponent = 0;  // of row `lane`
  float factor = 1.0f;
  bool is_first = true;
#pragma unroll 1
  do {
    EightColumns values[TOGETHER];
    int row_of[TOGETHER], start_of[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) row_of[i] = n_rows, start_of[i] = 0, values[i] = {};
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if (row >= n_rows) break;
      row_of[i] = row, start_of[i] = segment * SEGMENT;
      values[i] = columns_of_row(x.floats + static_cast<long long>(rows.of_x(row)) * n_in, start_of[i], n_in);
      segment += n_warps;
      settle();
    }
    if (is_first) {
      is_first = false;
      unsigned norm_top = 0;
      if (x.norm)
        for (int i = 0; i < n_warps; i++) norm_top = max(norm_top, to.norm_tops[i]);
#pragma unroll 1
      for (int i = 0; i < n_rows; i++) {
        const float2* own = stats + static_cast<long long>(rows.of_x(i)) * of_row;
        unsigned top = 0;
        float squares = 0.0f, scale = 1.0f;
        for_each<float2>(
            lane, of_row, 32, [&](int g) { return own[g]; },
            [&](const float2& of_group) { top = max(top, __float_as_uint(of_group.x)), squares += of_group.y; });
        top = __reduce_max_sync(ALL_LANES, top);
        if (x.norm) scale = norm_scale(warp_sum(squares), static_cast<float>(n_in), eps);
        int e = x.norm ? normed_exponent(top, norm_top, scale) : row_exponent(__uint_as_float(top));
        if (lane == i) exponent = e, factor = scale;
        if (threadIdx.x == 0) to.scale[i] = power_of_two(e);
      }
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if (row_of[i] >= n_rows) break;
      if (x.norm) {
        float of = __shfl_sync(ALL_LANES, factor, row_of[i]);
        EightColumns weight = columns_of_row(to.norm, start_of[i], n_in);
#pragma unroll
        for (int k = 0; k < 8; k++) values[i].x[k] = normed(values[i].x[k], {0.0f, of}, weight.x[k]);
      }
      int e = __shfl_sync(ALL_LANES, exponent, row_of[i]);
      blocks_as_halves(values[i], e, start_of[i], to.row(row_of[i]), to.sums + row_of[i] * n_segments * SEGMENT);
    }
  } while (row < n_rows);
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    few_rows(const unsigned char* a, const unsigned char* b, const unsigned char* c, Activations x, Groups groups,
             const float* a_bias, const float* b_bias, const float* c_bias, const float* residual, float* y, float* stats,
             int a_type, int b_type, int c_type, int a_bytes, int b_bytes, int c_bytes, int second, int third, int activation,
             int n_out, int n_in, int n_rows, int shift, int chunk, int stage_bytes, float eps) {
  DYNAMIC_SHARED(uint8_t, memory);
  bool paired = activation == SWIGLU || activation == SWIGLU_CLAMPED, grouped = groups.group;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, capacity = 1 << shift;
  int n_tiles = (n_out + 15) / 16, n_blocks = n_in / 32, n_segments = (n_blocks + SEGMENT - 1) / SEGMENT;
  int per_tile = paired ? 2 * n_segments : n_segments, pitch = padded(n_in);
  int my_tiles = (n_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);

  // Shared memory, in this order; cuda/kernels/few_rows.py has the same.
  uint8_t* ring = memory + warp * STAGES * stage_bytes;
  float* scales = reinterpret_cast<float*>(memory + n_warps * STAGES * stage_bytes);  // (8,)
  unsigned* norm_tops = reinterpret_cast<unsigned*>(scales + 8);                      // (n_warps,), at most 16
  float* sums_of_items = scales + 24;                                                 // (2, chunk, per_tile, 16, capacity)
  int half_of_sums = chunk * per_tile * 16 << shift;
  Prepared prepared;
  prepared.halves = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (capacity, pitch)
  prepared.pitch = 2 * pitch + 64;  // 64 bytes more, so that eight lanes that read two rows meet no bank twice
  prepared.sums = reinterpret_cast<unsigned*>(prepared.halves + capacity * prepared.pitch);  // (capacity, padded / 32)
  prepared.norm = reinterpret_cast<float*>(prepared.sums + capacity * pitch / 32);           // (n_in,)
  prepared.scale = scales, prepared.norm_tops = norm_tops;

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
      if (x.norm) {
        unsigned top = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < n_in / 4; i += blockDim.x) {  // those that the thread has copied
          float4 four = *reinterpret_cast<const float4*>(prepared.norm + i * 4);
          top = max(max(top, magnitude(four.x)), max(magnitude(four.y), max(magnitude(four.z), magnitude(four.w))));
        }
        top = __reduce_max_sync(ALL_LANES, top);
        if (lane == 0) norm_tops[warp] = top;
      }
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

  const f16* columns;  // the lane's, of its row
  const unsigned* sums_of_blocks;
  long long row = min(lane / 4, rows.count - 1);
  if (x.x) {
    row = rows.of_x(static_cast<int>(row));
    columns = x.x + row * pitch, sums_of_blocks = x.sums;
    if (static_cast<int>(threadIdx.x) < rows.count) scales[threadIdx.x] = x.scale[rows.of_x(threadIdx.x)];
  } else {
    prepare_rows(x, rows, eps, n_in, prepared);
    columns = prepared.row(static_cast<int>(row)), sums_of_blocks = prepared.sums;
  }
  columns += lane % 4 * 8, sums_of_blocks += row * (pitch / 32);
  Output output{};  // this thread's of the first chunk; loaded while items are computed
  {
    int number, tile, out;
    if (place(threadIdx.x, 0, number, tile, out)) output = output_of(number, tile, out);
  }

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
      MmaD sums = {};
      for_type(one_of(matrix, a_type, b_type, c_type), [&](auto q) {
        item_sums<decltype(q)>(ring + stage * stage_bytes, min(n_blocks - segment * SEGMENT, SEGMENT),
                               columns + segment * SEGMENT * 32, sums_of_blocks + segment * SEGMENT, sums);
      });
      __syncwarp(ALL_LANES);
      request(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      float* to = sums_of_tiles + (((now.tile - done) * per_tile + now.part) * 16 << shift);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int number = lane % 4 * 2 + i % 2, out = lane / 4 + 8 * (i / 2);
        if (number < capacity) to[(out << shift) + number] = sums.x[i];
      }
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
        sum = __fmul_rn(sum, scales[number]), from += n_segments * 16 << shift;
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
      if (stats)  // then n_out is a multiple of 16, so that all lanes of a group are here
        put_stats(stats, output.at, sum, out == 0, 0xffffu << (lane & 16));
    }
  }
}
