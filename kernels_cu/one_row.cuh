// The kernel one_row of few_rows.cu. What it does between the end of the previous kernel and its own end takes as long as it has
// instructions in a row: there are few warps, and each instruction waits for the one before. So everything that does not need the
// previous kernel's results is done before the wait, and the rest has no branches where it can.

// A lane's columns of up to LOADED segments, of which a warp has number warp, warp + n_warps, ….
constexpr int LOADED = 4;
struct Columns {
  float4 low[LOADED], high[LOADED];  // EightColumns
};

// The address of a lane's columns of the warp's segment number `first`.
__device__ __forceinline__ const float* own_columns(const float* row, int first) {
  int lane = threadIdx.x % 32;
  return row + (first * SEGMENT_COLUMNS + lane / 4 * 32 + lane % 4 * 4);
}

// Loads columns, given that address and how many columns the row has from the lane's block on; zeros after its end. CONSTANT:
// nothing writes the row.
template <bool CONSTANT>
__device__ __forceinline__ void load_columns(Columns& columns, const float* own, int n_left) {
  int step = blockDim.x / 32 * SEGMENT_COLUMNS;
#pragma unroll
  for (int i = 0; i < LOADED; i++) {
    columns.low[i] = columns.high[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    load_if<CONSTANT>(columns.low[i], own + i * step, i * step < n_left);
    load_if<CONSTANT>(columns.high[i], own + i * step + 16, i * step < n_left);
  }
}

// Converts N of a warp's segments, from number `segment` on, of which `columns` and `weights` begin with number i.
template <int N>
__device__ __forceinline__ void convert_columns(const Columns& columns, const Columns& weights, int i, int segment, bool is_normed,
                                                float factor, bool halves, uint8_t* bytes, int* sums, float* scale) {
  int n_warps = blockDim.x / 32;
  EightColumns x[N];
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float4 &low = columns.low[i + k], &high = columns.high[i + k], &of_low = weights.low[i + k], &of_high = weights.high[i + k];
    x[k] = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    const float weight[] = {of_low.x, of_low.y, of_low.z, of_low.w, of_high.x, of_high.y, of_high.z, of_high.w};
    if (is_normed)
#pragma unroll
      for (int j = 0; j < 8; j++) x[k].x[j] = normed(x[k].x[j], {0.0f, factor}, weight[j]);
  }
  Converted converted[N];
  convert(x, halves, converted);
#pragma unroll
  for (int k = 0; k < N; k++) {
    int at = segment + k * n_warps;
    put_segment(converted[k], bytes + at * ROW_BYTES, sums + at * ROW_SUMS, scale + at);
  }
}

