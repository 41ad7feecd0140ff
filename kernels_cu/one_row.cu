// Products with quantised weights for one row of floats, or one row of each of several experts: what they are, and how they are
// divided among warps, is in few_rows.cuh. few_rows.cu has the kernel for more rows.
//
// What this kernel does between the end of the previous kernel and its own end takes as long as it has instructions in a row:
// there are few warps, and each instruction waits for the one before. So everything that does not need the previous kernel's
// results is done before the wait, the rest has no branches where it can, and a decode step has a kernel for each of its plans,
// of which all numbers are known to the compiler.
#include "arguments.cuh"
#include "quants.cuh"
#include "activation.cuh"
#include "matmul.cuh"
#include "norm.cuh"
#include "quantize_rows.cuh"
#include "few_rows.cuh"

// A lane's columns of up to LOADED segments, of which a warp has number warp, warp + n_warps, ….
constexpr int LOADED = 4;
struct Columns {
  float4 low[LOADED], high[LOADED];  // EightColumns
};

// The segments of the row that a warp converts.
struct OwnSegments {
  int n_segments, n_warps;
  // Whether segment number first + i n_warps + warp exists; the first part is the same for all warps.
  __device__ __forceinline__ bool has(int first, int i) const {
    return first + (i + 1) * n_warps <= n_segments || (some_have(first, i) && first + i * n_warps + number() < n_segments);
  }
  __device__ __forceinline__ bool some_have(int first, int i) const { return first + i * n_warps < n_segments; }
  static __device__ __forceinline__ int number() { return static_cast<int>(threadIdx.x) / 32; }
};

// The address of a lane's columns of the warp's first segment.
__device__ __forceinline__ const float* own_columns(const float* row) {
  int lane = threadIdx.x % 32;
  return row + (OwnSegments::number() * SEGMENT_COLUMNS + lane / 4 * 32 + lane % 4 * 4);
}

// Loads columns of the warp's segments from number `first` on, given the address of its first segment's, and how many columns the row
// has from the lane's block of that segment on; zeros after the row's end.
__device__ __forceinline__ void load_columns(Columns& columns, const float* own, const OwnSegments& segments, int first, int n_left,
                                             int n_in) {
  int step = segments.n_warps * SEGMENT_COLUMNS, begin = first * SEGMENT_COLUMNS;
#pragma unroll
  for (int i = 0; i < LOADED; i++) {
    columns.low[i] = columns.high[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (IS_PLANNED && !segments.some_have(first, i)) continue;
    bool exists = (IS_PLANNED && (first + (i + 1) * segments.n_warps) * SEGMENT_COLUMNS <= n_in) || begin + i * step < n_left;
    load_if(columns.low[i], own + begin + i * step, exists);
    load_if(columns.high[i], own + begin + i * step + 16, exists);
  }
}

// Converts N of a warp's segments, from number `segment` on, of which `columns` and `weights` begin with number i.
template <int N>
__device__ __forceinline__ void convert_columns(const Columns& columns, const Columns& weights, int i, int segment, int n_warps,
                                                bool is_normed, float factor, bool halves, uint8_t* bytes, int* sums, float* scale) {
  EightColumns x[N];
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float4 &low = columns.low[i + k], &high = columns.high[i + k], &of_low = weights.low[i + k], &of_high = weights.high[i + k];
    x[k] = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    EightColumns weight = {{of_low.x, of_low.y, of_low.z, of_low.w, of_high.x, of_high.y, of_high.z, of_high.w}};
    if (is_normed) x[k] = normed_columns(x[k], weight, factor);
  }
  Converted converted[N];
  convert(x, halves, converted);
#pragma unroll
  for (int k = 0; k < N; k++) {
    int at = segment + k * n_warps;
    put_segment(converted[k], bytes + at * ROW_BYTES, sums + at * ROW_SUMS, scale + at);
  }
}

