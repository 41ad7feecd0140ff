// Causal attention over the paged KV cache, without writing the score matrix (FlashAttention-2, Dao 2023).
//
// Array code: refengine.ops.attention.attention; for kv_append_f16, refengine.ops.halves. q (n_tokens, n_head, head_dim)
// and y (n_tokens, n_head * head_dim) float32. k, v: the cache, see CachedRows; rows of 1e6 and of 1e-6 keep eleven bits.
// sinks (n_head,) float32 or null. spans (n_spans, 4): first token, number of tokens, positions filled after them, begin of
// its block table in `tables`. tiles (n_tiles, 2): span, first row in it. Row i of a span and KV head h is token i / group
// and query head h * group + i % group; a block of threads has 16 rows.
//
// The order of additions depends on positions only, not on the number of tokens, rows and sequences in the batch:
//   tile of 64 positions, from a multiple of 64:  s = (mma over head_dim, columns as below) · q scale · scale · log2(e) · k
//       scale; m = max s; p = 2^(s - m); l = Σ p: 16 in a lane ascending, then by shuffles; P = half(p · v scale · 2^e), the
//       largest of a row in [2^14, 2^15); o = (four mma over the positions, ascending) · 2^-e
//   split of 512: its 8 tiles folded in order;  row: its splits folded in order, then the sink; y = o / l
//   fold of (m', l', o') into (m, l, o): M = max; l = l · 2^(m - M) + l' · 2^(m' - M), o likewise
// A tile or split without a visible position is left out of a fold, so it changes no bit.
// Products of halves are exact, and their sums cannot overflow; all factors of a score except `scale` are powers of two.
//
// attention_rows_*:   grid x tiles, y KV heads; 8 warps, with one tile of positions each; splits one after another.
// attention_splits_*: grid x tiles, y KV heads, z splits from first_split on; writes o, m, l to partial (rows, n_splits,
//                     head_dim + 2). attention_merge folds them: grid x tokens, y heads; head_dim threads.
// attention_step_*:   one new token for each of n_rows sequences, with all state on the device, in one launch: see below.
// Dynamic shared memory: see Shared and StepShared. Reads the visible part of K and V once for every 16 rows (8 in a step).

#include "arguments.cuh"
#include "norm.cuh"

constexpr int ROWS = 16, TILE = 64, WARPS = 8;
constexpr float LOG2_E = 1.4426950408889634f, NOTHING = -1.0f;

// The cache of one sequence.
struct Cache {
  const f16 *k, *v;
  const unsigned char *k_exponents, *v_exponents;
  const int* table;
  int block_size, n_head_kv, head_dim, n_kv;
};

__device__ __forceinline__ Cache cache_of(const CachedRows& k, const CachedRows& v, const int* table, int block_size,
                                          int n_head_kv, int head_dim) {
  return Cache{k.values, v.values, k.exponents, v.exponents, table, block_size, n_head_kv, head_dim, 0};
}

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
// 2^(m - M) for m ≤ M; both may be -infinity.
__device__ __forceinline__ float weight(float m, float M) { return m == M ? 1.0f : exp2f(m - M); }
__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float largest_of_sixteen(float x) {
  x = largest_of_four(x);
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 4));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 8));
}
__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
// The largest magnitude in a row of n numbers, computed by a warp; NaN if the row has one.
__device__ __forceinline__ float row_top(const float* row, int n) {
  float top = 0.0f;
  for (int i = threadIdx.x % 32; i < n; i += 32) top = larger_or_nan(top, fabsf(row[i]));
  return warp_top(top);
}

// For heads with G groups of 32 columns.
template <int G>
struct Shared {
  static constexpr int STRIDE = (G | 1) * 32;  // halves of a row of q: 16-byte loads of eight lanes meet no bank twice
  f16 q[ROWS * STRIDE];
  float q_scale[ROWS];
  float m[WARPS][ROWS], l[WARPS][ROWS], keep[WARPS][ROWS], add[WARPS][ROWS];
  float total_m[ROWS], total_l[ROWS], total_keep[ROWS], total_add[ROWS];
  float o[WARPS][G * 16][32];  // as lanes hold it: [number of 4 columns and which of 4 sums][lane]
};

// Row and column of the element that lane `lane` has in o[f].
__device__ __forceinline__ int row_in(int f, int lane) { return lane / 4 + f % 4 / 2 * 8; }
__device__ __forceinline__ int column_in(int f, int lane) {
  return f / 16 * 32 + 4 * (2 * (lane % 4) + f % 2) + f / 4 % 4;
}

// Loads 16 rows of q as halves. A warp loads rows w and w + 8; rows after the end are zeros.
template <int G>
__device__ __forceinline__ void load_q(Shared<G>& shared, const float* q, const int* span, int first_row, int group,
                                       int n_head, int head, int head_dim) {
  int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < ROWS; i += WARPS) {
    int row = first_row + i, token = row / group;
    const float* from = q + (static_cast<long long>(span[0] + token) * n_head + head * group + row % group) * head_dim;
    bool exists = token < span[1];
    int e = row_exponent(row_top(from, exists ? head_dim : 0));
    for (int d = lane; d < G * 32; d += 32)
      shared.q[i * Shared<G>::STRIDE + d] = exists && d < head_dim ? f32_to_f16(times_power(from[d], e)) : 0;
    if (lane == 0) shared.q_scale[i] = power_of_two(e);
  }
}

// Computes one tile of positions for 16 rows; writes m, l and o to the warp's place in shared memory.
template <int G>
__device__ __forceinline__ void attend_tile(Shared<G>& shared, const Cache& cache, int head, int start, const int (&position)[2],
                                            int window, float scale) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  int block = cache.table[start / cache.block_size];
  long long row = cached_row(block, cache.n_head_kv, head, cache.block_size, start % cache.block_size);
  const f16 *k = cache.k + row * cache.head_dim, *v = cache.v + row * cache.head_dim;
  // The exponents of positions 2 · lane and 2 · lane + 1: K, V, K, V in a word. 0 for positions that do not exist.
  int n_left = cache.n_kv - start - 2 * lane;
  uint32_t exponents = 0;
  if (n_left > 0) {
    uint16_t of_k = load_constant<uint16_t>(cache.k_exponents + row + 2 * lane);
    uint16_t of_v = load_constant<uint16_t>(cache.v_exponents + row + 2 * lane);
    exponents = __byte_perm(of_k, of_v, n_left > 1 ? 0x5140 : 0x2240);
  }

  float s[8][4] = {};
