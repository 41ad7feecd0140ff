// Products with quantised weights: y[t, o] = Σ_k W[o, k] x[t, k] + bias[o] + residual[t, o], for more rows than few_rows.cu has,
// with one order of additions for both.
//
// Array code: refengine.ops.linear.linear and linear_experts. Activations are integers of two signed bytes, 256 h + l, with a power
// of two for every segment of 256 columns, and with sums of 16 columns (quantize_rows.cuh). Weights are as in layout.py. y (n_rows,
// n_out) float32; bias (n_out,) and residual (n_rows, n_out) float32 or null.
//
// Order of additions, the same for every n_rows, every grouping of rows, and the kernels of few_rows.cu (matmul_plain.cuh has it as
// a plain loop):
//   in a segment   K types: Σ code · h · scale, Σ code · l · scale, and Σ of sums of activations times minimums (Q6_K: times
//                  scales) are integers, exact in any order; integer_sum makes a float of them. Other types: the integer sum of a
//                  block of 32 columns is rounded to a float and multiplied with the block's scale (block_sum), block j + n_pairs
//                  is added to block j, and a segment is ((pair 0 + pair 1) + (pair 2 + pair 3)).
//   row            y = ((s0 + s1) + s2) + …, each segment times its row's power of two; then + bias, then + residual
// F16 weights are multiplied with halves instead: see half_sums in matmul.cuh.
//
// rows64_*: a block of threads multiplies `tiles` tiles of 16 outputs with 32 or 64 rows, each of its warps one tile with 32 rows.
// Segment after segment, all threads copy the rows and the tiles to a stage of shared memory, while the warps multiply what is in
// another one, with one barrier for each. A warp keeps the sums of its 16 x 32 outputs, and converts codes once for its rows:
//
//   stage        0          1          2          0          …
//   copied       segment 0  segment 1  segment 2  segment 3
//   multiplied                         segment 0  segment 1  …          (with three stages)
//
// rows64_parts_*, for few tiles and rows: the block has 2, 4 or 8 parts of so many warps, and a stage has a segment for each. After
// each stage, the parts leave their sums in shared memory, where they are added in the order of segments, by all warps.
//
// Launch: ManyRowsLaunch in cuda/kernels/matmul.py. Block: 32 · row warps · tiles · parts threads; row_shift and depth_shift are the
// binary logarithms of row warps and parts. Grid: x groups of 32 · row warps rows, y groups of `tiles` tiles; z groups of experts. So
// blocks that run at the same time read the same tiles, and weights come from memory once, rows from the second-level cache. May be
// launched to overlap with the previous kernel.
//
// Experts: with groups (from group_experts, moe.cu), group blockIdx.z is (expert, first slot, number of slots), up to 64 of them. Slot
// s reads row x_rows[s] of the activations and writes row y_rows[s] of y; bias is (n_expert, n_out). Without groups, slots are the
// rows in order. rows64_f16: grid x groups of n_warps tiles, y groups of 64 rows, or of an expert.
#include "arguments.cuh"
#include "quants.cuh"
#include "matmul.cuh"
#include "quantize_rows.cuh"
#include "eight_rows.cuh"

// copy16 for four bytes.
#ifdef HOSTCUDA
inline void copy4(void* to, const void* from) { *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from); }
#else
__device__ __forceinline__ void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
#endif

constexpr int ROW_PITCH = ROW_BYTES + 4 * ROW_SUMS;  // of a row's segment in shared memory: bytes, then sums
constexpr int MMA_ROWS = 8;                          // rows of an mma, a group

constexpr int MANY_ROWS = 64, WARP_ROWS = 32;  // the most rows of a group, and of a warp
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool IS_HOPPER = false;
#else
constexpr bool IS_HOPPER = true;  // or newer
#endif