__device__ __forceinline__ void multiply_one_row(uint8_t* memory, const Matrices& matrices, const Activations& x, const Groups& groups,
                                                 const float* residual, float* y, float* squares, int second, int third,
                                                 int activation, int n_out, int n_in, int chunk, int stage_bytes, int early,
                                                 int tiles_each, int entry_steps, int segment_steps, float eps) {
  let_next_begin();
  Work work(matrices, memory, activation, second, third, n_out, n_in, 0, stage_bytes, tiles_each, entry_steps, segment_steps);
  bool grouped = groups.group;
  if (!grouped) work.request_until(early);

  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, n_segments = work.n_segments;
  // Shared memory after the entries, in this order; cuda/kernels/few_rows.py has the same.
  float* sums_of_items = work.after_entries;  // (2, chunk · sides, 16, of_sums)
  int half_of_sums = chunk * work.sides() * work.of_entry;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (n_segments, ROW_BYTES)
  int* sums = reinterpret_cast<int*>(bytes + n_segments * ROW_BYTES);           // (n_segments, 16)
  float* scale = reinterpret_cast<float*>(sums + n_segments * ROW_SUMS);          // (n_segments,)
  work.pad_sums(sums_of_items, 2 * half_of_sums);
  if (!grouped) work.put_entries();

  Columns weights{}, columns;
  int n_left = computed_anew(n_in - warp * SEGMENT_COLUMNS - lane / 4 * 32);  // columns from the lane's first block on
  if (x.norm) load_columns<true>(weights, own_columns(x.norm, warp), n_left);
  // The output of this thread in a chunk, if there is one: number threadIdx.x.
  auto exists = [&](int i, int done) { return work.tile_of(done + i / 16) * 16 + i % 16 < n_out; };
  auto biases_of = [&](int i, int done, int expert) {
    int tile = work.tile_of(done + i / 16), at = work.within(tile) * 16 + i % 16;
    long long of_bias = static_cast<long long>(expert) * n_out + at;
    const float *first = work.bias_of(tile), *other = work.paired ? matrices.b_bias : nullptr;
    Output output{tile * 16 + i % 16, 0.0f, 0.0f, first != nullptr, other || residual};
    if (first) output.first = first[of_bias];
    if (other) output.second = other[of_bias];
    return output;
  };
  int mine = threadIdx.x;
  bool has_output = mine < min(chunk, work.my_tiles) * 16 && exists(mine, 0);
  Output output{};
  if (has_output && !grouped) output = biases_of(mine, 0, 0);

  int of_row = n_in / GROUP, n_groups = computed_anew(of_row - lane);
  const float *own = computed_here(own_columns(x.floats, warp)), *of_squares = computed_here(x.squares + lane);
  const float* added = computed_here(residual + output.at);
  wait_for_previous();
  int expert = 0;
  long long x_row = 0, y_row = 0;
  if (grouped) {
    const int* group = groups.group + 3 * blockIdx.y;
    expert = group[0];
    int slot = group[1];
    if (group[2] == 0) return;
    x_row = groups.x_rows ? groups.x_rows[slot] : slot, y_row = groups.y_rows ? groups.y_rows[slot] : slot;
    work.first_tile = expert * work.n_tiles;
  }
  if (grouped) own += x_row * n_in, of_squares += x_row * of_row;
  load_columns<false>(columns, own, n_left);
  FirstGroups groups_of_row{};
  if (x.norm)
#pragma unroll
    for (int k = 0; k < FirstGroups::N; k++) load_if<false>(groups_of_row.sums[k], of_squares + k * 32, k * 32 < n_groups);
  if (grouped) {
    y += y_row * n_out;
    if (has_output) output = biases_of(mine, 0, expert);
    if (residual) residual += y_row * n_out, added = residual + output.at;
  }
  if (residual && has_output) output.second = *added;
  work.request_until(STAGES);
  if (grouped) work.put_entries();
  groups_of_row.sums[0] = needed_here(groups_of_row.sums[0]);

  bool is_normed = x.norm, halves = (matrices.a_kind & 255) == HALVES_TYPE;
  float factor = 1.0f;
  if (is_normed) factor = norm_scale(sum_of_groups(groups_of_row, of_squares - lane, of_row), static_cast<float>(n_in), eps);
#pragma unroll 1
  for (int segment = warp; segment < n_segments;) {
#pragma unroll
    for (int i = 0; i < LOADED; i += 2, segment += 2 * n_warps) {
      if (segment + n_warps < n_segments)
        convert_columns<2>(columns, weights, i, segment, is_normed, factor, halves, bytes, sums, scale);
      else if (segment < n_segments)
        convert_columns<1>(columns, weights, i, segment, is_normed, factor, halves, bytes, sums, scale);
    }
    if (segment >= n_segments) break;
    int begin = (segment - warp) * SEGMENT_COLUMNS;
    if (is_normed) load_columns<true>(weights, own_columns(x.norm, segment), n_left - begin);
    load_columns<false>(columns, own + begin, n_left - begin);
  }
  __syncthreads();

  int half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < work.my_tiles; done += chunk) {
    int end = min(done + chunk, work.my_tiles);
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
    for (int i = threadIdx.x; i - lane < n_outputs; i += blockDim.x) {
      bool is_here = i < n_outputs && exists(i, done);
      if ((done > 0 || i >= static_cast<int>(blockDim.x)) && is_here) {
        output = biases_of(i, done, expert);
        if (residual) output.second = residual[output.at];
      }
      float of[2] = {}, value = 0.0f;
      if (is_here) {
        const float* from = sums_of_tiles + (i / 16 * work.sides() * work.of_entry + i % 16 * work.of_sums);
        sums_of_output(work, from, of);
        value = finished(output, activation, of[0], of[1]);
        y[output.at] = value;
      }
      // If there are squares, n_out is a multiple of 16.
      if (squares) put_squares(squares, y_row * n_out + output.at, value, is_here && i % 16 == 0, ALL_LANES);
    }
  }
}