#pragma unroll 1
  for (int g = 0; g < G; g++) {
    MmaA a[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint4 four = *reinterpret_cast<const uint4*>(&shared.q[(r + 8 * i) * Shared<G>::STRIDE + g * 32 + c * 8]);
      a[0].x[i] = four.x, a[0].x[2 + i] = four.y, a[1].x[i] = four.z, a[1].x[2 + i] = four.w;
    }
#pragma unroll
    for (int n = 0; n < 8; n++) {
      uint4 four = make_uint4(0, 0, 0, 0);
      if (start + n * 8 + r < cache.n_kv && g * 32 + c * 8 < cache.head_dim)
        four = load_constant<uint4>(k + (n * 8 + r) * cache.head_dim + g * 32 + c * 8);
      MmaD d = {{s[n][0], s[n][1], s[n][2], s[n][3]}};
      mma_m16n8k16(d, a[0], {{four.x, four.y}});
      mma_m16n8k16(d, a[1], {{four.z, four.w}});
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = d.x[i];
    }
  }

  float factor[2] = {__fmul_rn(shared.q_scale[r], scale), __fmul_rn(shared.q_scale[r + 8], scale)};
  float m[2] = {minus_infinity(), minus_infinity()}, l[2] = {}, top[2] = {};
  uint32_t of_columns[8];
#pragma unroll
  for (int n = 0; n < 8; n++) {
    of_columns[n] = __shfl_sync(ALL_LANES, exponents, n * 4 + c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int back = position[i / 2] - (start + n * 8 + 2 * c + i % 2);
      float k_scale = __uint_as_float((of_columns[n] >> 16 * (i % 2) & 255) << 23);
      s[n][i] = back < 0 || (window && back >= window) ? minus_infinity()
                                                       : __fmul_rn(__fmul_rn(s[n][i], factor[i / 2]), k_scale);
      m[i / 2] = fmaxf(m[i / 2], s[n][i]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) m[h] = largest_of_four(m[h]);
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float p = m[i / 2] == minus_infinity() && s[n][i] == m[i / 2] ? 0.0f : exp2f(s[n][i] - m[i / 2]);
      l[i / 2] += p;
      s[n][i] = __fmul_rn(p, __uint_as_float((of_columns[n] >> (16 * (i % 2) + 8) & 255) << 23));
      top[i / 2] = fmaxf(top[i / 2], s[n][i]);
    }
  float up[2], down[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    l[h] = sum_of_four(l[h]);
    uint32_t field = __float_as_uint(largest_of_four(top[h])) >> 23;
    field = min(max(field, 15u), 254u);
    up[h] = __uint_as_float((268u - field) << 23), down[h] = __uint_as_float((field - 14u) << 23);
  }
  MmaA p[4];
#pragma unroll
  for (int kk = 0; kk < 4; kk++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = &s[2 * kk + i / 2][2 * (i % 2)];
      p[kk].x[i] = f32_to_f16x2(__fmul_rn(pair[0], up[i % 2]), __fmul_rn(pair[1], up[i % 2]));
    }

#pragma unroll 1
  for (int g = 0; g < G; g++) {
    MmaD o[4] = {};
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      uint2 rows[4];  // columns 4r … 4r + 3 of positions 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = kk * 16 + 2 * c + i % 2 + 8 * (i / 2);
        rows[i] = make_uint2(0, 0);
        if (start + at < cache.n_kv && g * 32 + r * 4 < cache.head_dim)
          rows[i] = load_constant<uint2>(v + at * cache.head_dim + g * 32 + r * 4);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        unsigned selector = j % 2 ? 0x7632 : 0x5410;
        MmaB b = {{__byte_perm(j / 2 ? rows[0].y : rows[0].x, j / 2 ? rows[1].y : rows[1].x, selector),
                   __byte_perm(j / 2 ? rows[2].y : rows[2].x, j / 2 ? rows[3].y : rows[3].x, selector)}};
        mma_m16n8k16(o[j], p[kk], b);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) shared.o[warp][g * 16 + j * 4 + i][lane] = __fmul_rn(o[j].x[i], down[i / 2]);
  }
  if (c == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) shared.m[warp][r + 8 * h] = m[h], shared.l[warp][r + 8 * h] = l[h];
  }
}

// Folds (other_m, other_l) into (m, l); gives the factors for o and the other o. NOTHING: the other one is left out.
__device__ __forceinline__ void fold(float& m, float& l, float other_m, float other_l, float& keep, float& add) {
  bool is_empty = other_m == minus_infinity() && other_l == 0.0f;
  float M = fmaxf(m, other_m), of_smaller = exp2f(fminf(m, other_m) - M);
  keep = is_empty || m == M ? 1.0f : of_smaller;
  add = is_empty ? NOTHING : other_m == M ? 1.0f : of_smaller;
  l = is_empty ? l : __fadd_rn(__fmul_rn(l, keep), __fmul_rn(other_l, add));
  m = M;
}
__device__ __forceinline__ float folded(float o, float other, float keep, float add) {
  return __fadd_rn(__fmul_rn(o, keep), __fmul_rn(other, add));
}

// Folds the sink into (m, l); the result is the factor by which o is multiplied to give y.
__device__ __forceinline__ float finish(float m, float l, const float* sinks, int head) {
  if (!sinks) return 1.0f / l;
  float sink = __fmul_rn(sinks[head], LOG2_E), M = fmaxf(m, sink), keep = weight(m, M);
  return keep / __fadd_rn(__fmul_rn(l, keep), weight(sink, M));
}

// The work of a block: folds splits `split` to `end` - 1 for 16 rows into shared.total_* and o.
template <int G>
__device__ __forceinline__ void attend(Shared<G>& shared, const Cache& cache, int head, int split, int end, int first_position,
                                       int last_position, const int (&position)[2], int window, float scale,
                                       float (&o)[G * 2]) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < ROWS) shared.total_m[threadIdx.x] = minus_infinity(), shared.total_l[threadIdx.x] = 0.0f;
#pragma unroll
  for (int i = 0; i < G * 2; i++) o[i] = 0.0f;
  for (; split < end; split++) {
    int start = (split * WARPS + warp) * TILE;
    bool seen = start <= last_position && (!window || start + TILE > first_position - window + 1);
    __syncthreads();
    if (seen)
      attend_tile<G>(shared, cache, head, start, position, window, scale);
    else if (lane < ROWS)
      shared.m[warp][lane] = minus_infinity(), shared.l[warp][lane] = 0.0f;
    __syncthreads();
    if (threadIdx.x < ROWS) {
      float m = minus_infinity(), l = 0.0f;
      for (int w = 0; w < WARPS; w++)
        fold(m, l, shared.m[w][threadIdx.x], shared.l[w][threadIdx.x], shared.keep[w][threadIdx.x],
             shared.add[w][threadIdx.x]);
      fold(shared.total_m[threadIdx.x], shared.total_l[threadIdx.x], m, l, shared.total_keep[threadIdx.x],
           shared.total_add[threadIdx.x]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < G * 2; i++) {
      int f = i * WARPS + warp, row = row_in(f, lane);
      if (shared.total_add[row] == NOTHING) continue;
      float sum = 0.0f;
      for (int w = 0; w < WARPS; w++)
        if (shared.add[w][row] != NOTHING) sum = folded(sum, shared.o[w][f][lane], shared.keep[w][row], shared.add[w][row]);
      o[i] = folded(o[i], sum, shared.total_keep[row], shared.total_add[row]);
    }
  }
  __syncthreads();
}