__device__ __forceinline__ void multiply_one_row(uint8_t* memory, const Plan& plan, const Matrices& matrices, const Activations& x,
                                                 const Groups& groups, const float* residual, float* y, float* squares, float eps) {
  Work work(plan, matrices, memory);
  bool is_normed = plan.has & HAS_NORM, adds = plan.has & HAS_RESIDUAL;
  bool grouped = plan.has & HAS_GROUPS, knows_group = plan.has & HAS_KNOWN_GROUPS;
  if (!grouped) {
    let_next_begin();
    work.request_first();
  }

  int lane = threadIdx.x % 32, n_threads = plan.warps * 32, n_segments = work.n_segments, n_in = plan.n_in;
  // Shared memory after the entries, in this order; cuda/kernels/few_rows.py has the same.
  float* sums_of_items = work.after_entries;  // (2, chunk · sides, 16, of_sums)
  int half_of_sums = plan.chunk * work.sides() * work.of_entry;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (n_segments, ROW_BYTES)
  int* sums = reinterpret_cast<int*>(bytes + n_segments * ROW_BYTES);           // (n_segments, 16)
  float* scale = reinterpret_cast<float*>(sums + n_segments * ROW_SUMS);          // (n_segments,)
  work.pad_sums(sums_of_items, 2 * half_of_sums);
  if (!grouped) work.put_entries();

  OwnSegments segments{n_segments, plan.warps};
  Columns weights{}, columns;
  int n_left = n_in - OwnSegments::number() * SEGMENT_COLUMNS - lane / 4 * 32;
  if (is_normed) load_columns(weights, own_columns(x.norm), segments, 0, n_left, n_in);
  // The output of this thread in a chunk, if there is one: number threadIdx.x.
  auto exists = [&](int i, int done) { return work.has_output(work.tile_of(done + i / 16), i % 16); };
  auto biases_of = [&](int i, int done, int expert) {
    int tile = work.tile_of(done + i / 16), at = work.within(tile) * 16 + i % 16;
    long long of_bias = static_cast<long long>(expert) * plan.n_out + at;
    const float *first = work.bias_of(tile), *other = work.other_bias();
    Output output{tile * 16 + i % 16, 0.0f, 0.0f, first != nullptr, other || adds};
    if (first) output.first = first[of_bias];
    if (other) output.second = other[of_bias];
    return output;
  };
  int mine = threadIdx.x;
  bool has_output = mine < min(plan.chunk, work.my_tiles) * 16 && exists(mine, 0);
  Output output{};
  if (has_output && !grouped) output = biases_of(mine, 0, 0);

  int of_row = n_in / GROUP;
  const float *own = computed_here(own_columns(x.floats)), *of_squares = computed_here(x.squares + lane);
  const float* added = computed_here(residual + output.at);
  int expert = 0, slot = 0, n_slots = 1;
  auto read_group = [&] {
    const int* group = groups.group + 3 * blockIdx.y;
    expert = load_latest<int>(group), slot = load_latest<int>(group + 1), n_slots = load_latest<int>(group + 2);
    work.first_tile = expert * work.n_tiles;
  };
  auto begin_with_group = [&] {
    work.request_first();
    work.put_entries();
    if (has_output) output = biases_of(mine, 0, expert);
  };
  if (knows_group) {
    read_group();
    if (n_slots) begin_with_group();
  }
  wait_for_previous();
  long long x_row = 0, y_row = 0;
  if (grouped) {
    let_next_begin();
    if (!knows_group) read_group();
    if (!n_slots) return;
    x_row = groups.x_rows ? load_latest<int>(groups.x_rows + slot) : slot;
    y_row = groups.y_rows ? load_latest<int>(groups.y_rows + slot) : slot;
    own += x_row * n_in, of_squares += x_row * of_row;
  }
  load_columns(columns, own, segments, 0, n_left, n_in);
  FirstGroups groups_of_row{};
  if (is_normed)
#pragma unroll
    for (int k = 0; k < FirstGroups::N; k++)
      if (!IS_PLANNED || k * 32 < of_row)
        load_if(groups_of_row.sums[k], of_squares + k * 32, (IS_PLANNED && k * 32 + 32 <= of_row) || k * 32 + lane < of_row);
  if (grouped) {
    if (!knows_group) begin_with_group();
    y += y_row * plan.n_out;
    if (adds) residual += y_row * plan.n_out, added = residual + output.at;
  }
  if (adds && has_output) output.second = *added;
  groups_of_row.sums[0] = needed_here(groups_of_row.sums[0]);

  bool halves = (plan.a_kind & 255) == HALVES_TYPE;
  float factor = 1.0f;
  if (is_normed) factor = norm_scale(sum_of_groups(groups_of_row, of_squares - lane, of_row), static_cast<float>(n_in), eps);
#pragma unroll 1
  for (int first = 0; first < n_segments; first += LOADED * plan.warps) {
    if (first > 0) {
      if (is_normed) load_columns(weights, own_columns(x.norm), segments, first, n_left, n_in);
      load_columns(columns, own, segments, first, n_left, n_in);
    }
#pragma unroll
    for (int i = 0; i < LOADED; i += 2) {
      int segment = first + i * plan.warps + OwnSegments::number();
      if (segments.has(first, i + 1))
        convert_columns<2>(columns, weights, i, segment, plan.warps, is_normed, factor, halves, bytes, sums, scale);
      else if (segments.has(first, i))
        convert_columns<1>(columns, weights, i, segment, plan.warps, is_normed, factor, halves, bytes, sums, scale);
    }
  }
  __syncthreads();

  int half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < work.my_tiles; done += plan.chunk) {
    int end = min(done + plan.chunk, work.my_tiles);
    float* sums_of_tiles = sums_of_items + half;
    half = half_of_sums - half;
    work.for_items(done, end, sums_of_tiles, [&](const uint8_t* at, int segment, int n_pairs, int type, float* to) {
      const uint8_t* of_segment = bytes + segment * ROW_BYTES;
      float factor = scale[segment];
      if (halves) {
        MmaD of = half_sums<InShared>(at, n_pairs, of_segment + lane % 4 * 16);  // of eight rows, of which seven do not matter
        if (lane % 4 == 0)
#pragma unroll
          for (int i = 0; i < 2; i++) to[(lane / 4 + 8 * i) * work.of_sums] = __fmul_rn(of.x[2 * i], factor);
      } else {
        float sum = 0.0f;
        for_type(type, [&](auto q) {
          using Q = decltype(q);
          sum = one_row_sum<Q, InShared>(planes_at<Q>(at, n_pairs), n_pairs, of_segment, sums + segment * ROW_SUMS);
        });
        if (lane % 4 < 2) to[(lane / 4 + 8 * (lane % 2)) * work.of_sums] = __fmul_rn(sum, factor);
      }
    });
    __syncthreads();
    int n_outputs = (end - done) * 16;
#pragma unroll 1
    for (int i = threadIdx.x; i - lane < n_outputs; i += n_threads) {
      bool is_here = i < n_outputs && exists(i, done);
      if ((done > 0 || i >= n_threads) && is_here) {
        output = biases_of(i, done, expert);
        if (adds) output.second = residual[output.at];
      }
      float of[2] = {}, value = 0.0f;
      if (is_here) {
        const float* from = sums_of_tiles + (i / 16 * work.sides() * work.of_entry + i % 16 * work.of_sums);
        sums_of_output(work, from, of);
        value = finished(output, plan.activation, of[0], of[1]);
        y[output.at] = value;
      }
      // If there are squares, n_out is a multiple of 16.
      if (plan.has & HAS_SQUARES) put_squares(squares, y_row * plan.n_out + output.at, value, is_here && i % 16 == 0, ALL_LANES);
    }
  }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    one_row(const unsigned char* a, const unsigned char* b, const unsigned char* c, Activations x, Groups groups, const float* a_bias,
            const float* b_bias, const float* c_bias, const float* residual, float* y, float* squares, Plan launch, float eps) {
  DYNAMIC_SHARED(uint8_t, memory);
  PLAN_OF(launch);
  multiply_one_row(memory, plan, {a, b, c, a_bias, b_bias, c_bias}, x, groups, residual, y, squares, eps);
}
