// Products with quantised weights for up to 8 rows per block: what they are, and how they are divided among warps, is in
// few_rows.cuh. one_row.cu has the kernel for one row of floats.
#include "arguments.cuh"
#include "quants.cuh"
#include "activation.cuh"
#include "matmul.cuh"
#include "eight_rows.cuh"
#include "norm.cuh"
#include "quantize_rows.cuh"
#include "few_rows.cuh"

// Space for a block's converted rows in shared memory (quantize_rows.cuh): `pitch` bytes a row; sums (rows, n_segments, 16),
// scale (rows, n_segments).
struct Prepared {
  uint8_t* bytes;
  int pitch, *sums;
  float* scale;
};

// Makes the form that products read from rows of floats, with all threads of a block. Ends with a barrier.
__device__ __forceinline__ void prepare_rows(const Activations& x, const Rows& rows, const Plan& plan, bool halves, float eps,
                                             const Prepared& to) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_in = plan.n_in, n_segments = segments_of(n_in), of_row = n_in / GROUP;
  bool is_normed = plan.has & HAS_NORM;
  float factor = 1.0f;  // of row `lane`
  if (is_normed)
#pragma unroll 1
    for (int i = 0; i < rows.count; i++) {
      const float* own = x.squares + static_cast<long long>(rows.of_x(i)) * of_row;
      float scale = norm_scale(sum_of_groups(load_groups(own, of_row), own, of_row), static_cast<float>(n_in), eps);
      if (lane == i) factor = scale;
    }
#pragma unroll 1
  for (int job = warp; job < rows.count * n_segments; job += plan.warps) {
    int row = job / n_segments, segment = job - row * n_segments;
    EightColumns columns[] = {columns_of_row(x.floats + static_cast<long long>(rows.of_x(row)) * n_in, segment, n_in)};
    if (is_normed) {
      columns[0] = normed_columns(columns[0], columns_of_row(x.norm, segment, n_in), __shfl_sync(ALL_LANES, factor, row));
    }
    Converted converted[1];
    convert(columns, halves, converted);
    put_segment(converted[0], to.bytes + row * to.pitch + segment * ROW_BYTES, to.sums + job * ROW_SUMS, to.scale + job);
  }
  __syncthreads();
}