template <int G, bool SPLITS>
__device__ __forceinline__ void attention(const float* q, const Cache& all, const int* tables, const float* sinks, const int* spans,
                                          const int* tiles, float* y, int n_head, int window, float scale,
                                          int first_split, int n_splits) {
  DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<Shared<G>*>(memory);
  const int *tile = tiles + 2 * blockIdx.x, *span = spans + 4 * tile[0];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, group = n_head / all.n_head_kv;
  int first_row = tile[1], past = span[2] - span[1];  // positions before the span's first token
  Cache cache = all;
  cache.n_kv = span[2], cache.table = tables + span[3];
  int last_row = min(first_row + ROWS, span[1] * group) - 1;
  int first_position = past + first_row / group, last_position = past + last_row / group;
  int position[2] = {past + (first_row + lane / 4) / group, past + (first_row + lane / 4 + 8) / group};
  load_q<G>(shared, q, span, first_row, group, n_head, head, cache.head_dim);

  int split = first_split, end = last_position / (TILE * WARPS) + 1;
  if (SPLITS) {
    split += blockIdx.z;
    end = min(end, split + 1);
  } else if (window) {
    split = max(split, max(first_position - window + 1, 0) / (TILE * WARPS));
  }
  float o[G * 2];
  attend<G>(shared, cache, head, split, end, first_position, last_position, position, window,
            __fmul_rn(scale, LOG2_E), o);
#pragma unroll
  for (int i = 0; i < G * 2; i++) {
    int f = i * WARPS + warp, in_block = row_in(f, lane), row = first_row + in_block, d = column_in(f, lane);
    if (row > last_row) continue;
    int token = row / group, query_head = head * group + row % group;
    float m = shared.total_m[in_block], l = shared.total_l[in_block];
    if (SPLITS) {
      float* to = y + ((static_cast<long long>(span[0] + token) * n_head + query_head) * n_splits + blockIdx.z) *
                          (cache.head_dim + 2);
      if (d < cache.head_dim) to[d] = o[i];
      if (d == 0) to[cache.head_dim] = m, to[cache.head_dim + 1] = l;
    } else if (d < cache.head_dim) {
      y[(static_cast<long long>(span[0] + token) * n_head + query_head) * cache.head_dim + d] =
          __fmul_rn(o[i], finish(m, l, sinks, query_head));
    }
  }
}

#define ATTENTION(name, G, SPLITS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
      name(const float* q, CachedRows k, CachedRows v, const int* tables, const float* sinks, const int* spans,      \
           const int* tiles, float* y, int n_head, int n_head_kv, int head_dim, int block_size, int window,          \
           float scale, int first_split, int n_splits) {                                                             \
    attention<G, SPLITS>(q, cache_of(k, v, tables, block_size, n_head_kv, head_dim), tables, sinks, spans, tiles, y, \
                         n_head, window, scale, first_split, n_splits);                                              \
  }
ATTENTION(attention_rows_32, 1, false)
ATTENTION(attention_rows_64, 2, false)
ATTENTION(attention_rows_96, 3, false)
ATTENTION(attention_rows_128, 4, false)
ATTENTION(attention_splits_32, 1, true)
ATTENTION(attention_splits_64, 2, true)
ATTENTION(attention_splits_96, 3, true)
ATTENTION(attention_splits_128, 4, true)

extern "C" __global__ void attention_merge(const float* partial, const float* sinks, float* y, int n_head, int head_dim,
                                           int n_splits) {
  long long row = static_cast<long long>(blockIdx.x) * n_head + blockIdx.y;
  int d = threadIdx.x;
  float m = minus_infinity(), l = 0.0f, o = 0.0f;
  for (int split = 0; split < n_splits; split++) {
    const float* from = partial + (row * n_splits + split) * (head_dim + 2);
    float keep, add;
    fold(m, l, from[head_dim], from[head_dim + 1], keep, add);
    if (add != NOTHING) o = folded(o, from[d], keep, add);
  }
  y[row * head_dim + d] = __fmul_rn(o, finish(m, l, sinks, blockIdx.y));
}