// Adds the sums of a segment, times its scale, to those of G groups of eight rows from number FIRST on: of[4 g + v]. rows: their
// activations, ROW_PITCH bytes each. UNROLLED: see eight_row_sums.
template <class Q, int FIRST, int G, int UNROLLED, int MOST>
__device__ __forceinline__ void add_segment(const Planes& w, int n_pairs, unsigned lane, const uint8_t* rows,
                                            const float* scales_of_rows, float (&of)[MOST]) {
  unsigned c = lane % 4;
  rows += FIRST * MMA_ROWS * ROW_PITCH;
  const uint8_t* row = rows + lane / 4 * ROW_PITCH;
  auto sums_at = [](const uint8_t* row) { return reinterpret_cast<const int*>(row + ROW_BYTES); };
  eight_row_sums<Q, G, UNROLLED>(
      w, n_pairs, lane, [&](int g) { return row + c * 16 + g * MMA_ROWS * ROW_PITCH; },
      [&](int g) { return sums_at(row + g * MMA_ROWS * ROW_PITCH); },
      [&](int g, int i) { return sums_at(rows + (g * MMA_ROWS + 2 * c + i) * ROW_PITCH); },
      [&](int g, const float (&sums)[4]) {
        float2 scale = load_near<float2>(scales_of_rows + (FIRST + g) * MMA_ROWS + 2 * c);
#pragma unroll
        for (int v = 0; v < 4; v++) {
          float& to = of[4 * (FIRST + g) + v];
          to = __fadd_rn(to, __fmul_rn(sums[v], v % 2 ? scale.y : scale.x));
        }
      });
}

// Threads of a block, which limit the registers; cuda/kernels/matmul.py has the same.
template <class Q, bool PARTS>
constexpr int MOST_THREADS = Q::HALVES && PARTS ? 384 : 512;

// Adds bias and residual, and stores.
__device__ __forceinline__ void store(float value, const Rows& rows, int number, int out, const float* bias, const float* residual,
                                      float* y, int n_out) {
  if (number >= rows.count || out >= n_out) return;
  if (bias) value = __fadd_rn(value, bias[static_cast<long long>(rows.expert) * n_out + out]);
  long long at = place_of(rows, number, out, n_out);
  y[at] = residual ? __fadd_rn(value, residual[at]) : value;
}

// Waits for the oldest of n_stages - 1 stages that are on the way.
__device__ __forceinline__ void wait_for_stage(int n_stages) {
  switch (n_stages) {
    case 2: return wait_for_copies<0>();
    case 3: return wait_for_copies<1>();
    default: return wait_for_copies<2>();
  }
}

// What a warp of a block multiplies: segments number `part`, part + depth, … of its tile, with 32 rows from number `first` on.
// in_part: its number among the warps of its part.
struct Share {
  unsigned lane, part, in_part, tile, first;
};
// From the thread's number; not kept meanwhile, so that it takes no registers.
__device__ __forceinline__ Share own_share(int row_shift, int depth_shift) {
  unsigned thread = computed_anew(threadIdx.x), warp = thread / 32, in_part = warp >> depth_shift, tile = in_part >> row_shift;
  return {thread % 32, warp - (in_part << depth_shift), in_part, tile, (in_part - (tile << row_shift)) * WARP_ROWS};
}

