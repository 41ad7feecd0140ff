// Products with up to 8 rows, for matmul.cu, gate_up.cu and qkv.cu: what a decode step consists of.
//
// A block of threads computes tiles of 16 outputs, number blockIdx.x, blockIdx.x + gridDim.x, …. An item is two segments of
// one tile (of one of the matrices, if there are several), whose sums a warp computes side by side, because one alone waits
// for each mma. The items of a block are divided among its warps in turn. Each warp copies the weights of its next items
// into a ring of stages in shared memory, and asks for the first before the previous kernel has ended, so that the memory
// never waits for a kernel to begin:
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
// Launch: block: W warps, any number. Grid: x any number up to the number of tiles, y groups of 8 rows. shift: the most
// rows in a block are 1 << shift. Dynamic shared memory: `shared_bytes` in cuda/kernels/few_rows.py. A block takes at most
// half a multiprocessor's registers and shared memory. Small products have one block for each multiprocessor, beside which
// those of the next kernels can already wait; large products have two.

constexpr int TOGETHER = 2;  // segments of an item
constexpr int STAGES = 2;    // of a warp's ring

struct FewRows {
  int shift, chunk;
  float eps;  // of the norm
};

// The weights of an item in shared memory: the bytes of both segments in plane `low`, then in the other planes.
template <class Q>
struct Stage {
  static constexpr int BLOCKS = TOGETHER * SEGMENT;
  static constexpr int LOW = BLOCKS * 32 * Q::LOW, HIGH = BLOCKS * 32 * Q::HIGH;
  static constexpr int SCALES = TOGETHER * 16 * Q::SCALE_BYTES, D = TOGETHER * 16 * Q::D_BYTES;
  static constexpr int BYTES = LOW + HIGH + SCALES + D;