// Writes rows of K or V to the cache: half(x[t, h] · 2^-e) and e + 127 for head h of slot slots[t]. A slot is
// block · block_size + offset. x (n_tokens, n_head_kv, head_dim) float32. Grid: x tokens, y KV heads; 32 threads.
// Precondition: the slots differ and are inside the cache.
extern "C" __global__ void kv_append_f16(const float* x, const long long* slots, NewRows cache, int head_dim,
                                         int block_size) {
  const float* row = x + (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * head_dim;
  int slot = static_cast<int>(slots[blockIdx.x]);
  long long at = cached_row(slot / block_size, gridDim.y, blockIdx.y, block_size, slot % block_size);
  int e = row_exponent(row_top(row, head_dim));
  for (int i = threadIdx.x; i < head_dim; i += 32) cache.values[at * head_dim + i] = f32_to_f16(times_power(row[i], e));
  if (threadIdx.x == 0) cache.exponents[at] = static_cast<unsigned char>(e + 127);
}

// --- attention_step_*: one new token for each sequence ---
//
// RMS norm of the heads of Q and K (if q_norm and k_norm are given), the rotation (if cos is given), Q times q_factor (if it
// is not 1), K and V to the cache, attention. The same bits as rms_norm_f32, rope_*_f32, kv_append_f16 and attention_rows_*
// one after another. The same launch is right for every length.
//
// Rows of Q, K and V begin at qkv; their distances are q_stride, k_stride and v_stride floats. q_norm, k_norm (head_dim,).
// cos, sin (n_positions, half) float32, by position. tables (n_rows, table_stride). positions (n_rows,) int32: below zero
// there is no row, and nothing is written. y (n_rows, n_head * head_dim). partial (n_rows, n_head, n_entries, head_dim + 2):
// o, m, l of tiles or splits, counted from the first ones that a row sees. arrived: a counter for each (x, y) of the grid,
// zeros; they are zeros again at the end.
// Grid: x rows · ⌈group / 8⌉, y KV heads, z any number Z; 256 threads. A pass of a block computes four tiles, a quad, which
// begins at a multiple of 256. The unit of work is a quad for rows that see several splits, but at most most_quads quads, so
// that many blocks share a short row's work. For other rows it is a split, which has fewer entries to write and to fold.
// Block z takes units z, z + Z, … from the first one on. A row that sees one unit is finished by its block. Otherwise o, m, l
// of each tile of a quad, or of a split, are written to `partial`, and the last block to arrive folds them in the order
// above, with a warp for each row. The block that has the last unit computes the new K and V, and has them from its own
// shared memory; they are written for the next step.
//
// What a pass costs, and why it is as it is: a warp waits about 4.6 cycles for each instruction that depends on the one
// before, and about 600 for a load, so a short row pays for the longest chain of them, and a long one for all instructions
// together. Everything that no kernel of the step writes is requested before wait_for_previous: K to registers, V to shared
// memory. A warp has 32 positions of K, of which it computes scores; then a row, of which it computes P of all four tiles;
// then 16 columns of V, for which it computes o of the four tiles. Rows are the eight columns of the tensor cores' operand b,
// so that no part of the operands is always empty; positions and columns of V are operand a. The sum of a product has the same
// terms in the same places as in attend_tile, where rows are operand a. K of the next pass is requested when the scores are
// there, and V when its last reader has ended.
//
// May be launched to overlap with the previous kernel. Precondition: all inputs but Q, K and V are read before it has ended
// (positions, tables, earlier positions of the cache, …), so they must have been there before a kernel began that did not
// overlap. In a step that is the first kernel; only the last one changes positions.

constexpr int SPLIT = TILE * WARPS;
constexpr int AT_ONCE = 4;  // tiles that a block computes together
constexpr int QUAD = AT_ONCE * TILE;
constexpr int OWN = QUAD / WARPS;  // positions of a quad for which a warp requests K and V and computes scores
constexpr int STEP_ROWS = 8;  // rows of a block, the columns of the tensor cores' operand b

template <int G>
struct alignas(16) StepShared {
  f16 v[AT_ONCE][TILE][G * 32];  // the eights of columns of a position in the order of `eight_in`
  uint4 p[AT_ONCE][2][32];       // operands b of products over 16 positions, two in each, as lanes hold them
  f16 q[G][STEP_ROWS][32];
  float4 of_rows[AT_ONCE][STEP_ROWS];  // keep and add of `fold`, or if tiles are entries, m; l; 2^-e of P
  f16 new_k[G * 32], new_v[G * 32];
  float scores[AT_ONCE][STEP_ROWS][TILE + 4];  // + 4: lanes that write meet no bank twice
  uint32_t exponents[AT_ONCE][TILE / 2];       // bytes for K, V, K, V, …
  float heads[WARPS][G * 32];
  float factors[STEP_ROWS];  // of scores: q scale · scale · log2(e)
  float sinks[STEP_ROWS], m[STEP_ROWS];  // m: of the unit so far
  unsigned char new_exponents[2];
  // What is seldom needed, so that it takes no registers: the first row; the tile or split that its first entry is of; how
  // many units the rows see; whether this block is the last one; the block table.
  int row, first_entry, n_units, is_last;
  const int* table;
};

// Where the eight columns number `eight` of a position are in StepShared::v: in an order in which neither eight positions of
// one number nor two positions of four numbers meet a bank twice.
template <int G>
__device__ __forceinline__ int eight_in(int position, int eight) {
  return eight ^ (position >> 1 & 3) ^ (G % 2 ? 0 : (position & 1) << 2);
}

// What a lane, 4 · r + c, has requested of its warp's positions of a tile, r + 8 i: columns 8c … 8c + 7 of each group of K.
// Lane l has the exponents of four positions, from 4 · (l % 8) on.
template <int G>
struct Requested {
  uint4 k[OWN / 8][G];
  uint32_t k_exponents, v_exponents;
};

// copy16, or nothing. In assembler, so that the compiler does not make it a branch.
__device__ __forceinline__ void copy_unless(bool left_out, f16* to, const f16* from, bool exists) {
#ifdef HOSTCUDA
  if (!left_out) copy16(to, from, exists);
#else
  asm volatile("{.reg .pred p; setp.eq.s32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0), "r"(static_cast<int>(left_out))
               : "memory");
#endif
}

// Where a row begins in an array with rows of `width`, a multiple of 8. Cheaper than a product of 64 bits.
__device__ __forceinline__ const f16* begin_of(const f16* rows, unsigned row, int width) {
  return computed_once(rows + 8 * static_cast<unsigned long long>(row * static_cast<unsigned>(width / 8)));
}

// Where a head is in the cache at a position: the block, and the row in it. What is loaded is not used here, so that nothing
// waits for it.
struct Place {
  int block, row;
};
__device__ __forceinline__ Place place_of(const Cache& cache, int head, int position, bool exists) {
  int at = static_cast<unsigned>(position) / static_cast<unsigned>(cache.block_size);
  Place place{0, head * cache.block_size + (position - at * cache.block_size)};
  if (exists) place.block = load_latest<int>(&cache.table[at]);
  return place;
}
__device__ __forceinline__ unsigned row_at(const Cache& cache, const Place& place) {
  return static_cast<unsigned>(place.block) * static_cast<unsigned>(cache.n_head_kv * cache.block_size) + place.row;
}

// The calling warp's positions of a quad. first: the first one. left: how many of them are in the cache, if above zero.
struct Own {
  int first, left;
  Place place;
};
// Of the quad from `start` on. oldest: the first position that the row sees. has_place: the block is known already.
__device__ __forceinline__ Own own_of(const Cache& cache, int head, int start, int oldest, bool has_place = false) {
  int first = start + threadIdx.x / 32 * OWN, left = first / TILE * TILE + TILE > oldest ? cache.n_kv - first : 0;
  return Own{first, left, place_of(cache, head, first, left > 0 && !has_place)};
}

// A position that does not exist may have any K and any exponent. Columns that do not exist stay zeros.
template <int G>
__device__ __forceinline__ void request_k(Requested<G>& requested, const Cache& cache, const Own& own) {
  int lane = threadIdx.x % 32, column = lane % 4 * 8;
  if (own.left <= 0) return;
  bool has_last = (G - 1) * 32 + column < cache.head_dim;
  unsigned at = row_at(cache, own.place);
  const f16* row = begin_of(cache.k + column, at + lane / 4, cache.head_dim);
#pragma unroll
  for (int i = 0; i < OWN / 8; i++) {
#pragma unroll
    for (int g = 0; g < G - 1; g++) requested.k[i][g] = load_latest<uint4>(row + g * 32);
    if (has_last) requested.k[i][G - 1] = load_latest<uint4>(row + (G - 1) * 32);
    row = computed_once(row + 8 * cache.head_dim);
  }
  at += lane % (OWN / 4) * 4;
  requested.k_exponents = load_latest<uint32_t>(cache.k_exponents + at);
  requested.v_exponents = load_latest<uint32_t>(cache.v_exponents + at);
}

// V of the warp's positions, and zeros for those that are not in the cache. It leaves out `but`, whose V is put there by
// put_new.
template <int G>
__device__ __forceinline__ void request_v(StepShared<G>& shared, const Cache& cache, const Own& own, int but) {
  int thread = computed_anew(threadIdx.x);  // so that no register keeps the places in shared memory from pass to pass
  int lane = thread % 32, r = lane / 4, c = lane % 4, left = own.left - r;
  but -= own.first + r;
  bool has_last = (G - 1) * 32 + c * 8 < cache.head_dim;
  const f16* row = begin_of(cache.v + 8 * c, row_at(cache, own.place) + r, cache.head_dim);
  f16* to = shared.v[0][thread / 32 * OWN + r];
#pragma unroll
  for (int i = 0; i < OWN / 8; i++) {
#pragma unroll
    for (int g = 0; g < G; g++)
      copy_unless(8 * i == but, to + i * 8 * G * 32 + 8 * eight_in<G>(r, 4 * g + c), row + g * 32,
                  8 * i < left && (g < G - 1 || has_last));
    row = computed_once(row + 8 * cache.head_dim);
  }
  end_of_copies();
}

// The operand a of 16 columns of V, from number `eight` on, and 16 positions of a tile.
template <int G>
__device__ __forceinline__ MmaA columns_of(const f16 (&v)[TILE][G * 32], int position, int eight) {
  int lane = threadIdx.x % 32;
  MmaA a;
#ifdef HOSTCUDA
  for (int i = 0; i < 4; i++) {
    int at = position + i / 2 * 8 + lane % 4 * 2;
    f16 pair[2];
    for (int h = 0; h < 2; h++) pair[h] = v[at + h][8 * eight_in<G>(at + h, eight + i % 2) + lane / 4];
    a.x[i] = pack_f16x2(pair[0], pair[1]);
  }
#else
  int in_16 = lane / 16 * 8 + lane % 8;
  const f16* row = &v[position + in_16][8 * eight_in<G>(in_16, eight + lane / 8 % 2)];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
  return a;
}

// Element j * 32 + lane of a head of n elements, of which `from` is element `lane`; zeros after its end.
template <int G>
__device__ __forceinline__ void load_head(float (&x)[G], const float* from, int n) {
#pragma unroll
  for (int j = 0; j < G; j++) {
    x[j] = 0.0f;
    if (j * 32 + static_cast<int>(threadIdx.x % 32) < n) x[j] = from[j * 32];
  }
}

// rms_norm_f32 of a head by one warp. weight: as load_head loads it.
template <int G>
__device__ __forceinline__ void norm_head(float (&x)[G], const float (&weight)[G], int n, float eps) {
  float squares = sum_by_warp<G>(n, [&](int j) { return __fmul_rn(x[j], x[j]); });
  float factor = norm_scale(squares, static_cast<float>(n), eps);
#pragma unroll
  for (int j = 0; j < G; j++)
    if (j * 32 + threadIdx.x % 32 < n) x[j] = x[j] * factor * weight[j];
}

// cos and sin for a lane's columns. cos, sin: of the position.
template <int G>
struct Angles {
  float cos[G], sin[G];
};
template <int G>
__device__ __forceinline__ void load_angles(Angles<G>& angles, const float* cos, const float* sin, int half, int neox) {
#pragma unroll
  for (int j = 0; j < G; j++) {
    int i = j * 32 + threadIdx.x % 32, at = !neox ? i / 2 : i < half ? i : i - half;
    angles.cos[j] = angles.sin[j] = 0.0f;
    if (cos && i < 2 * half) angles.cos[j] = cos[at], angles.sin[j] = sin[at];
  }
}

// Rotates a head by one warp, through `row` in shared memory.
template <int G>
__device__ __forceinline__ void rotate_head(float (&x)[G], float* row, const Angles<G>& angles, int half, int neox) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < G; j++) row[j * 32 + lane] = x[j];
  __syncwarp(ALL_LANES);
