// What one_row and few_rows (few_rows.cu) share: which matrices, tiles and segments a block computes, and the copies of their weights.

constexpr int STAGES = 2;          // of a warp's ring
constexpr int MOST_THREADS = 256;  // they limit the registers; cuda/kernels/few_rows.py has the same
constexpr int NONE = 0, SWIGLU = 1, SWIGLU_CLAMPED = 2, GELU = 3;
constexpr int HALVES_TYPE = 1;  // ggml's number of F16

// Up to three matrices, with their biases. kind: ggml's number of the type, and, 8 bits higher, the bytes of a segment of a tile; tile:
// the bytes of a tile.
struct Matrices {
  const unsigned char *a, *b, *c;
  const float *a_bias, *b_bias, *c_bias;
  int a_kind, b_kind, c_kind, a_tile, b_tile, c_tile;
};

// A tile of one matrix. last: the bytes of its last segment.
struct __align__(16) Entry {
  const uint8_t* data;
  int kind, last;
};

// An item: a segment of an entry, of which a block has one for each of its tiles, or two, if matrices are side by side.
struct Item {
  int entry, segment;
};

// What a block of threads computes, and a warp's place in it.
struct Work {
  const Matrices& of;
  bool paired;
  int second, third, n_tiles, my_tiles, n_segments, n_entries, stage_bytes, entry_steps, segment_steps, last_pairs;
  uint32_t first_tile;   // of the expert
  uint8_t* ring;         // of the warp
  Entry* entries;        // of the block, and what follows in shared memory; cuda/kernels/few_rows.py has the same
  float* after_entries;
  Item now, next;        // those computed and requested next
  int stage = 0;         // of the ring: filled next, then computed next
  // Floats between outputs' sums, no multiple of 16, so that at most two lanes meet a bank; and between entries'.
  int of_sums, of_entry;

  // tiles_each: the most tiles of a block. entry_steps, segment_steps: the number of warps, divided by the number of segments.
  __device__ __forceinline__ Work(const Matrices& of, uint8_t* memory, int activation, int second, int third, int n_out, int n_in,
                                  int shift, int stage_bytes, int tiles_each, int entry_steps, int segment_steps)
      : of(of), paired(activation == SWIGLU || activation == SWIGLU_CLAMPED), second(second), third(third), stage_bytes(stage_bytes),
        entry_steps(entry_steps), segment_steps(segment_steps), first_tile(0) {
    int warp = threadIdx.x / 32, blocks = static_cast<int>(gridDim.x), n_blocks = n_in / 32;
    n_tiles = (n_out + 15) / 16, n_segments = (n_blocks + SEGMENT - 1) / SEGMENT;
    last_pairs = (n_blocks - (n_segments - 1) * SEGMENT + 1) / 2;
    bool has_last = static_cast<int>(blockIdx.x) < n_tiles - (tiles_each - 1) * blocks;
    my_tiles = has_last ? tiles_each : tiles_each - 1, n_entries = my_tiles * sides();
    ring = memory + warp * STAGES * stage_bytes;
    entries = reinterpret_cast<Entry*>(memory + blockDim.x / 32 * STAGES * stage_bytes);
    after_entries = reinterpret_cast<float*>(entries + tiles_each * sides());
    now = {0, warp};
#pragma unroll 1
    for (; now.segment >= n_segments; now.segment -= n_segments) now.entry++;
    next = now;
    int n_fours = (n_segments + 3) / 4;
    of_sums = 4 * (n_fours + (n_fours % 4 == 0)), of_entry = of_sums * 16 << shift;
  }
  template <class T>
  static __device__ __forceinline__ T one_of(int matrix, T of_a, T of_b, T of_c) {
    return matrix == 0 ? of_a : matrix == 1 ? of_b : of_c;
  }
  __device__ __forceinline__ int sides() const { return paired ? 2 : 1; }
  // The number among all tiles of one of the block's; the matrix of a tile of several below another, and its number within it.
  __device__ __forceinline__ int tile_of(int mine) const { return static_cast<int>(blockIdx.x + mine * gridDim.x); }
  __device__ __forceinline__ int matrix_of(int tile) const { return (tile >= second) + (tile >= third); }
  __device__ __forceinline__ int within(int tile) const { return tile - (tile < second ? 0 : tile >= third ? third : second); }
  __device__ __forceinline__ const float* bias_of(int tile) const { return one_of(matrix_of(tile), of.a_bias, of.b_bias, of.c_bias); }
  __device__ __forceinline__ Entry entry_of(int i) const {
    int tile = tile_of(paired ? i / 2 : i), matrix = paired ? i % 2 : matrix_of(tile);
    int of_tile = one_of(matrix, of.a_tile, of.b_tile, of.c_tile), kind = one_of(matrix, of.a_kind, of.b_kind, of.c_kind);
    const uint8_t* data = one_of(matrix, of.a, of.b, of.c);
    uint32_t number = first_tile + within(tile);
    return {data + static_cast<uint64_t>(number) * of_tile, kind, of_tile - (n_segments - 1) * (kind >> 8)};
  }
  // Ends with no barrier.
  __device__ __forceinline__ void put_entries() const {
    for (int i = threadIdx.x; i < n_entries; i += blockDim.x) entries[i] = entry_of(i);
  }
  __device__ __forceinline__ void advance(Item& item) const {
    int segment = item.segment + segment_steps, over = segment - n_segments;
    item.entry += entry_steps + (over >= 0), item.segment = over >= 0 ? over : segment;
  }
  __device__ __forceinline__ int n_pairs(int segment) const { return segment == n_segments - 1 ? last_pairs : MOST_PAIRS; }
  // Copies the weights of the warp's next item, if it has one, with all its lanes; zeros behind a segment that is not whole.
  // HAS_ENTRIES: after put_entries and a barrier.
  template <bool HAS_ENTRIES>
  __device__ __forceinline__ void request() {
    if (next.entry < n_entries) {
      constexpr int AT_ONCE = 3072;  // all of a segment of most types
      Entry entry = HAS_ENTRIES ? entries[next.entry] : entry_of(next.entry);
      int lane = threadIdx.x % 32, whole = entry.kind >> 8, n_bytes = next.segment == n_segments - 1 ? entry.last : whole;
      const uint8_t* from = entry.data + (next.segment * whole + lane * 16);
      uint8_t* to = ring + (stage * stage_bytes + lane * 16);
#pragma unroll 1
      for (int left = n_bytes - lane * 16; left > 0; left -= AT_ONCE, from += AT_ONCE, to += AT_ONCE)
#pragma unroll
        for (int k = 0; k < AT_ONCE; k += 512)
          if (k < left) copy16(to + k, from + k);
      if (n_bytes != whole)
#pragma unroll 1
        for (int i = n_bytes + lane * 16; i < whole; i += 512) copy16(ring + stage * stage_bytes + i, entry.data, false);
    }
    end_of_copies();
    advance(next);
  }
  // Fills the ring's first stages, up to a number of them.
  __device__ __forceinline__ void request_until(int stages) {
#pragma unroll 1
    for (; stage < stages; stage++) request<false>();
  }
  // Calls compute(weights, segment, n_pairs, type, sums) for the warp's items of tiles from number `done` to `end`, and requests later
  // ones. After request_until(STAGES), put_entries and a barrier. sums: the place of the item's in `of_tiles`, those of tile `done` on.
  template <class Compute>
  __device__ __forceinline__ void for_items(int done, int end, float* of_tiles, const Compute& compute) {
#pragma unroll 1
    for (; now.entry < end * sides(); advance(now)) {
      stage = stage < STAGES ? stage : 0;
      wait_for_copies<STAGES - 1>();
      __syncwarp(ALL_LANES);
      compute(ring + stage * stage_bytes, now.segment, n_pairs(now.segment), entries[now.entry].kind & 255,
              of_tiles + ((now.entry - done * sides()) * of_entry + now.segment));
      __syncwarp(ALL_LANES);
      request<true>();
      stage++;
    }
  }
  // Sums are read four at a time: zeros after the last of each output.
  __device__ __forceinline__ void pad_sums(float* sums, int n) const {
    if (n_segments % 4 == 0) return;
    for (int i = threadIdx.x; i < n / of_sums; i += blockDim.x)
      for (int segment = n_segments; segment % 4; segment++) sums[i * of_sums + segment] = 0.0f;
  }
};