__device__ __forceinline__ void multiply_few_rows(uint8_t* memory, const Plan& plan, const Matrices& matrices, const Activations& x,
                                                  const Groups& groups, const float* residual, float* y, float* squares,
                                                  int n_rows, float eps) {
  Work work(plan, matrices, memory);
  bool grouped = plan.has & HAS_GROUPS, adds = plan.has & HAS_RESIDUAL;
  if (!grouped) let_next_begin();
  if (!grouped) work.request_first();

  int lane = threadIdx.x % 32, n_threads = plan.warps * 32, n_segments = work.n_segments, shift = plan.shift, capacity = 1 << shift;
  // Shared memory after the entries, in this order; cuda/kernels/few_rows.py has the same.
  float* sums_of_items = work.after_entries;  // (2, chunk · sides, capacity, 16, of_sums)
  int half_of_sums = plan.chunk * work.sides() * work.of_entry;
  Prepared prepared;
  prepared.bytes = reinterpret_cast<uint8_t*>(sums_of_items + 2 * half_of_sums);  // (capacity, pitch)
  prepared.pitch = n_segments * ROW_BYTES + 64;  // 64 bytes more, so that lanes that read several rows meet no bank twice
  prepared.sums = reinterpret_cast<int*>(prepared.bytes + capacity * prepared.pitch);  // (capacity, n_segments, 16)
  prepared.scale = reinterpret_cast<float*>(prepared.sums + capacity * n_segments * ROW_SUMS);  // (capacity, n_segments)
  work.pad_sums(sums_of_items, 2 * half_of_sums);
  if (int tile = work.tile_of(threadIdx.x); static_cast<int>(threadIdx.x) < work.my_tiles && !grouped) {
    if (work.bias_of(tile)) prefetch(work.bias_of(tile) + work.within(tile) * 16);
    if (work.other_bias()) prefetch(work.other_bias() + tile * 16);
  }

  wait_for_previous();
  if (grouped) let_next_begin();
  Rows rows = grouped ? rows_of(groups, n_rows, 8) : rows_of({}, n_rows, 8);
  if (!rows.count) return;
  work.first_tile = rows.expert * work.n_tiles;
  if (grouped) work.request_first();
  work.put_entries();
  // Output number i of a chunk, if it exists.
  auto place = [&](int i, int done, int& number, int& tile, int& out) {
    out = i % 16, number = i / 16 & (capacity - 1), tile = work.tile_of(done + (i >> (4 + shift)));
    return number < rows.count && work.has_output(tile, out);
  };
  auto output_of = [&](int number, int tile, int out) {
    long long of_bias = static_cast<long long>(rows.expert) * plan.n_out + work.within(tile) * 16 + out;
    const float *bias = work.bias_of(tile), *other = work.other_bias();
    Output output{place_of(rows, number, tile * 16 + out, plan.n_out), 0.0f, 0.0f, bias != nullptr, other || adds};
    if (bias) output.first = bias[of_bias];
    if (other) output.second = other[of_bias];
    if (adds) output.second = residual[output.at];
    return output;
  };

  // Rows that a lane needs: with one of their bytes, and with their sums and scales (matmul.cuh). Rows of a mma do not affect each
  // other, so the last one stands for those that do not exist.
  bool halves = (plan.a_kind & 255) == HALVES_TYPE, prepares = !(plan.has & HAS_FORM);
  const uint8_t* bytes = prepared.bytes;
  const int* sums_of_rows = prepared.sums;
  const float* scale_of_rows = prepared.scale;
  int pitch = prepared.pitch;
  if (prepares)
    prepare_rows(x, rows, plan, halves, eps, prepared);
  else
    bytes = x.x, pitch = n_segments * ROW_BYTES, sums_of_rows = x.sums, scale_of_rows = x.scale;
  if (!prepares) __syncthreads();  // for the entries
  auto existing = [&](int number) {
    number = min(number, rows.count - 1);
    return prepares ? number : rows.of_x(number);
  };
  // Of a group of experts, often few of its rows exist. Anew, since remembering the answer would take a register.
  auto by_eight = [&] { return IS_PLANNED && !grouped ? shift == 3 : computed_anew(rows.count) > 4; };
  bool in_eights = halves || by_eight();
  int with_bytes = existing(in_eights ? lane / 4 : lane / 8), with_sums = existing(in_eights ? lane / 4 : lane % 4);
  // Rows whose sums of products the lane has: numbers, or one number twice.
  int number = in_eights ? lane % 4 * 2 : lane % 4, last = in_eights ? number + 1 : number;
  int own[] = {existing(number), existing(last)};
  Output output{};  // this thread's of the first chunk; loaded while items are computed
  {
    int number, tile, out, n_outputs = min(plan.chunk, work.my_tiles) * 16 << shift;
    if (static_cast<int>(threadIdx.x) < n_outputs && place(threadIdx.x, 0, number, tile, out)) output = output_of(number, tile, out);
  }

  int half = 0;  // threads may still read the other half of sums_of_items
#pragma unroll 1
  for (int done = 0; done < work.my_tiles; done += plan.chunk) {
    int end = min(done + plan.chunk, work.my_tiles);
    float* sums_of_tiles = sums_of_items + half;
    half = half_of_sums - half;
    work.for_items(done, end, sums_of_tiles, [&](const uint8_t* weights, int segment, int n_pairs, int type, float* to) {
      float scale[] = {scale_of_rows[own[0] * n_segments + segment], scale_of_rows[own[1] * n_segments + segment]};
      auto put = [&](int i, int out, float sum) {
        if (number + i < capacity) to[((number + i) * 16 + out) * work.of_sums] = __fmul_rn(sum, scale[i]);
      };
      const uint8_t* columns = bytes + (with_bytes * pitch + segment * ROW_BYTES);
      if (halves) {
        MmaD sums = half_sums<InShared>(weights, n_pairs, columns + lane % 4 * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) put(i % 2, lane / 4 + 8 * (i / 2), sums.x[i]);
      } else {
        auto sums_of_row = [&](int row) { return sums_of_rows + (row * n_segments + segment) * ROW_SUMS; };
        for_type(type, [&](auto q) {
          using Q = decltype(q);
          Planes planes = planes_at<Q>(weights, n_pairs);
          int r = lane / 4, c = lane % 4;
          if (by_eight()) {
            eight_row_sums<Q, 1, IS_PLANNED ? 4 : 2>(
                planes, n_pairs, lane, [&](int) { return columns + c * 16; }, [&](int) { return sums_of_row(with_sums); },
                [&](int, int i) { return sums_of_row(own[i]); },
                [&](int, const float(&sums)[4]) {
#pragma unroll
                  for (int v = 0; v < 4; v++) put(v % 2, r + 8 * (v / 2), sums[v]);
                });
          } else {
            float total[2];
            four_row_sums<Q>(planes, n_pairs, columns + c * 16 + r % 2 * 8, sums_of_row(with_sums), total);
#pragma unroll
            for (int i = 0; i < 2; i++) put(0, r + 8 * i, total[i]);
          }
        });
      }
    });
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - done) * 16 << shift; i += n_threads) {
      int number, tile, out;
      if (!place(i, done, number, tile, out)) continue;
      if (done > 0 || i >= n_threads) output = output_of(number, tile, out);
      int side = (i >> (4 + shift)) * work.sides();
      const float* from = sums_of_tiles + (side * work.of_entry + (number * 16 + out) * work.of_sums);
      float of[2] = {};
      sums_of_output(work, from, of);
      float value = finished(output, plan.activation, of[0], of[1]);
      y[output.at] = value;
      if (plan.has & HAS_SQUARES)  // then n_out is a multiple of 16, so that all lanes of a group are here
        put_squares(squares, output.at, value, out == 0, 0xffffu << (lane & 16));
    }
  }
}

// With a plan, the compiler needs fewer registers; cuda/kernels/few_rows.py has the same.
extern "C" __global__ void __launch_bounds__(IS_PLANNED ? 384 : MOST_THREADS, 2)
    few_rows(const unsigned char* a, const unsigned char* b, const unsigned char* c, Activations x, Groups groups, const float* a_bias,
             const float* b_bias, const float* c_bias, const float* residual, float* y, float* squares, Plan launch, int n_rows,
             float eps) {
  DYNAMIC_SHARED(uint8_t, memory);
  PLAN_OF(launch);
  multiply_few_rows(memory, plan, {a, b, c, a_bias, b_bias, c_bias}, x, groups, residual, y, squares, n_rows, eps);
}