#pragma unroll
  for (int j = 0; j < G; j++) {
    int i = j * 32 + lane;
    bool is_first = neox ? i < half : i % 2 == 0;  // of a pair
    int other = !neox ? i ^ 1 : is_first ? i + half : i - half;
    float sin = is_first ? -angles.sin[j] : angles.sin[j];
    if (i < 2 * half) x[j] = __fadd_rn(__fmul_rn(x[j], angles.cos[j]), __fmul_rn(row[other], sin));
  }
  __syncwarp(ALL_LANES);
}

// Element i of a row of halves times 2^-e, where x has the elements of a head.
template <int G>
__device__ __forceinline__ int halves_of_head(f16 (&halves)[G], const float (&x)[G], int head_dim) {
  int lane = threadIdx.x % 32;
  uint32_t top = 0;  // magnitudes are in the same order as their bits
#pragma unroll
  for (int j = 0; j < G; j++)
    if (j * 32 + lane < head_dim) top = max(top, __float_as_uint(fabsf(x[j])));
  int e = row_exponent(__uint_as_float(__reduce_max_sync(ALL_LANES, top)));
#pragma unroll
  for (int j = 0; j < G; j++) halves[j] = j * 32 + lane < head_dim ? f32_to_f16(times_power(x[j], e)) : 0;
  return e;
}

// Puts the new position, which was not in the cache, where the others are.
template <int G>
__device__ __forceinline__ void put_new(Requested<G>& requested, StepShared<G>& shared, const Own& own, int start, int at) {
  int lane = threadIdx.x % 32, in_own = at - own.first, in_quad = at - start;
  if (in_own >= 0 && in_own < OWN) {
#pragma unroll
    for (int i = 0; i < OWN / 8; i++)
      if (in_own == lane / 4 + 8 * i)
#pragma unroll
        for (int g = 0; g < G; g++)
          requested.k[i][g] = *reinterpret_cast<const uint4*>(&shared.new_k[g * 32 + lane % 4 * 8]);
  }
  if (threadIdx.x < 4 * G)
    *reinterpret_cast<uint4*>(&shared.v[0][in_quad][8 * eight_in<G>(in_quad, threadIdx.x)]) =
        *reinterpret_cast<const uint4*>(&shared.new_v[8 * threadIdx.x]);
}

__device__ __forceinline__ float largest_of_eight(float x) {
  x = largest_of_four(x);
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 4));
}