// The sum of the segments of an output, in their order, for each of up to two sides.
template <int SIDES>
__device__ __forceinline__ void sums_of_segments(const float* from, int of_entry, int n_segments, float (&sums)[2]) {
  constexpr int TOGETHER = 4;
  int n_fours = (n_segments + 3) / 4;
  float of[SIDES] = {};
#pragma unroll 1
  for (int first = 0; first < n_fours; first += TOGETHER) {
    float4 fours[SIDES][TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++)
#pragma unroll
      for (int side = 0; side < SIDES; side++) {
        fours[side][k] = {};
        if (first + k < n_fours) fours[side][k] = *reinterpret_cast<const float4*>(from + side * of_entry + (first + k) * 4);
      }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++)
#pragma unroll
      for (int side = 0; side < SIDES; side++) {
        const float4& four = fours[side][k];
        of[side] = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(of[side], four.x), four.y), four.z), four.w);
      }
  }
#pragma unroll
  for (int side = 0; side < SIDES; side++) sums[side] = of[side];
}

// The same for one matrix, or two side by side.
__device__ __forceinline__ void sums_of_output(const Work& work, const float* from, float (&sums)[2]) {
  if (work.paired)
    sums_of_segments<2>(from, work.of_entry, work.n_segments, sums);
  else
    sums_of_segments<1>(from, work.of_entry, work.n_segments, sums);
}

// Where an output goes, and what is added to it: biases of both matrices, or bias and residual.
struct Output {
  long long at;
  float first, second;
  bool has_first, has_second;
};

// The output, given the sums of one matrix or of two side by side.
__device__ __forceinline__ float finished(const Output& output, int activation, float sum, float other) {
  if (output.has_first) sum = __fadd_rn(sum, output.first);
  if (activation == NONE || activation == GELU) {
    if (output.has_second) sum = __fadd_rn(sum, output.second);
    return activation == GELU ? gelu(sum) : sum;
  }
  if (output.has_second) other = __fadd_rn(other, output.second);
  return activation == SWIGLU ? swiglu(sum, other) : swiglu_clamped(sum, other);
}