  // Copies segments `segment` and the one after it of a tile, as far as they exist, with all lanes of a warp. What does not
  // exist of the codes becomes zeros.
  static __device__ __forceinline__ void request(uint8_t* stage, const Planes& w, uint32_t tile, uint32_t segment) {
    uint32_t place = tile * w.n_blocks + segment * SEGMENT;
    uint32_t n_blocks = w.n_blocks - segment * SEGMENT, n_segments = w.n_segments - segment;
    copy<LOW, 32 * Q::LOW>(stage, w.low, place, n_blocks);
    if constexpr (HIGH > 0) copy<HIGH, 32 * Q::HIGH>(stage + LOW, w.high, place, n_blocks);
    place = tile * w.n_segments + segment;
    if constexpr (SCALES > 0) copy<SCALES, SCALES / TOGETHER>(stage + LOW + HIGH, w.scales, place, n_segments);
    if constexpr (D > 0) copy<D, D / TOGETHER>(stage + LOW + HIGH + SCALES, w.d, place, n_segments);
  }
  // Copies up to MOST bytes, `each` for one of `count`, from `place` times as many on.
  template <int MOST, int EACH>
  static __device__ __forceinline__ void copy(uint8_t* to, const uint8_t* plane, uint32_t place, uint32_t count) {
    uint32_t at = threadIdx.x % 32 * 16, n_bytes = min(static_cast<int>(count), MOST / EACH) * EACH;
    const uint8_t* from = plane + static_cast<uint64_t>(place) * EACH + at;
#pragma unroll
    for (int i = 0; i < MOST; i += 512)
      if (MOST - i >= 512 || at < MOST - i) copy16(to + i + at, from + i, i + at < n_bytes);
  }
  static __device__ __forceinline__ Planes planes(const uint8_t* stage) {
    return {stage, stage + LOW, stage + LOW + HIGH, stage + LOW + HIGH + SCALES, BLOCKS, TOGETHER};
  }
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

// Space for a block's rows in shared memory, `pitch` bytes a row: first as floats, then each segment as halves where its
// floats began. sums (rows, padded / 32), scale: as in Activations. For making them: norm (n_in,), the norm's weights; parts
// (2, 8, 8), of sums; tops (8,), the largest magnitudes as bits.
struct Prepared {
  uint8_t* rows;
  int pitch;
  unsigned* sums;
  float *scale, *norm, *parts;
  unsigned* tops;
  __device__ __forceinline__ float* row(int i) const { return reinterpret_cast<float*>(rows + i * pitch); }
};
constexpr int PREPARED_SEGMENT = 2 * SEGMENT * 32;  // halves from one segment to the next

// Makes the form that products read from rows of floats, with all threads of a block. Ends with a barrier. Short rather than
// unrolled: the instructions of a decode step's kernels are fetched anew by every launch, which takes longer than to execute
// them.
__device__ __forceinline__ void prepare_rows(const Activations& x, const Rows& rows, float eps, int n_in,
                                             const Prepared& to) {
  int warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_segments = padded(n_in) / 256;
  int n_rows = rows.count, n_jobs = n_rows * n_segments;
  if (threadIdx.x < 8) to.tops[threadIdx.x] = 0;
#pragma unroll 1
  for (int row = 0; row < n_rows; row++) {
    const uint4* from = reinterpret_cast<const uint4*>(x.floats + static_cast<long long>(rows.of_x(row)) * n_in);
    uint4* values = reinterpret_cast<uint4*>(to.row(row));
#pragma unroll 4
    for (int i = threadIdx.x; i < n_in / 4; i += blockDim.x) {
      uint4 four = load_words<uint4>(from + i);
      values[i] = four;
    }
  }
  wait_for_copies<STAGES>();  // of the norm's weights
  __syncthreads();
  float n = static_cast<float>(n_in);
  if (x.norm) {
#pragma unroll 1
    for (int centred = x.norm_bias ? 1 : 0; centred >= 0; centred--) {  // sums for the mean, then squares
#pragma unroll 1
      for (int job = warp; job < n_rows * 8; job += n_warps) {
        float mean = !centred && x.norm_bias ? sum_of_parts(to.parts + 64 + job / 8 * 8) / n : 0.0f;
        to.parts[centred * 64 + job] = part_of_sum(to.row(job / 8), n_in, job % 8, [&](float sum, float value) {
          float difference = value - mean;
          return centred ? sum + value : __fmaf_rn(difference, difference, sum);
        });
      }
      __syncthreads();
    }
  }
  Moments of{};
  int row_of_moments = -1;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {  // the largest magnitudes, then halves
#pragma unroll 1
    for (int job = warp; job < n_jobs; job += n_warps) {  // a segment of a row each
      int row = n_rows == 1 ? 0 : job / n_segments, segment = job - row * n_segments, start = segment * SEGMENT;
      EightColumns values = columns_of_row(to.row(row), start, n_in);
      if (x.norm && in_row(start, n_in)) {
        if (row != row_of_moments) {
          row_of_moments = row;
          of = {x.norm_bias ? sum_of_parts(to.parts + 64 + row * 8) / n : 0.0f,
                1.0f / sqrtf(sum_of_parts(to.parts + row * 8) / n + eps)};
        }
        EightColumns weight = columns_of_row(to.norm, start, n_in);
#pragma unroll
        for (int i = 0; i < 8; i++) values.x[i] = normed(values.x[i], of, weight.x[i]);
        if (x.norm_bias) {
          EightColumns bias = columns_of_row(x.norm_bias, start, n_in);
#pragma unroll
          for (int i = 0; i < 8; i++) values.x[i] = values.x[i] + bias.x[i];
        }
      }
      if (pass == 0) {
        unsigned top = __reduce_max_sync(ALL_LANES, top_of(values));
        if (threadIdx.x % 32 == 0) atomicMax(to.tops + row, top);
      } else {
        // All lanes have read the floats of the segment, which ends where its halves cannot reach.
        f16* halves = reinterpret_cast<f16*>(to.row(row)) + segment * PREPARED_SEGMENT - start * 32;
        __syncwarp(ALL_LANES);
        blocks_as_halves(values, row_exponent(__uint_as_float(to.tops[row])), start, halves,
                         to.sums + row * n_segments * SEGMENT);
      }
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < n_rows)  // read after the next barrier
    to.scale[threadIdx.x] = power_of_two(row_exponent(__uint_as_float(to.tops[threadIdx.x])));
}

// The sums of the segments of an item. columns, block_sums: from the first segment's start; zeros after the row's end. The
// next segment's columns begin `pitch` halves later.
template <class Q>
__device__ __forceinline__ void item_sums(const uint8_t* stage, const f16* columns, int pitch, const unsigned* block_sums,
                                          MmaD (&sums)[TOGETHER]) {
  int lane = threadIdx.x % 32;
  Planes w = Stage<Q>::planes(stage);
  Lanes at = lane_of<Q>(w, 0, lane);
  typename Q::Scales scales[TOGETHER][2];
#pragma unroll
  for (int s = 0; s < TOGETHER; s++)
#pragma unroll
    for (int i = 0; i < 2; i++) scales[s][i] = Q::template scales<InShared>(w, s, lane / 4 + 8 * i);
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
#pragma unroll (Q::WHOLE && Q::SCALED ? SEGMENT / 2 : Q::LOW < 32 ? 2 : 1)  // more would spill
    for (int j = 0; j < SEGMENT / 2; j++)
#pragma unroll
      for (int s = 0; s < TOGETHER; s++) {
        int block = s * SEGMENT + j;
        MmaA a[2];
        block_operands<Q>(Q::template load<InShared>(at, block), scales[s], j, a);
        add_block<Q>(a, scales[s], j, *reinterpret_cast<const uint4*>(columns + s * pitch + j * 32), sums[s]);
      }
    columns += SEGMENT / 2 * 32;
    at = {at.low + SEGMENT / 2 * 32 * Q::LOW, at.high + SEGMENT / 2 * 32 * Q::HIGH};
#pragma unroll
    for (int s = 0; s < TOGETHER; s++)
#pragma unroll
      for (int i = 0; i < 2; i++) Q::second_half(scales[s][i]);
  }
#pragma unroll
  for (int s = 0; s < TOGETHER; s++) {
    MmaD one[1] = {sums[s]};
    // Read once more, since keeping them would take registers.
#pragma unroll
    for (int i = 0; i < 2; i++) scales[s][i] = Q::template scales<InShared>(w, s, lane / 4 + 8 * i);
    finish_segment<Q, 1>(scales[s], [&](int) { return block_sums + s * SEGMENT; }, one);
    sums[s] = one[0];
  }
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
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, capacity = 1 << few.shift;
  int n_tiles = (n_out + 15) / 16, n_segments = w.w[0].n_segments, pitch = padded(n_in);
  int per_matrix = (n_segments + TOGETHER - 1) / TOGETHER, per_tile = M * per_matrix, n_sums = M * n_segments;
  int my_tiles = (n_tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);

  // Shared memory, in this order; cuda/kernels/few_rows.py has the same.
  uint8_t* ring = memory + warp * STAGES * BYTES;
  float* parts = reinterpret_cast<float*>(memory + n_warps * STAGES * BYTES);  // (2, 8, 8)
  unsigned* tops = reinterpret_cast<unsigned*>(parts + 128);                   // (8,)
  float* scales = parts + 136;                                                 // (8,)
  float* sums_of_items = scales + 8;                                           // (2, chunk, n_sums, 16, capacity)
  int half_of_sums = few.chunk * n_sums * 16 << few.shift;
  Prepared prepared;
  prepared.rows = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (capacity, pitch)
  prepared.pitch = 4 * pitch + 64;  // 64 bytes more, so that eight lanes that read two rows meet no bank twice
  prepared.sums = reinterpret_cast<unsigned*>(prepared.rows + capacity * prepared.pitch);  // (capacity, padded / 32)
  prepared.norm = reinterpret_cast<float*>(prepared.sums + capacity * pitch / 32);         // (n_in,)
  prepared.scale = scales, prepared.parts = parts, prepared.tops = tops;

  uint32_t first_tile = 0;  // of the expert
  int tile_steps = n_warps / per_tile, part_steps = n_warps % per_tile;
  auto advance = [&](Item& item) {
    item.tile += tile_steps, item.part += part_steps;
    if (item.part >= per_tile) item.part -= per_tile, item.tile++;
  };
  auto segment_of = [&](const Item& item) {
    return (M == 1 || item.part < per_matrix ? item.part : item.part - per_matrix) * TOGETHER;
  };
  Item now = {warp / per_tile, warp % per_tile}, next = now;
  auto request = [&](int stage) {
    if (next.tile < my_tiles) {
      int tile = blockIdx.x + next.tile * gridDim.x;
      Stage<Q>::request(ring + stage * BYTES, w.of(next.part >= per_matrix, tile), first_tile + w.within(tile),
                        segment_of(next));
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
    } else if (static_cast<int>(threadIdx.x) < my_tiles) {
      outputs.ahead(blockIdx.x + threadIdx.x * gridDim.x);
    }
    if (waited == (groups.group != nullptr))
#pragma unroll 1
      for (int stage = 0; stage < STAGES; stage++) request(stage);
  }
  // Output number i of a chunk, if it exists.
  auto place = [&](int i, int done, int& number, int& tile, int& out) {
    out = i % 16, number = i / 16 & (capacity - 1), tile = blockIdx.x + (done + (i >> (4 + few.shift))) * gridDim.x;
    return number < rows.count && tile * 16 + out < n_out;
  };
  typename Outputs::Loaded loaded{};  // for this thread's output of the first chunk
  {
    int number, tile, out;
    if (place(threadIdx.x, 0, number, tile, out)) loaded = outputs.load(rows, number, tile, out);
  }

  const f16* columns;  // the lane's, of its row
  const unsigned* sums_of_blocks;
  int pitch_of_segments;
  long long row = min(lane / 4, rows.count - 1);
  if (x.x) {
    row = rows.of_x(static_cast<int>(row));
    columns = x.x + row * pitch, sums_of_blocks = x.sums, pitch_of_segments = SEGMENT * 32;
    if (static_cast<int>(threadIdx.x) < rows.count) scales[threadIdx.x] = x.scale[rows.of_x(threadIdx.x)];
  } else {
    prepare_rows(x, rows, few.eps, n_in, prepared);
    columns = reinterpret_cast<const f16*>(prepared.row(static_cast<int>(row)));
    sums_of_blocks = prepared.sums, pitch_of_segments = PREPARED_SEGMENT;
  }
  columns += lane % 4 * 8, sums_of_blocks += row * (pitch / 32);

  int stage = 0, half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < my_tiles; done += few.chunk) {
    int end = min(done + few.chunk, my_tiles);
    float* sums_of_tiles = sums_of_items + half;
    half = half_of_sums - half;
#pragma unroll 1
    for (; now.tile < end; advance(now)) {
      int segment = segment_of(now);
      wait_for_copies<STAGES - 1>();
      __syncwarp(ALL_LANES);
      MmaD sums[TOGETHER] = {};
      item_sums<Q>(ring + stage * BYTES, columns + segment * pitch_of_segments, pitch_of_segments,
                   sums_of_blocks + segment * SEGMENT, sums);
      __syncwarp(ALL_LANES);
      request(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      int of_matrix = M == 1 || now.part < per_matrix ? 0 : n_segments;
      float* to = sums_of_tiles + (((now.tile - done) * n_sums + of_matrix + segment) * 16 << few.shift);
#pragma unroll
      for (int s = 0; s < TOGETHER; s++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int number = lane % 4 * 2 + i % 2, out = lane / 4 + 8 * (i / 2);
          if (number < capacity && segment + s < n_segments) to[(s * 16 + out << few.shift) + number] = sums[s].x[i];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - done) * 16 << few.shift; i += blockDim.x) {
      int number, tile, out;
      if (!place(i, done, number, tile, out)) continue;
      if (done > 0 || i >= static_cast<int>(blockDim.x)) loaded = outputs.load(rows, number, tile, out);
      const float* from = sums_of_tiles + (((i >> (4 + few.shift)) * n_sums * 16 + out) << few.shift) + number;
      float total[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        total[m] = 0.0f;
#pragma unroll 4
        for (int segment = 0; segment < n_segments; segment++)
          total[m] = __fadd_rn(total[m], from[(m * n_segments + segment) * 16 << few.shift]);
        total[m] = __fmul_rn(total[m], scales[number]);
      }
      outputs.put(rows, number, tile, out, total, loaded);
    }
  }
}