// Folds n entries of a row in order, and writes y, by a warp. n_before: if the entries are tiles, how many tiles of their
// split are before the first one; WHOLE_SPLITS if they are splits.
// It is not part of the kernel's own code, because the kernel's loop then has registers enough.
constexpr int WHOLE_SPLITS = -1;
template <int G>
__device__ NOT_INLINED void fold_entries(const float* entries, const float* sinks, float* y, int row, int head_dim, int n,
                                         int n_before) {
  constexpr int TOGETHER = WARPS;  // the tiles of a split
  int lane = threadIdx.x % 32, own = lane % TOGETHER;
  bool of_tiles = n_before != WHOLE_SPLITS;
  float m = minus_infinity(), l = 0.0f, total_m = minus_infinity(), total_l = 0.0f, o[G] = {}, total[G] = {};
  float2 sums = make_float2(minus_infinity(), 0.0f);  // m and l of the lane's own entry of those that are folded next
  float others[TOGETHER][G] = {};
  // While entries are on their way, those before them are folded; at first there are none.
  int begin = of_tiles ? -n_before : 0;
#pragma unroll 1
  for (int first = begin; first < n + TOGETHER; first += TOGETHER) {
    float2 next_sums = make_float2(minus_infinity(), 0.0f);
    if (static_cast<unsigned>(first + own) < static_cast<unsigned>(n))
      next_sums = *reinterpret_cast<const float2*>(entries + (first + own) * (head_dim + 2) + head_dim);
    float next[TOGETHER][G];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const float* from = computed_once(entries + (first + i) * (head_dim + 2) + lane);
      bool exists = static_cast<unsigned>(first + i) < static_cast<unsigned>(n);
#pragma unroll
      for (int j = 0; j < G; j++) {
        next[i][j] = 0.0f;
        if (exists && (j < G - 1 || j * 32 + lane < head_dim)) next[i][j] = from[j * 32];
      }
    }

    if (first != begin) {
      // A lane has the factors for one entry. The m of all entries before it is a maximum, so it needs no order.
      float top = sums.x;
#pragma unroll
      for (int distance = 1; distance < TOGETHER; distance *= 2) {
        float other = __shfl_up_sync(ALL_LANES, top, distance);
        if (own >= distance) top = fmaxf(top, other);
      }
      float before = __shfl_up_sync(ALL_LANES, top, 1), keep, add, unused = 0.0f;
      before = own ? fmaxf(m, before) : m;
      fold(before, unused, sums.x, sums.y, keep, add);
      m = __shfl_sync(ALL_LANES, before, TOGETHER - 1);
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        float of_i = __shfl_sync(ALL_LANES, add, i), keep_i = __shfl_sync(ALL_LANES, keep, i);
        float of_l = folded(l, __shfl_sync(ALL_LANES, sums.y, i), keep_i, of_i);
        l = of_i == NOTHING ? l : of_l;
#pragma unroll
        for (int j = 0; j < G; j++) o[j] = of_i == NOTHING ? o[j] : folded(o[j], others[i][j], keep_i, of_i);
      }
      if (of_tiles) {
        fold(total_m, total_l, m, l, keep, add);
#pragma unroll
        for (int j = 0; j < G; j++) total[j] = add == NOTHING ? total[j] : folded(total[j], o[j], keep, add), o[j] = 0.0f;
        m = minus_infinity(), l = 0.0f;
      }
    }
    sums = next_sums;
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int j = 0; j < G; j++) others[i][j] = next[i][j];
  }
  float factor = of_tiles ? finish(total_m, total_l, sinks, row) : finish(m, l, sinks, row);
#pragma unroll
  for (int j = 0; j < G; j++) {
    int d = j * 32 + lane;
    float value = __fmul_rn(of_tiles ? total[j] : o[j], factor);
    if (d < head_dim) y[d] = value;
  }
}

