// What one_row.cu and few_rows.cu share: what they compute, with which matrices, tiles and segments, and the copies of their weights.
//
// Products with quantised weights, of which a decode step mostly consists, for all types and uses:
//
//   activation          matrices (n_out, n_in)                        y (n_rows, n_out)
//   NONE                up to three, one below another: a, b, c       x Wᵀ + bias + residual
//   GELU                a                                             gelu(x aᵀ + bias)
//   SWIGLU              a (gate) and b (up), side by side             swiglu(x aᵀ + bias, x bᵀ + bias)
//   SWIGLU_CLAMPED      likewise                                      swiglu_clamped(…)
//
// The order of additions is that of matmul.cu; the same bits as rows64_* followed by activation.cu. The matrices may differ in
// type, but F16, which reads halves, is only beside F16. Biases (n_out,) and residual (n_rows, n_out) float32, or null; squares
// (n_rows, n_out / 16), the sums of squares of y (norm.cuh), or null. Groups of experts as in matmul.cu, for one matrix or two
// side by side.
//
// A block of threads computes tiles of 16 outputs, number blockIdx.x, blockIdx.x + gridDim.x, …. An item is a segment of one
// tile of one matrix. The items of a block are divided among its warps in turn. Each warp copies the weights of its next items
// into a ring of stages in shared memory, and requests the first before the previous kernel has ended, so that the memory
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
// Launch: block: plan.warps warps. Grid: x plan.blocks, any number up to the number of tiles; y groups of 8 rows. Dynamic shared
// memory: `shared_bytes` in cuda/kernels/few_rows.py. A block takes at most half a multiprocessor's registers and shared memory.
// Small products have one block for each multiprocessor, beside which those of the next kernels can already wait; large products
// have two. May be launched to overlap with the previous kernel.

constexpr int STAGES = 2;          // of a warp's ring
constexpr int MOST_THREADS = 256;  // they limit the registers; cuda/kernels/few_rows.py has the same
constexpr int NONE = 0, SWIGLU = 1, SWIGLU_CLAMPED = 2, GELU = 3;
constexpr int HALVES_TYPE = 1;  // ggml's number of F16

// What a launch has: the bits of Plan::has, which say which arguments are not null.
// HAS_FORM: the rows are in the form that products read. HAS_KNOWN_GROUPS: the groups were there before the previous kernel that waits
// for them began to work; it lets the next one begin only then, so that one_row can read them before it waits.
constexpr int HAS_NORM = 1, HAS_BIAS = 2, HAS_RESIDUAL = 4, HAS_SQUARES = 8, HAS_GROUPS = 16, HAS_FORM = 32, HAS_KNOWN_GROUPS = 64;

// A launch, as Plan in cuda/kernels/few_rows.py, which has the same order.
//
// a_kind and so on: ggml's number of each matrix's type, and, 8 bits higher, the bytes of a segment of a tile; a_tile: the bytes of
// a tile. Matrices one below another begin with tiles 0, `second` and `third`; those side by side have the same shape. shift: the
// most rows in a block are 1 << shift. chunk: the tiles whose sums are in shared memory together. stage_bytes: those of an item.
// tiles_each: the most tiles of a block.
struct Plan {
  int a_kind;
  int b_kind;
  int c_kind;
  int a_tile;
  int b_tile;
  int c_tile;
  int second;
  int third;
  int activation;
  int has;
  int n_out;
  int n_in;
  int blocks;
  int warps;
  int shift;
  int chunk;
  int stage_bytes;
  int tiles_each;
};

// Up to three matrices, with their biases.
struct Matrices {
  const unsigned char *a, *b, *c;
  const float *a_bias, *b_bias, *c_bias;
};

// A tile of one matrix. last: the bytes of its last segment.
struct __align__(16) Entry {
  const uint8_t* data;
  int kind, last;
};

// An item: a segment of an entry, of which a block has one for each of its tiles, or two, if matrices are side by side. Its number
// is major · n_minor + minor. Usually a major is an entry. If a block has several rows, and all sums of its tiles have room, it is a
// segment, so that warps read the same activations at the same time, and not each of them from the second-level cache.
struct Item {
  unsigned major, minor;
};

