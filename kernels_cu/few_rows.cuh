// Products with up to 8 rows, for matmul.cu, gate_up.cu and qkv.cu: what a decode step consists of.
//
// A block of threads computes tiles of 16 outputs, number blockIdx.x, blockIdx.x + gridDim.x, …. An item is one segment of
// one tile (of one of the matrices, if there are several). The items of a block are divided among its warps in turn. Each
// warp copies the weights of its next items into a ring of stages in shared memory, and asks for the first before the
// previous kernel has ended, so that the memory never waits for a kernel to begin:
//
//   warp 0   copy items 0, W, 2W   |  wait for the previous kernel,  |  item 0, then copy 3W  |  item W, …  |
//   warp 1   copy items 1, W + 1 … |  prepare the rows               |  item 1, …             |             |  barrier; sums
//   …                              |                                 |                        |             |  of tiles
//
// Rows are in the form that products read (Activations), or the block makes this form itself: norm, largest magnitude,
// halves and their block sums, with the bits of norm.cu and quantize_rows.cu. Every block repeats that, which takes less
// time than another kernel.
//
// When a few tiles (`chunk`) are done, all threads add up the segments' sums, each for one output of one row, in order.
//
// Launch: block: W warps, any number. Grid: x any number up to the number of tiles, y groups of 8 rows. capacity: the most
// rows in a block, rounded up to 1, 2, 4 or 8. Dynamic shared memory: `shared_bytes` in cuda/kernels/few_rows.py. One block
// of at most half a multiprocessor's registers and shared memory leaves room for the next kernel's.

constexpr int STAGES = 3;  // of a warp's ring

struct FewRows {
  int capacity, chunk;
  float eps;  // of the norm
};

// The weights of an item in shared memory.
template <class Q>
struct Stage {
  static constexpr int LOW = 256 * Q::LOW, HIGH = 256 * Q::HIGH, SCALES = 16 * Q::SCALE_BYTES, D = 16 * Q::D_BYTES;
  static constexpr int BYTES = LOW + HIGH + SCALES + D;

  // Copies segment `segment` of a tile, with all lanes of a warp.
  static __device__ __forceinline__ void request(uint8_t* stage, const Planes& w, long long tile, int segment) {
    int lane = threadIdx.x % 32, n = min(SEGMENT, w.n_blocks - segment * SEGMENT);
    long long place = tile * w.n_blocks + segment * SEGMENT, of_segments = tile * w.n_segments + segment;
    copy<LOW>(stage, w.low + place * (32 * Q::LOW), n * (32 * Q::LOW));
    if constexpr (HIGH > 0) copy<HIGH>(stage + LOW, w.high + place * (32 * Q::HIGH), n * (32 * Q::HIGH));
    const uint8_t* from = w.scales + of_segments * SCALES + lane * 16;
    if (D > 0 && lane * 16 >= SCALES) from = w.d + of_segments * D + (lane * 16 - SCALES);
    if (SCALES > 0 && lane * 16 < SCALES + D) copy16(stage + LOW + HIGH + lane * 16, from);
  }
  template <int MOST>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, int n_bytes) {
    int at = threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < MOST; i += 512)
      if (i + at < n_bytes) copy16(to + i + at, from + i + at);
  }
  static __device__ __forceinline__ Planes planes(const uint8_t* stage) {
    return {stage, stage + LOW, stage + LOW + HIGH, stage + LOW + HIGH + SCALES, SEGMENT, 1};
  }
};

// The rows of a block of threads, as its warps read them: halves and block sums of row i begin at x + i * stride and
// sums + i * n_blocks; the addresses are in shared or in global memory.
struct PreparedRows {
  const f16* x;
  const unsigned* sums;
  long long stride;
};