template <int G>
__device__ __forceinline__ void attention_step(const Projections& qkv, const float* q_norm, const float* k_norm,
                                               const float* cos, const float* sin, const NewRows& k_cache,
                                               const NewRows& v_cache, const int* tables, const int* positions,
                                               const float* sinks, float* partial, int* arrived, float* y, int q_stride, int k_stride, int v_stride, int group,
                                               int n_head_kv, int head_dim,
                                               int half, int neox, int block_size, int window, int table_stride,
                                               int n_entries, int most_quads, float eps, float q_factor, float scale) {
  DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<StepShared<G>*>(memory);
  let_next_begin();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
  int token = blockIdx.x, first_row = 0;
  if (group > STEP_ROWS) {
    int n_parts = (group + STEP_ROWS - 1) / STEP_ROWS;
    token = blockIdx.x / n_parts, first_row = blockIdx.x % n_parts * STEP_ROWS;
  }
  int n_rows = min(group - first_row, STEP_ROWS);
  int at = load_latest<int>(&positions[token]), oldest = window ? max(at - window + 1, 0) : 0;
  // The block of the cache that the warp needs if it begins with the first quad: requested without waiting for the position.
  tables += static_cast<long long>(token) * table_stride;
  int first_block = 0, of_table = warp * OWN / block_size;
  if (of_table < table_stride) first_block = load_latest<int>(&tables[of_table]);
  int z = blockIdx.z, n_blocks = gridDim.z;
  bool by_splits = at / SPLIT == oldest / SPLIT || at / QUAD + 1 - oldest / QUAD > most_quads;
  int unit = by_splits ? SPLIT : QUAD, shift = by_splits ? 9 : 8, first_unit = oldest >> shift;
  static_assert(SPLIT == 1 << 9 && QUAD == 1 << 8, "the shifts");
  int n_units = (at >> shift) + 1 - first_unit;
  if (at < 0 || z >= n_units) {
    if (z == 0) wait_for_previous();  // so that this kernel does not end before the previous one
    return;
  }

  // Until the wait: what the previous kernels of a step do not write.
  Cache cache{k_cache.values, v_cache.values, k_cache.exponents, v_cache.exponents,
              tables,         block_size,     n_head_kv,         head_dim,          at};
  int start = max((first_unit + z) << shift, oldest / QUAD * QUAD);
  bool has_new = n_units <= n_blocks ? z == n_units - 1 : (n_units - 1) % n_blocks == z;
  Own own = own_of(cache, head, start, oldest, start == 0);
  if (start == 0) own.place.block = first_block;
  Requested<G> requested = {};
  request_k(requested, cache, own);
  request_v(shared, cache, own, at);
  int n_jobs = n_rows + (has_new ? 2 : 0);  // heads of Q, then K and V: one or two for a warp
  int query_head = head * group + first_row;
  const float* heads[2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    int job = warp + n * WARPS;
    bool of_q = job < n_rows, of_k = job == n_rows;
    heads[n] = (of_q ? qkv.q : of_k ? qkv.k : qkv.v) + (of_q ? query_head + job : head) * head_dim + lane +
               static_cast<long long>(token) * (of_q ? q_stride : of_k ? k_stride : v_stride);
  }
  Angles<G> angles;
  long long angles_at = static_cast<long long>(at) * half;
  load_angles(angles, cos ? cos + angles_at : nullptr, sin + angles_at, half, neox);
  float weight[G];
  const float* of_weight = warp < n_rows ? q_norm : k_norm;
  load_head<G>(weight, of_weight + lane, of_weight ? head_dim : 0);
  bool writes_new = has_new && first_row == 0;
  Place new_place = place_of(cache, head, at, writes_new);
  if (threadIdx.x == 0) {
    shared.row = (token * n_head_kv + head) * group + first_row;
    shared.first_entry = by_splits ? first_unit : first_unit * AT_ONCE;
    shared.n_units = n_units;
    shared.table = tables;
  }
  float sink = 0.0f;
  if (sinks && threadIdx.x < n_rows) sink = sinks[query_head + threadIdx.x];
  // Rows that do not exist are zeros.
  if (warp >= n_rows) {
#pragma unroll
    for (int g = 0; g < G; g++) shared.q[g][warp][lane] = 0;
    if (lane == 0) shared.factors[warp] = 1.0f;
  }

  wait_for_previous();
  if (threadIdx.x < STEP_ROWS) shared.sinks[threadIdx.x] = sink;
  float x[G], following[G];
  load_head<G>(x, heads[0], warp < n_jobs ? head_dim : 0);
  load_head<G>(following, heads[1], warp + WARPS < n_jobs ? head_dim : 0);
#pragma unroll 1
  for (int job = warp; job < n_jobs; job += WARPS) {
    bool of_q = job < n_rows, of_k = job == n_rows;
    if ((of_q && q_norm) || (of_k && k_norm)) {
      if (job >= WARPS) load_head<G>(weight, k_norm + lane, head_dim);
      norm_head<G>(x, weight, head_dim, eps);
    }
    if (cos && (of_q || of_k)) rotate_head<G>(x, shared.heads[warp], angles, half, neox);
    if (of_q && q_factor != 1.0f)
#pragma unroll
      for (int j = 0; j < G; j++) x[j] = __fmul_rn(x[j], q_factor);
    f16 halves[G];
    int e = halves_of_head<G>(halves, x, head_dim);
    f16* to = of_q ? &shared.q[0][job][lane] : (of_k ? shared.new_k : shared.new_v) + lane;
    int stride = of_q ? STEP_ROWS * 32 : 32;
#pragma unroll
    for (int j = 0; j < G; j++) to[j * stride] = halves[j];
    if (of_q) {
      if (lane == 0) shared.factors[job] = __fmul_rn(power_of_two(e), __fmul_rn(scale, LOG2_E));
    } else {
      unsigned char exponent = static_cast<unsigned char>(e + 127);
      if (lane == 0) shared.new_exponents[of_k ? 0 : 1] = exponent;
      if (writes_new) {
        long long new_row = row_at(cache, new_place);
        f16* values = (of_k ? k_cache.values : v_cache.values) + new_row * head_dim + lane;
#pragma unroll
        for (int j = 0; j < G; j++)
          if (j * 32 + lane < head_dim) values[j * 32] = halves[j];
        if (lane == 0) (of_k ? k_cache.exponents : v_cache.exponents)[new_row] = exponent;
      }
    }
#pragma unroll
    for (int j = 0; j < G; j++) x[j] = following[j];
  }
  __syncthreads();

  // Of the unit so far, for a warp's 16 columns: lane 4 · r + c has those of rows 2c and 2c + 1, and of columns r and r + 8.
  float l_all[2] = {}, o[2][2] = {};
  float m_all = minus_infinity();  // of the unit so far, for a warp's row
  bool is_alone = n_units == 1, is_apart = !by_splits && !is_alone;  // apart: tiles are entries
#pragma unroll 1
  for (;;) {
    int next = start + QUAD;
    if ((next & (unit - 1)) == 0) next += (n_blocks - 1) << shift;
    bool is_end = next > at, is_unit_end = (next & (unit - 1)) == 0 || is_end;

    // Scores: a warp has 32 positions.
    int thread = computed_anew(threadIdx.x), lane = thread % 32, r = lane / 4, c = lane % 4;
    int tile = thread / 32 * OWN / TILE, first = thread / 32 * OWN % TILE;
    bool holds_new = has_new && start + QUAD > at;
    if (holds_new) put_new(requested, shared, own, start, at);
    if (lane < OWN / 4) {  // exponents, zeros for positions that do not exist
      int left = own.left - lane * 4, of_new = at - own.first - lane * 4;
      uint32_t mask = left >= 4 ? ~0u : left > 0 ? (1u << 8 * left) - 1 : 0, of_k = 0, of_v = 0;
      if (left > 0) of_k = requested.k_exponents & mask, of_v = requested.v_exponents & mask;
      if (holds_new && of_new >= 0 && of_new < 4) {
        of_k |= static_cast<uint32_t>(shared.new_exponents[0]) << 8 * of_new;
        of_v |= static_cast<uint32_t>(shared.new_exponents[1]) << 8 * of_new;
      }
      *reinterpret_cast<uint2*>(&shared.exponents[tile][first / 2 + lane * 2]) =
          make_uint2(__byte_perm(of_k, of_v, 0x5140), __byte_perm(of_k, of_v, 0x7362));
    }
    if (!is_end) {
      cache.table = shared.table;
      own = own_of(cache, head, next, oldest);
    }
    MmaD s[OWN / 16] = {};
#pragma unroll
    for (int g = 0; g < G; g++) {
      uint4 q = *reinterpret_cast<const uint4*>(&shared.q[g][r][8 * c]);
#pragma unroll
      for (int n = 0; n < OWN / 16; n++) {
        uint4 low = requested.k[2 * n][g], high = requested.k[2 * n + 1][g];
        mma_m16n8k16(s[n], {{low.x, high.x, low.y, high.y}}, {{q.x, q.y}});
        mma_m16n8k16(s[n], {{low.z, high.z, low.w, high.w}}, {{q.z, q.w}});
      }
    }
#pragma unroll
    for (int n = 0; n < OWN / 16; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) shared.scores[tile][2 * c + i % 2][first + n * 16 + i / 2 * 8 + r] = s[n].x[i];
    if (!is_end) request_k(requested, cache, own);
    __syncthreads();

    // Weights: a warp has a row, and eight of its lanes each tile. Lane 8 · t + 4 · h + c has positions 2c and 2c + 1 of four
    // eights of the tile, from number 4 · h on.
    {
      int thread = computed_anew(threadIdx.x), lane = thread % 32, warp = thread / 32, c = lane % 4;
      int t = lane / 8, h = lane / 4 % 2;
      float p[8], scaled[8], factor = shared.factors[warp], m = minus_infinity(), top = 0.0f;
      uint32_t exponents[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 pair = *reinterpret_cast<const float2*>(&shared.scores[t][warp][(4 * h + i) * 8 + 2 * c]);
        p[2 * i] = pair.x, p[2 * i + 1] = pair.y;
        exponents[i] = shared.exponents[t][(4 * h + i) * 4 + c];
      }
      auto cache_scale = [&](int i, int of_v) {
        return __uint_as_float((exponents[i / 2] >> (i % 2 * 16 + of_v * 8) & 255) << 23);
      };
      int position = start + t * TILE + h * 32 + 2 * c;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int of_i = position + i / 2 * 8 + i % 2;
        p[i] = of_i > at || of_i < oldest ? minus_infinity() : __fmul_rn(__fmul_rn(p[i], factor), cache_scale(i, 0));
        m = fmaxf(m, p[i]);
      }
      m = largest_of_eight(m);
      // The factors of a fold, for the lane's tile. The m of all tiles before it is a maximum, so it needs no order.
      float before = m_all;
#pragma unroll
      for (int i = 1; i < AT_ONCE; i++) {
        float other = __shfl_sync(ALL_LANES, m, lane - 8 * i);
        if (t >= i) before = fmaxf(before, other);
      }
      float M = fmaxf(before, m), of_smaller = exp2f(fminf(before, m) - M);
      if (lane == 31) shared.m[warp] = M;
      m_all = __shfl_sync(ALL_LANES, M, 31);
      if (is_unit_end) m_all = minus_infinity();
      float base = m == minus_infinity() ? 0.0f : m;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        p[i] = exp2f(p[i] - base);
        scaled[i] = __fmul_rn(p[i], cache_scale(i, 1));
        top = fmaxf(top, scaled[i]);
      }
      uint32_t field = __float_as_uint(largest_of_eight(top)) >> 23;
      field = min(max(field, 15u), 254u);
      float up = __uint_as_float((268u - field) << 23), down = __uint_as_float((field - 14u) << 23);
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = f32_to_f16x2(__fmul_rn(scaled[2 * i], up), __fmul_rn(scaled[2 * i + 1], up));
      shared.p[t][h][warp * 4 + c] = make_uint4(words[0], words[1], words[2], words[3]);
      // l: 16 numbers ascending, eight of them in the lane with h = 0, whose sum goes on in the one with h = 1.
      float l = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) l += p[i];
      l = __shfl_xor_sync(ALL_LANES, l, 4);