// What a block of threads computes, and a warp's place in it.
struct Work {
  const Plan& plan;
  const Matrices& of;
  bool paired, by_segment;
  int n_tiles, my_tiles, last_pairs;
  unsigned n_segments, n_entries;
  Item step;             // from an item of the warp to the next one
  uint32_t first_tile;   // of the expert
  uint8_t* ring;         // of the warp
  Entry* entries;        // of the block, and what follows in shared memory; cuda/kernels/few_rows.py has the same
  float* after_entries;
  Item now, next;        // those computed and requested next
  int stage = 0;         // of the ring: filled next, then computed next
  // Floats between outputs' sums, no multiple of 16, so that at most two lanes meet a bank; and between entries'.
  int of_sums, of_entry;

  __device__ __forceinline__ Work(const Plan& plan, const Matrices& of, uint8_t* memory)
      : plan(plan), of(of), paired(plan.activation == SWIGLU || plan.activation == SWIGLU_CLAMPED),
        by_segment(plan.shift > 0 && plan.chunk >= plan.tiles_each), first_tile(0) {
    unsigned warp = threadIdx.x / 32;
    int n_blocks = plan.n_in / 32;
    n_tiles = (plan.n_out + 15) / 16, n_segments = (n_blocks + SEGMENT - 1) / SEGMENT;
    last_pairs = (n_blocks - (n_segments - 1) * SEGMENT + 1) / 2;
    int n_last = n_tiles - (plan.tiles_each - 1) * plan.blocks;  // blocks with so many tiles
    my_tiles = n_last == plan.blocks || static_cast<int>(blockIdx.x) < n_last ? plan.tiles_each : plan.tiles_each - 1;
    n_entries = my_tiles * sides();
    ring = memory + warp * STAGES * plan.stage_bytes;
    entries = reinterpret_cast<Entry*>(memory + plan.warps * STAGES * plan.stage_bytes);
    after_entries = reinterpret_cast<float*>(entries + plan.tiles_each * sides());
    unsigned n_minor = this->n_minor(), n_warps = plan.warps;
    now = next = n_warps <= n_minor ? Item{0, warp} : Item{warp / n_minor, warp % n_minor};
    step = {n_warps / n_minor, n_warps % n_minor};
    int n_fours = (n_segments + 3) / 4;
    of_sums = 4 * (n_fours + (n_fours % 4 == 0)), of_entry = of_sums * 16 << plan.shift;
  }
  template <class T>
  static __device__ __forceinline__ T one_of(int matrix, T of_a, T of_b, T of_c) {
    return matrix == 0 ? of_a : matrix == 1 ? of_b : of_c;
  }
  __device__ __forceinline__ int sides() const { return paired ? 2 : 1; }
  // The number among all tiles of one of the block's; the matrix of a tile of several below another, and its number within it.
  __device__ __forceinline__ int tile_of(int mine) const { return static_cast<int>(blockIdx.x) + mine * plan.blocks; }
  __device__ __forceinline__ bool is_several() const { return plan.second < n_tiles; }
  __device__ __forceinline__ int matrix_of(int tile) const {
    return is_several() ? (tile >= plan.second) + (tile >= plan.third) : 0;
  }
  __device__ __forceinline__ int within(int tile) const {
    return is_several() ? tile - (tile < plan.second ? 0 : tile >= plan.third ? plan.third : plan.second) : tile;
  }
  __device__ __forceinline__ const float* bias_of(int tile) const {
    return plan.has & HAS_BIAS ? one_of(matrix_of(tile), of.a_bias, of.b_bias, of.c_bias) : nullptr;
  }
  __device__ __forceinline__ const float* other_bias() const { return plan.has & HAS_BIAS && paired ? of.b_bias : nullptr; }
  // Whether an output of a tile exists.
  __device__ __forceinline__ bool has_output(int tile, int out) const { return plan.n_out % 16 == 0 || tile * 16 + out < plan.n_out; }
  __device__ __forceinline__ Entry entry_of(unsigned i) const {
    int tile = tile_of(paired ? i / 2 : i), matrix = paired ? i % 2 : matrix_of(tile);
    int of_tile = one_of(matrix, plan.a_tile, plan.b_tile, plan.c_tile), kind = one_of(matrix, plan.a_kind, plan.b_kind, plan.c_kind);
    const uint8_t* data = one_of(matrix, of.a, of.b, of.c);
    uint32_t number = first_tile + within(tile);
    return {data + static_cast<uint64_t>(number) * of_tile, kind, of_tile - static_cast<int>(n_segments - 1) * (kind >> 8)};
  }
  // Whether entries are kept in a table, because computing them takes longer than loading them.
  __device__ __forceinline__ bool has_table() const { return !IS_PLANNED || is_several(); }
  // Ends with no barrier.
  __device__ __forceinline__ void put_entries() const {
    if (!has_table()) return;
    for (unsigned i = threadIdx.x; i < n_entries; i += plan.warps * 32) entries[i] = entry_of(i);
  }
  __device__ __forceinline__ unsigned n_minor() const { return by_segment ? n_entries : n_segments; }
  __device__ __forceinline__ unsigned entry(const Item& item) const { return by_segment ? item.minor : item.major; }
  __device__ __forceinline__ unsigned segment(const Item& item) const { return by_segment ? item.major : item.minor; }
  // Whether an item is one of the first n_tiles of the block.
  __device__ __forceinline__ bool is_within(const Item& item, int n_tiles) const {
    return item.major < (by_segment ? n_segments : static_cast<unsigned>(n_tiles * sides()));
  }
  __device__ __forceinline__ void advance(Item& item) const {
    unsigned minor = item.minor + step.minor;
    bool is_over = minor >= n_minor();
    item.major += step.major + is_over, item.minor = is_over ? minor - n_minor() : minor;
  }
  __device__ __forceinline__ int n_pairs(unsigned segment) const { return segment == n_segments - 1 ? last_pairs : MOST_PAIRS; }
  // Copies the weights of the warp's next item, if it has one, with all its lanes; zeros behind a segment that is not whole.
  // HAS_ENTRIES: after put_entries and a barrier.
  template <bool HAS_ENTRIES>
  __device__ __forceinline__ void request() {
    if (is_within(next, my_tiles)) {
      constexpr int AT_ONCE = 3072;  // all of a segment of most types
      Entry entry = HAS_ENTRIES && has_table() ? entries[this->entry(next)] : entry_of(this->entry(next));
      int lane = threadIdx.x % 32, whole = entry.kind >> 8, n_bytes = segment(next) == n_segments - 1 ? entry.last : whole;
      const uint8_t* from = entry.data + (segment(next) * whole + lane * 16);
      uint8_t* to = ring + (stage * plan.stage_bytes + lane * 16);
#pragma unroll 1
      for (int first = 0; first < n_bytes; first += AT_ONCE)
#pragma unroll
        for (int k = 0; k < AT_ONCE; k += 512)
          if ((IS_PLANNED && first + k + 512 <= n_bytes) || first + k + lane * 16 < n_bytes) copy16(to + first + k, from + first + k);
      if (n_bytes != whole)
#pragma unroll 1
        for (int i = n_bytes + lane * 16; i < whole; i += 512) copy16(ring + stage * plan.stage_bytes + i, entry.data, false);
    }
    end_of_copies();
    advance(next);
  }
  // Fills the ring's stages.
  __device__ __forceinline__ void request_first() {
#pragma unroll 1
    for (; stage < STAGES; stage++) request<false>();
  }
  // Calls compute(weights, segment, n_pairs, type, sums) for the warp's items of tiles from number `done` to `end`, and requests later
  // ones. After request_first, put_entries and a barrier. sums: the place of the item's in `of_tiles`, those of tile `done` on.
  template <class Compute>
  __device__ __forceinline__ void for_items(int done, int end, float* of_tiles, const Compute& compute) {
#pragma unroll 1
    for (; is_within(now, end); advance(now)) {
      stage = stage < STAGES ? stage : 0;
      wait_for_copies<STAGES - 1>();
      __syncwarp(ALL_LANES);
      unsigned entry = this->entry(now), segment = this->segment(now);
      int kind = has_table() ? entries[entry].kind : entry % 2 && paired ? plan.b_kind : plan.a_kind;
      compute(ring + stage * plan.stage_bytes, segment, n_pairs(segment), kind & 255,
              of_tiles + ((entry - done * sides()) * of_entry + segment));
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
        if (first + k >= n_fours) continue;
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