// Multiplies a block's tiles with its rows. PARTS: the block has several parts.
template <class Q, bool PARTS>
__device__ __forceinline__ void many_rows(uint8_t* memory, const Tiles& w, const Activations& x, const Groups& groups, int n_rows,
                                          const float* bias, const float* residual, float* y, int n_out, int capacity, int row_shift,
                                          int depth_shift, int n_stages) {
  constexpr int AT_ONCE = !Q::INTEGER && Q::HAS_MINIMUM ? 2 : 4;  // groups of eight rows, as many as the registers allow
  constexpr int UNROLLED = Q::HALVES || (IS_HOPPER && !PARTS) ? MOST_PAIRS : 1;  // likewise; unrolled, it is a tenth shorter
  constexpr int OF_PAIR = 32 * (Q::LOW + Q::HIGH), OF_SCALES = 32 * Q::SCALES + 8 * Q::WHOLE;
  constexpr int OF_TILE = MOST_PAIRS * OF_PAIR + OF_SCALES;  // bytes of a whole segment of a tile
  constexpr int VALUES = WARP_ROWS / 2;                      // of a lane: of its rows and outputs
  if constexpr (!PARTS) depth_shift = 0;
  int depth = 1 << depth_shift;
  unsigned part_threads = blockDim.x >> depth_shift, part_warps = part_threads / 32;
  unsigned tiles_each = part_warps >> row_shift, most_rows = WARP_ROWS << row_shift;
  int n_tiles = (n_out + 15) / 16, n_segments = w.n_segments();
  auto own_rows = [&] {
    Rows rows{0, 0, n_rows, groups.x_rows, groups.y_rows};
    if (groups.group) {
      const int* group = groups.group + 3 * blockIdx.z;
      rows.expert = group[0], rows.first = group[1], rows.count = group[2];
    }
    int most = most_rows, skipped = blockIdx.x * most_rows;
    rows.first += skipped, rows.count = min(rows.count - skipped, most);
    return rows;
  };
  let_next_begin();
  wait_for_previous();
  Rows rows = own_rows();
  if (rows.count <= 0) return;

  // Shared memory, for `capacity` rows: the numbers of their first segments; stages, each with `depth` segments of rows, scales of
  // rows, and tiles; and, of several parts, twice the sums of all warps. cuda/kernels/matmul.py has the same.
  uint32_t* first_of = reinterpret_cast<uint32_t*>(memory);
  uint8_t* stages = memory + capacity * 4;
  unsigned rows_bytes = capacity * ROW_PITCH, segment_bytes = rows_bytes + capacity * 4 + tiles_each * OF_TILE;
  unsigned stage_bytes = segment_bytes << depth_shift;
  float* sums_of_warps = reinterpret_cast<float*>(stages + n_stages * stage_bytes);  // (2, part_warps, depth, VALUES, 32)
  for (int i = threadIdx.x; i < capacity; i += blockDim.x) first_of[i] = rows.of_x(min(i, rows.count - 1)) * n_segments;
  __syncthreads();

  unsigned n_copied = (rows.count + 15) / 16 * 16;  // the last row stands for those that do not exist
  auto out_tile_of = [&](const Share& own) { return static_cast<int>(blockIdx.y * tiles_each + own.tile); };
  // Of eight rows of the warp; none if that is below 1.
  auto groups_of = [&](const Share& own) {
    return out_tile_of(own) < n_tiles ? (rows.count - static_cast<int>(own.first) + MMA_ROWS - 1) / MMA_ROWS : 0;
  };
  uint32_t tile_bytes = (w.n_blocks + 1) / 2 * OF_PAIR + n_segments * OF_SCALES;  // of all segments
  const uint8_t* of_matrix = w.data + static_cast<uint64_t>(rows.expert) * n_tiles * tile_bytes;
  auto n_pairs_of = [&](int segment) { return Q::INTEGER ? MOST_PAIRS : w.n_pairs(segment); };  // K types have whole segments
  // Copies the segment of the warp's part to a stage.
  auto request = [&](unsigned base, unsigned stage) {
    Share own = own_share(row_shift, depth_shift);
    unsigned segment = base + own.part, lane = own.lane;
    if (segment < static_cast<unsigned>(n_segments)) {
      uint8_t* to = stages + stage * stage_bytes + own.part * segment_bytes;
      const uint8_t* columns = x.x + segment * ROW_BYTES + lane * 16;
#pragma unroll 2
      for (unsigned i = own.in_part; i < n_copied; i += part_warps)
        copy16(to + i * ROW_PITCH + lane * 16, columns + static_cast<uint64_t>(first_of[i]) * ROW_BYTES);
#pragma unroll 1
      for (unsigned i = own.in_part * 32 + lane; i < 4 * n_copied; i += part_threads) {
        uint32_t at = first_of[i / 4] + segment;
        copy16(to + i / 4 * ROW_PITCH + ROW_BYTES + i % 4 * 16, x.sums + static_cast<uint64_t>(at) * ROW_SUMS + i % 4 * 4);
        if (i % 4 == 0) copy4(to + rows_bytes + i, x.scale + at);
      }
      uint64_t of_tile = min(out_tile_of(own), n_tiles - 1);
      const uint8_t* from = of_matrix + of_tile * tile_bytes + segment * OF_TILE;
      to += rows_bytes + capacity * 4 + own.tile * OF_TILE;
      unsigned n_bytes = n_pairs_of(segment) * OF_PAIR + OF_SCALES;
#pragma unroll 1
      for (unsigned i = (own.first + lane) * 16; i < n_bytes; i += most_rows * 16) copy16(to + i, from + i);
    }
    end_of_copies();
  };
#pragma unroll 1
  for (int i = 0; i < n_stages - 1; i++) request(i << depth_shift, i);

  float total[VALUES] = {};  // in the order of add_segment; of several parts, each has every depth-th, from number `part` on
  auto of_warps = [&](int half, const Share& own) {
    return sums_of_warps + (half * part_warps + own.in_part) * depth * VALUES * 32 + own.lane;
  };
  // Adds the segments' sums that the parts have left for a tile and its rows, ascending.
  auto add_parts = [&](int base, int half, const Share& own) {
    const float* from = of_warps(half, own) + own.part * 32;
    int n_parts = min(depth, n_segments - base);
#pragma unroll
    for (int m = 0; m < VALUES / 2; m++)
      if (m << depth_shift < VALUES)
#pragma unroll 2
        for (int i = 0; i < n_parts; i++) total[m] = __fadd_rn(total[m], from[(i * VALUES + (m << depth_shift)) * 32]);
  };
  int current = 0, next = n_stages - 1, half = 0;  // stages, and half of sums_of_warps
#pragma unroll 1
  for (int base = 0; base < n_segments; base += depth) {
    wait_for_stage(n_stages);
    __syncthreads();  // now the stage is there, and all have done with the one before
    request(base + ((n_stages - 1) << depth_shift), next);
    Share own = own_share(row_shift, depth_shift);
    int segment = base + own.part, n_groups = groups_of(own);
    if (PARTS && n_groups > 0 && base) add_parts(base - depth, half ^ 1, own);
    if (n_groups > 0 && segment < n_segments) {
      const uint8_t *stage = stages + current * stage_bytes + own.part * segment_bytes, *near = stage + own.first * ROW_PITCH;
      const float* scales = reinterpret_cast<const float*>(stage + rows_bytes) + own.first;
      int n_pairs = n_pairs_of(segment);
      Planes planes = planes_at<Q>(stage + rows_bytes + capacity * 4 + own.tile * OF_TILE, n_pairs);
      auto add_to = [&](float (&of)[VALUES]) {
        if (AT_ONCE == 4 && n_groups > 2) {
          add_segment<Q, 0, AT_ONCE, UNROLLED>(planes, n_pairs, own.lane, near, scales, of);
        } else {
          add_segment<Q, 0, 2, UNROLLED>(planes, n_pairs, own.lane, near, scales, of);
          if constexpr (AT_ONCE == 2)
            if (n_groups > 2) add_segment<Q, 2, 2, UNROLLED>(planes, n_pairs, own.lane, near, scales, of);
        }
      };
      if constexpr (PARTS) {
        float of[VALUES] = {}, *to = of_warps(half, own) + own.part * VALUES * 32;
        add_to(of);
#pragma unroll
        for (int i = 0; i < VALUES; i++) to[i * 32] = of[i];
      } else {
        add_to(total);
      }
    }
    half ^= 1;
    current = current + 1 == n_stages ? 0 : current + 1, next = next + 1 == n_stages ? 0 : next + 1;
  }
  Share own = own_share(row_shift, depth_shift);
  if constexpr (PARTS) {  // a tile's first part gets the totals of the others
    __syncthreads();
    if (groups_of(own) > 0) add_parts((n_segments - 1) >> depth_shift << depth_shift, half ^ 1, own);
    float* totals = of_warps(half, own);
#pragma unroll
    for (int m = 0; m < VALUES / 2; m++)
      if (m << depth_shift < VALUES) totals[((m << depth_shift) + own.part) * 32] = total[m];
    __syncthreads();
    if (own.part) return;
#pragma unroll
    for (int i = 0; i < VALUES; i++) total[i] = totals[i * 32];
  }
  rows = own_rows();  // again, so that they take no registers in the meantime
  int out_tile = out_tile_of(own), out = out_tile * 16 + own.lane / 4;
  float added[2] = {};
  if (bias)
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (out + 8 * i < n_out) added[i] = bias[static_cast<long long>(rows.expert) * n_out + out + 8 * i];
#pragma unroll
  for (int i = 0; i < WARP_ROWS / 4; i++) {
    int number = own.first + i / 2 * MMA_ROWS + own.lane % 4 * 2 + i % 2;
    if (number >= rows.count) continue;
    long long at = place_of(rows, number, out, n_out);
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (out + 8 * k < n_out) {
        float value = total[i / 2 * 4 + 2 * k + i % 2];
        if (bias) value = __fadd_rn(value, added[k]);
        y[at + 8 * k] = residual ? __fadd_rn(value, residual[at + 8 * k]) : value;
      }
  }
}