#pragma unroll
      for (int i = 0; i < 8; i++) l += p[i];
      l = sum_of_four(l);
      bool is_empty = m == minus_infinity() && l == 0.0f;
      float keep = is_empty || before == M ? 1.0f : of_smaller, add = is_empty ? NOTHING : m == M ? 1.0f : of_smaller;
      if (lane % 8 == 4) shared.of_rows[t][warp] = make_float4(is_apart ? m : keep, add, l, down);
    }
    wait_for_copies<0>();
    __syncthreads();

    // Sums: a warp has 16 columns. Numbers are computed anew, so that no registers keep addresses from pass to pass.
    if (warp < 2 * G) {
      int thread = computed_anew(threadIdx.x), lane = thread % 32, warp = thread / 32, r = lane / 4, c = lane % 4;
      int own_row = shared.row + 2 * c;
      MmaD sums[AT_ONCE] = {};
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
          uint2 p = reinterpret_cast<const uint2*>(&shared.p[t][kk / 2][lane])[kk % 2];
          mma_m16n8k16(sums[t], columns_of<G>(shared.v[t], kk * 16, 2 * warp), {{p.x, p.y}});
        }
      int d = warp * 16 + r;
      bool exists[2] = {d < head_dim, d + 8 < head_dim};
      auto entry_of = [&](int i, int number) {
        return partial + (static_cast<long long>(own_row + i) * n_entries + (number - shared.first_entry)) * (head_dim + 2);
      };
      auto write = [&](float* entry, float low, float high, float m, float l) {
        if (exists[0]) entry[d] = low;
        if (exists[1]) entry[d + 8] = high;
        if (d == 0) *reinterpret_cast<float2*>(entry + head_dim) = make_float2(m, l);
      };
      const float4* of_rows = &shared.of_rows[0][2 * c];
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[t].x[i] = __fmul_rn(sums[t].x[i], of_rows[t * STEP_ROWS + i % 2].w);
      if (is_apart) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (2 * c + i >= n_rows) continue;
          float* entry = entry_of(i, start / TILE);
#pragma unroll
          for (int t = 0; t < AT_ONCE; t++) {
            write(entry, sums[t].x[i], sums[t].x[2 + i], of_rows[t * STEP_ROWS + i].x, of_rows[t * STEP_ROWS + i].z);
            entry = computed_once(entry + (head_dim + 2));
          }
        }
      } else {
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float4 of_row = of_rows[t * STEP_ROWS + i];
            float keep = of_row.x, add = of_row.y, l = folded(l_all[i], of_row.z, keep, add);
            l_all[i] = add == NOTHING ? l_all[i] : l;
#pragma unroll
            for (int j = 0; j < 2; j++) {
              float sum = folded(o[i][j], sums[t].x[2 * j + i], keep, add);
              o[i][j] = add == NOTHING ? o[i][j] : sum;
            }
          }
        if (is_unit_end) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (i >= n_rows) continue;
            bool is_row = 2 * c + i < n_rows;
#pragma unroll
            for (int j = 0; j < 2; j++) o[i][j] = __fadd_rn(o[i][j], 0.0f);  // as folding into nothing does
            if (shared.n_units == 1) {
              float by = is_row ? finish(shared.m[2 * c + i], l_all[i], sinks ? shared.sinks : nullptr, 2 * c + i) : 0.0f;
              float low = __fmul_rn(o[i][0], by), high = __fmul_rn(o[i][1], by);
              unsigned to = static_cast<unsigned>(own_row + i) * head_dim + d;
              if (is_row && exists[0]) y[to] = low;
              if (is_row && exists[1]) y[to + 8] = high;
            } else if (is_row) {
              write(entry_of(i, start / SPLIT), o[i][0], o[i][1], shared.m[2 * c + i], l_all[i]);
            }
            l_all[i] = 0.0f, o[i][0] = o[i][1] = 0.0f;
          }
        }
      }
    }
    if (is_end) break;
    __syncthreads();  // V has been read
    request_v(shared, cache, own, at);
    start = next;
  }
  if (shared.n_units == 1) return;

  // The block that is last of those with the same rows folds all their entries.
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = arrived + blockIdx.x * gridDim.y + blockIdx.y;
    shared.is_last = arrive(counter) == min(shared.n_units, static_cast<int>(gridDim.z)) - 1;
    if (shared.is_last) *counter = 0;
  }
  __syncthreads();
  if (!shared.is_last || warp >= n_rows) return;
  long long own_row = shared.row + warp;
  n_units = shared.n_units;
  fold_entries<G>(partial + own_row * n_entries * (head_dim + 2), sinks ? shared.sinks : nullptr, y + own_row * head_dim,
                  warp, head_dim,
                  by_splits ? n_units : n_units * AT_ONCE, by_splits ? WHOLE_SPLITS : shared.first_entry % WARPS);
}

#define ATTENTION_STEP(name, G)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      name(Projections qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin, NewRows k,   \
           NewRows v, const int* tables, const int* positions, const float* sinks, float* partial, int* arrived,       \
           float* y, int q_stride, int k_stride, int v_stride,                                                         \
           int group, int n_head_kv, int head_dim,                                                                     \
           int half, int neox, int block_size, int window, int table_stride, int n_entries, int most_quads, float eps, \
           float q_factor, float scale) {                                                                              \
    attention_step<G>(qkv, q_norm, k_norm, cos, sin, k, v, tables, positions, sinks, partial, arrived, y,              \
                      q_stride, k_stride, v_stride, group, n_head_kv, head_dim, half, neox, block_size, window,        \
                      table_stride, n_entries, most_quads, eps, q_factor, scale);                                      \
  }
ATTENTION_STEP(attention_step_32, 1)
ATTENTION_STEP(attention_step_64, 2)
ATTENTION_STEP(attention_step_96, 3)
ATTENTION_STEP(attention_step_128, 4)