// M matrices of the same shape, multiplied with the same rows: a tile has n_segments items of each matrix, one matrix after
// another.
template <int M>
struct SideBySide {
  Planes w[M];
  static constexpr int N = M;  // sums of a tile
  __device__ __forceinline__ Planes of(int m, int) const {
    const Planes &a = w[0], &b = w[M - 1];
    bool first = M == 1 || m == 0;
    return Planes{first ? a.low : b.low, first ? a.high : b.high, first ? a.scales : b.scales, first ? a.d : b.d,
                  a.n_blocks, a.n_segments};
  }
  __device__ __forceinline__ int within(int tile) const { return tile; }
};
// Up to three matrices with the same row length, one below another: the second begins at tile `second`, the third at tile
// `third`.
struct Stacked {
  Planes w[3];
  int second, third;
  static constexpr int N = 1;
  __device__ __forceinline__ Planes of(int, int tile) const {
    int i = (tile >= second) + (tile >= third);
    return Planes{i == 0 ? w[0].low : i == 1 ? w[1].low : w[2].low, i == 0 ? w[0].high : i == 1 ? w[1].high : w[2].high,
                  i == 0 ? w[0].scales : i == 1 ? w[1].scales : w[2].scales, i == 0 ? w[0].d : i == 1 ? w[1].d : w[2].d,
                  w[0].n_blocks, w[0].n_segments};
  }
  __device__ __forceinline__ int within(int tile) const {
    return tile - (tile >= third ? third : tile >= second ? second : 0);
  }
};

// An item of a block: the number of its tile among the block's tiles, and its segment of that tile's segments.
struct Item {
  int tile, part;
};

// Makes the form that products read from one row of floats, with all threads of a block. norm: the norm's weights, copied
// to shared memory, or null; values: space for the row if there is a norm; scratch: 48 floats. Ends with a barrier.
__device__ __forceinline__ void prepare_row(const float* row, const float* norm, const float* norm_bias, float eps, int n_in,
                                            float* values, float* scratch, f16* halves, unsigned* sums, float* scale) {
  constexpr int HELD = 3;  // segments that a warp holds in registers
  int first = threadIdx.x / 32 * 8, step = blockDim.x / 32 * 8, n_blocks = n_in / 32;
  float top = 0.0f;
  int e;
  if (norm) {
    Moments of = norm_bias ? layer_moments(row, values, n_in, eps, scratch) : rms_moments(row, values, n_in, eps, scratch);
    for (int i = threadIdx.x; i < n_in; i += blockDim.x) {
      values[i] = normed(values[i], of, norm, norm_bias, i);
      top = larger_or_nan(top, fabsf(values[i]));
    }
    e = row_exponent(block_top(top, scratch + 16));
    for (int start = first; start < n_blocks; start += step)
      blocks_as_halves(columns_of_row(values, start, n_in), e, start, n_in, halves, sums);
  } else {
    EightColumns held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = columns_of_row(row, first + i * step, n_in);
#pragma unroll
    for (int i = 0; i < HELD; i++) top = top_of(top, held[i]);
    for (int start = first + HELD * step; start < n_blocks; start += step)
      top = top_of(top, columns_of_row(row, start, n_in));
    e = row_exponent(block_top(top, scratch + 16));
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * step < n_blocks) blocks_as_halves(held[i], e, first + i * step, n_in, halves, sums);
    for (int start = first + HELD * step; start < n_blocks; start += step)
      blocks_as_halves(columns_of_row(row, start, n_in), e, start, n_in, halves, sums);
  }
  if (threadIdx.x == 0) *scale = power_of_two(e);
  __syncthreads();
}