#define MANY_ROWS_OF(name, Q, PARTS)                                                                                             \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS<Q, PARTS>, 1)                                                        \
      name(const unsigned char* w, Activations x, Groups groups, const float* bias, const float* residual, float* y, int n_out,  \
           int n_in, int n_rows, int capacity, int row_shift, int depth_shift, int n_stages) {                                   \
    DYNAMIC_SHARED(uint8_t, memory);                                                                                             \
    many_rows<Q, PARTS>(memory, Tiles{w, n_in / 32}, x, groups, n_rows, bias, residual, y, n_out, capacity, row_shift,           \
                        depth_shift, n_stages);                                                                                  \
  }
MANY_ROWS_OF(rows64_q4_0, Q4_0, false)
MANY_ROWS_OF(rows64_parts_q4_0, Q4_0, true)
MANY_ROWS_OF(rows64_q4_1, Q4_1, false)
MANY_ROWS_OF(rows64_parts_q4_1, Q4_1, true)
MANY_ROWS_OF(rows64_q5_0, Q5_0, false)
MANY_ROWS_OF(rows64_parts_q5_0, Q5_0, true)
MANY_ROWS_OF(rows64_q5_1, Q5_1, false)
MANY_ROWS_OF(rows64_parts_q5_1, Q5_1, true)
MANY_ROWS_OF(rows64_q8_0, Q8_0, false)
MANY_ROWS_OF(rows64_parts_q8_0, Q8_0, true)
MANY_ROWS_OF(rows64_q4_k, Q4_K, false)
MANY_ROWS_OF(rows64_parts_q4_k, Q4_K, true)
MANY_ROWS_OF(rows64_q5_k, Q5_K, false)
MANY_ROWS_OF(rows64_parts_q5_k, Q5_K, true)
MANY_ROWS_OF(rows64_q6_k, Q6_K, false)
MANY_ROWS_OF(rows64_parts_q6_k, Q6_K, true)
MANY_ROWS_OF(rows64_mxfp4, MXFP4, false)
MANY_ROWS_OF(rows64_parts_mxfp4, MXFP4, true)