// The sum of an item, over the columns of its segment; `left` blocks of it exist, or more.
template <class Q, bool FULL>
__device__ __forceinline__ MmaD segment_sum(const uint8_t* stage, const f16* columns, const unsigned* block_sums,
                                            int left) {
  int lane = threadIdx.x % 32;
  Planes w = Stage<Q>::planes(stage);
  typename Q::Scales scales[2] = {Q::template scales<InShared>(w, 0, lane / 4), Q::template scales<InShared>(w, 0, lane / 4 + 8)};
  Lanes at = lane_of<Q>(w, 0, lane);
  MmaD sums[1] = {};
#pragma unroll
  for (int j = 0; j < SEGMENT; j++) {
    if (!FULL && j >= left) break;
    MmaA a[2];
    block_operands<Q>(Q::template load<InShared>(at, j), scales, j, a);
    add_block<Q>(a, scales, j, *reinterpret_cast<const uint4*>(columns + j * 32), sums[0]);
  }
  finish_segment<Q, 1>(scales, FULL ? SEGMENT : left, [&](int) { return block_sums; }, sums);
  return sums[0];
}

// Multiplies the tiles of a block of threads with up to 8 rows. `outputs` says what becomes of the sums, with
//   ahead(tile)                        asks for what is read besides the rows and does not depend on the previous kernel
//   load(rows, number, tile, out)      reads it, and what does: a bias, a residual; called as early as possible
//   put(rows, number, tile, out, sums, loaded)   stores an output; sums: the N sums, times the row's scale
// for output `out` of a tile and row `number`; one thread calls both.
template <class Q, class W, class Outputs>
__device__ __forceinline__ void rows8(const W& w, const Activations& x, const Groups& groups, int n_rows, int n_out, int n_in,
                                      const FewRows& few, const Outputs& outputs) {
  constexpr int M = W::N, BYTES = Stage<Q>::BYTES;
  DYNAMIC_SHARED(uint8_t, memory);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  int n_tiles = (n_out + 15) / 16, n_blocks = w.w[0].n_blocks, n_segments = w.w[0].n_segments, per_tile = M * n_segments;
  int my_tiles = (n_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);

  // Shared memory, in this order; cuda/kernels/few_rows.py has the same.
  uint8_t* ring = memory + warp * STAGES * BYTES;
  float* scratch = reinterpret_cast<float*>(memory + n_warps * STAGES * BYTES);  // (48,)
  float* scales = scratch + 48;                                                  // (8,)
  float* sums_of_items = scales + 8;                                             // (2, chunk, per_tile, 16, capacity)
  f16* halves = reinterpret_cast<f16*>(sums_of_items + 2 * few.chunk * per_tile * 16 * few.capacity);  // (capacity, stride)
  int stride = n_in + 32;  // 64 bytes between rows, so that eight lanes that read two rows meet no bank twice
  int padded = (n_blocks + 3) / 4 * 4;
  unsigned* block_sums = reinterpret_cast<unsigned*>(halves + few.capacity * stride);  // (capacity, padded)
  float* norm = reinterpret_cast<float*>(block_sums + few.capacity * padded);          // (n_in,)
  float* values = norm + n_in;                                                         // (n_in,)

  long long first_tile = 0;  // of the expert
  int tile_steps = n_warps / per_tile, part_steps = n_warps % per_tile;
  auto advance = [&](Item& item) {
    item.tile += tile_steps, item.part += part_steps;
    if (item.part >= per_tile) item.part -= per_tile, item.tile++;
  };
  auto segment_of = [&](const Item& item) { return M == 1 || item.part < n_segments ? item.part : item.part - n_segments; };
  Item now = {warp / per_tile, warp % per_tile}, next = now;
  auto request = [&](int stage) {
    if (next.tile < my_tiles) {
      int tile = blockIdx.x + next.tile * gridDim.x;
      Stage<Q>::request(ring + stage * BYTES, w.of(next.part >= n_segments, tile), first_tile + w.within(tile),
                        segment_of(next));
    }
    end_of_copies();
    advance(next);
  };

  let_next_begin();
  if (!groups.group) {
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) request(stage);
    if (static_cast<int>(threadIdx.x) < my_tiles) outputs.ahead(blockIdx.x + threadIdx.x * gridDim.x);
  }
  if (x.norm)
    for (int i = threadIdx.x; i < n_in; i += blockDim.x) norm[i] = x.norm[i];
  wait_for_previous();
  Rows rows = rows_of(groups, n_rows, 8);
  if (!rows.count) return;
  if (groups.group) {
    first_tile = static_cast<long long>(rows.expert) * n_tiles;
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) request(stage);
  }
  // What this thread needs for its output of the first chunk.
  auto place = [&](int i, int done, int& number, int& tile, int& out) {
    out = i % 16, number = i / 16 % rows.count, tile = blockIdx.x + (done + i / 16 / rows.count) * gridDim.x;
    return tile * 16 + out < n_out;
  };
  int first_number, first_out, first_of_tile;
  bool exists = place(threadIdx.x, 0, first_number, first_of_tile, first_out);
  typename Outputs::Loaded loaded{};
  if (exists) loaded = outputs.load(rows, first_number, first_of_tile, first_out);

  const f16* columns;
  const unsigned* sums_of_blocks;
  if (x.x) {
    long long row = rows.of_x(min(lane / 4, rows.count - 1));
    columns = x.x + row * n_in, sums_of_blocks = x.sums + row * n_blocks;
    if (static_cast<int>(threadIdx.x) < rows.count) scales[threadIdx.x] = x.scale[rows.of_x(threadIdx.x)];
  } else {
    if (x.norm) __syncthreads();
    for (int i = 0; i < rows.count; i++)
      prepare_row(x.floats + static_cast<long long>(rows.of_x(i)) * n_in, x.norm ? norm : nullptr, x.norm_bias, few.eps, n_in,
                  values, scratch, halves + i * stride, block_sums + i * padded, scales + i);
    int i = min(lane / 4, rows.count - 1);
    columns = halves + i * stride, sums_of_blocks = block_sums + i * padded;
  }
  columns += lane % 4 * 8;

  int stage = 0, other_half = 0;  // of sums_of_items: threads may still read one half
  for (int done = 0; done < my_tiles; done += few.chunk) {
    int end = min(done + few.chunk, my_tiles);
    float* sums_of_tiles = sums_of_items + other_half;
    other_half = few.chunk * per_tile * 16 * few.capacity - other_half;
    for (; now.tile < end; advance(now)) {
      int start = segment_of(now) * SEGMENT, left = n_blocks - start;
      wait_for_copies<STAGES - 1>();
      __syncwarp(ALL_LANES);
      MmaD sums = left >= SEGMENT
                      ? segment_sum<Q, true>(ring + stage * BYTES, columns + start * 32, sums_of_blocks + start, left)
                      : segment_sum<Q, false>(ring + stage * BYTES, columns + start * 32, sums_of_blocks + start, left);
      __syncwarp(ALL_LANES);
      request(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      float* to = sums_of_tiles + ((now.tile - done) * per_tile + now.part) * 16 * few.capacity;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = lane % 4 * 2 + i % 2, out = lane / 4 + 8 * (i / 2);
        if (row < few.capacity) to[out * few.capacity + row] = sums.x[i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (end - done) * 16 * rows.count; i += blockDim.x) {
      int number, tile, out;
      if (!place(i, done, number, tile, out)) continue;
      if (done > 0 || i >= static_cast<int>(blockDim.x)) loaded = outputs.load(rows, number, tile, out);
      const float* from = sums_of_tiles + (i / 16 / rows.count * per_tile * 16 + out) * few.capacity + number;
      float total[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        total[m] = 0.0f;
#pragma unroll 4
        for (int segment = 0; segment < n_segments; segment++)
          total[m] = __fadd_rn(total[m], from[(m * n_segments + segment) * 16 * few.capacity]);
        total[m] = __fmul_rn(total[m], scales[number]);
      }
      outputs.put(rows, number, tile, out, total, loaded);
    }
  }
}