// The same for half-precision weights.
extern "C" __global__ void __launch_bounds__(128, 1)
    rows64_f16(const unsigned char* w, Activations x, Groups groups, const float* bias, const float* residual, float* y, int n_out,
               int n_in, int n_rows) {
  Rows rows = rows_of(groups, n_rows, MANY_ROWS);
  int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, n_tiles = (n_out + 15) / 16;
  int out_tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (out_tile >= n_tiles || !rows.count) return;
  Tiles tiles{w, n_in / 32};
  int n_segments = tiles.n_segments(), n_pairs = (n_in + 63) / 64;
  const uint8_t* weights = w + (static_cast<long long>(rows.expert) * n_tiles + out_tile) * n_pairs * 2048;
#pragma unroll 1
  for (int first = 0; first < rows.count; first += 8) {
    auto row = [&](int number) { return static_cast<long long>(rows.of_x(min(first + number, rows.count - 1))) * n_segments; };
    const uint8_t* columns = x.x + row(r) * ROW_BYTES + c * 16;
    const float* scale[2] = {x.scale + row(2 * c), x.scale + row(2 * c + 1)};
    float total[4] = {};
#pragma unroll 1
    for (int segment = 0; segment < n_segments; segment++) {
      MmaD of = half_sums<InGlobal>(weights + segment * MOST_PAIRS * 2048, tiles.n_pairs(segment), columns + segment * ROW_BYTES);
#pragma unroll
      for (int i = 0; i < 4; i++) total[i] = __fadd_rn(total[i], __fmul_rn(of.x[i], scale[i % 2][segment]));
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      store(total[i], rows, first + 2 * c + i % 2, out_tile * 16 + r + 8 * (i / 2), bias, residual, y, n_out);
  }
}
