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
// Grid: x rows · ⌈group / 8⌉, y KV heads, z any number Z; 256 threads. The unit of work is a pair of tiles, from a multiple of
// 128, for rows that see at most most_pairs of them: one pass of a block, so many blocks share a short row's work. For other
// rows it is a split, which has fewer entries to write and to fold. Block z takes units z, z + Z, … from the first one on. A
// row that sees one unit is finished by its block. Otherwise o, m, l of both tiles of a pair, or of a split, are written to
// `partial`, and the last block to arrive folds them in the order above, with a warp for each row. The block that has the last
// unit computes the new K and V, and has them from its own shared memory; they are written for the next step.
// Two tiles at once: a warp computes scores of 8 positions of each, then P of a row, then 16 columns of o. The next two tiles
// are requested as soon as registers are free. Instructions are seldom in the caches when they are needed first, so all of
// this is one loop, with every kind of work in one place.
//
// May be launched to overlap with the previous kernel. Precondition: all inputs but Q, K and V are read before it has ended
// (positions, tables, earlier positions of the cache, …), so they must have been there before a kernel began that did not
// overlap. In a step that is the first kernel; only the last one changes positions.

constexpr int SPLIT = TILE * WARPS;
constexpr int AT_ONCE = 2;    // tiles that a block computes together: of each, a warp has 8 positions, then 16 columns
constexpr int PAIR = AT_ONCE * TILE;
constexpr int STEP_ROWS = 8;  // rows of a block: half of what the tensor cores multiply, to save registers

template <int G>
struct alignas(16) StepShared {
  MmaA q[G * 2][32], p[AT_ONCE][4][32];  // operands of products, as lanes hold them
  float4 of_rows[AT_ONCE][STEP_ROWS];    // m, l and 2^-e of P
  f16 new_k[G * 32], new_v[G * 32];
  float scores[AT_ONCE][STEP_ROWS][TILE + 8];  // + 8: lanes meet no bank twice
  unsigned char exponents[AT_ONCE][2 * TILE];  // K, V, K, V, …
  float heads[WARPS][G * 32];
  float norms[2][G * 32], cos[G * 32], sin[G * 32];  // weights for Q and K; of the position, for each column
  float factors[STEP_ROWS], sinks[STEP_ROWS];        // of scores: q scale · scale · log2(e)
  unsigned char new_exponents[2];
  // What is seldom needed: the first row, the number of rows, the row of the cache for the new K and V (below zero: they are
  // not written), the unit and how many of it the rows see, the tile or split that the first entry is of, and whether this
  // block is the last one.
  long long new_row;
  int row, n_rows, unit, n_units, first, is_last;
};

// What a lane, 4 · r + c, has requested of the tiles. K: position r of the warp's 8, columns 8c … 8c + 7 of each group. V:
// columns 2r and 2r + 1 of the warp's 16, at the positions of a product's operand. One exponent: lanes 16 · t … have those of
// the warp's 8 positions of tile t: K, V, K, V, … All of it is zero for positions that are not in the cache.
template <int G>
struct Requested {
  uint4 k[AT_ONCE][G];
  uint32_t v[AT_ONCE][16];
  unsigned char exponent;
};

// A lane's operand, in one load from shared memory.
__device__ __forceinline__ MmaA operand(const MmaA& from) {
  uint4 four = *reinterpret_cast<const uint4*>(&from);
  return MmaA{{four.x, four.y, four.z, four.w}};
}

// Where a head's tiles are in the cache: their blocks, and their first rows in them.
struct Places {
  int block[AT_ONCE], row[AT_ONCE];
};

// How many positions of the tile from `start` on are in the cache, if above zero. oldest: the first one that the row sees.
__device__ __forceinline__ int positions_in(const Cache& cache, int start, int oldest) {
  return start + TILE > oldest ? cache.n_kv - start : 0;
}

// The row of tile t of a head.
__device__ __forceinline__ unsigned row_of_tile(const Cache& cache, const Places& places, int t) {
  return static_cast<unsigned>(places.block[t]) * static_cast<unsigned>(cache.n_head_kv * cache.block_size) +
         places.row[t];
}

// Where a row begins in an array with rows of `width`, a multiple of 8. Cheaper than a product of 64 bits.
__device__ __forceinline__ const f16* begin_of(const f16* rows, unsigned row, int width) {
  return computed_once(rows + 8 * static_cast<unsigned long long>(row * static_cast<unsigned>(width / 8)));
}

// The row of a head at a position.
__device__ __forceinline__ long long row_of(const Cache& cache, int head, int position) {
  int at = static_cast<unsigned>(position) / static_cast<unsigned>(cache.block_size);
  return cached_row(load_latest<int>(&cache.table[at]), cache.n_head_kv, head, cache.block_size,
                    position - at * cache.block_size);
}

// Of the tiles from `start` on.
__device__ __forceinline__ void request_places(Places& places, const Cache& cache, int head, int start, int oldest) {
  int at = static_cast<unsigned>(start) / static_cast<unsigned>(cache.block_size);
  int offset = start - at * cache.block_size;
#pragma unroll
  for (int t = 0; t < AT_ONCE; t++) {
    places.block[t] = positions_in(cache, start + t * TILE, oldest) > 0 ? load_latest<int>(&cache.table[at]) : 0;
    places.row[t] = head * cache.block_size + offset;
    offset += TILE;
    if (offset == cache.block_size) offset = 0, at++;
  }
}

template <int G>
__device__ __forceinline__ void request_k(Requested<G>& requested, const Cache& cache, const Places& places, int start,
                                          int oldest) {
  int own = threadIdx.x / 4, column = threadIdx.x % 4 * 8, n[AT_ONCE];
  unsigned rows[AT_ONCE];
#pragma unroll
  for (int t = 0; t < AT_ONCE; t++) {
    rows[t] = row_of_tile(cache, places, t);
    n[t] = positions_in(cache, start + t * TILE, oldest);
    const f16* row = begin_of(cache.k + column, rows[t] + own, cache.head_dim);
#pragma unroll
    for (int g = 0; g < G; g++) {
      requested.k[t][g] = make_uint4(0, 0, 0, 0);
      bool exists = own < n[t] && (g < G - 1 || g * 32 + column < cache.head_dim);
      if (exists) requested.k[t][g] = load_latest<uint4>(row + g * 32);
    }
  }
  bool of_second = threadIdx.x % 32 >= 16;
  own = threadIdx.x / 32 * 8 + threadIdx.x % 16 / 2;
  const unsigned char* exponents = threadIdx.x % 2 ? cache.v_exponents : cache.k_exponents;
  unsigned row = (of_second ? rows[1] : rows[0]) + own;
  requested.exponent = 0;
  if (own < (of_second ? n[1] : n[0])) requested.exponent = load_latest<unsigned char>(exponents + row);
}

// The position in a tile of element i of Requested::v, for c = 0.
__device__ __forceinline__ constexpr int position_in(int i) { return i / 4 * 16 + i % 2 + i / 2 % 2 * 8; }

template <int G>
__device__ __forceinline__ void request_v(Requested<G>& requested, const Cache& cache, const Places& places, int start,
                                          int oldest, int t) {
  int column = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2, own = threadIdx.x % 4 * 2;
  const f16* v = begin_of(cache.v + column, row_of_tile(cache, places, t) + own, cache.head_dim);
  int left = column < cache.head_dim ? positions_in(cache, start + t * TILE, oldest) - own : 0;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    requested.v[t][i] = 0;
    if (position_in(i) < left) requested.v[t][i] = load_latest<uint32_t>(v + cache.head_dim * position_in(i));
  }
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

// rms_norm_f32 of a head by one warp.
template <int G>
__device__ __forceinline__ void norm_head(float (&x)[G], const float* weight, int n, float eps) {
  float squares = sum_by_warp<G>(n, [&](int j) { return __fmul_rn(x[j], x[j]); });
  float factor = norm_scale(squares, static_cast<float>(n), eps);
#pragma unroll
  for (int j = 0; j < G; j++)
    if (j * 32 + threadIdx.x % 32 < n) x[j] = x[j] * factor * weight[j * 32 + threadIdx.x % 32];
}

// Rotates a head by one warp, through `row` in shared memory. cos, sin: for each column; those of a pair's first one are
// cos and -sin.
template <int G>
__device__ __forceinline__ void rotate_head(float (&x)[G], float* row, const float* cos, const float* sin, int half, int neox) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < G; j++) row[j * 32 + lane] = x[j];
  __syncwarp(ALL_LANES);
#pragma unroll
  for (int j = 0; j < G; j++) {
    int i = j * 32 + lane, other = !neox ? i ^ 1 : i < half ? i + half : i - half;
    if (i < 2 * half) x[j] = __fadd_rn(__fmul_rn(x[j], cos[i]), __fmul_rn(row[other], sin[i]));
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

// Replaces what was not in the cache, the new position, which is in the tiles from `start` on.
template <int G>
__device__ __forceinline__ void put_new(Requested<G>& requested, const StepShared<G>& shared, int start, int at) {
  int warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  uint32_t v = warp * 16 < G * 32 ? *reinterpret_cast<const uint32_t*>(&shared.new_v[warp * 16 + r * 2]) : 0;
#pragma unroll
  for (int t = 0; t < AT_ONCE; t++) {
    int in_tile = at - start - t * TILE;
    if (in_tile == warp * 8 + threadIdx.x % 16 / 2 && threadIdx.x % 32 / 16 == t)
      requested.exponent = shared.new_exponents[threadIdx.x % 2];
    if (in_tile == warp * 8 + r) {
#pragma unroll
      for (int g = 0; g < G; g++) requested.k[t][g] = *reinterpret_cast<const uint4*>(&shared.new_k[g * 32 + c * 8]);
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (in_tile - c * 2 == position_in(i)) requested.v[t][i] = v;
  }
}

// Folds n entries of a row in order, and writes y, by a warp. n_before: if the entries are tiles, how many tiles of their
// split are before the first one; WHOLE_SPLITS if they are splits.
constexpr int WHOLE_SPLITS = -1;
template <int G>
__device__ __forceinline__ void fold_entries(const float* entries, const float* sinks, float* y, float* stats, int row, int head_dim,
                                             int n, int n_before) {
  constexpr int TOGETHER = WARPS;  // the tiles of a split
  int lane = threadIdx.x % 32, own = lane % TOGETHER;
  bool of_tiles = n_before != WHOLE_SPLITS;
  float m = minus_infinity(), l = 0.0f, total_m = minus_infinity(), total_l = 0.0f, o[G] = {}, total[G] = {};
  float2 sums = make_float2(minus_infinity(), 0.0f);  // m and l of the lane's own entry of those that are folded next
  float others[TOGETHER][G] = {};
  // While entries are on their way, those before them are folded; at first there are none, which are left out.
#pragma unroll 1
  for (int first = of_tiles ? -n_before : 0; first < n + TOGETHER; first += TOGETHER) {
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
    if (stats) put_stats(stats, d, d < head_dim ? value : 0.0f, d < head_dim && d % GROUP == 0, ALL_LANES);
  }
}

template <int G>
__device__ __forceinline__ void attention_step(const Projections& qkv, const float* q_norm, const float* k_norm,
                                               const float* cos, const float* sin, const NewRows& k_cache,
                                               const NewRows& v_cache, const int* tables, const int* positions,
                                               const float* sinks, float* partial, int* arrived, float* y, float* stats,
                                               int q_stride, int k_stride, int v_stride, int group, int n_head_kv, int head_dim,
                                               int half, int neox, int block_size, int window, int table_stride,
                                               int n_entries, int most_pairs, float eps, float q_factor, float scale) {
  DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<StepShared<G>*>(memory);
  let_next_begin();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4, head = blockIdx.y;
  int n_parts = (group + STEP_ROWS - 1) / STEP_ROWS;
  int token = blockIdx.x / n_parts, first_row = blockIdx.x % n_parts * STEP_ROWS;
  int n_rows = min(group - first_row, STEP_ROWS);
  int at = load_latest<int>(&positions[token]), oldest = window ? max(at - window + 1, 0) : 0;
  int n_pairs = at / PAIR + 1 - oldest / PAIR, z = blockIdx.z, n_blocks = gridDim.z;
  bool by_splits = n_pairs > most_pairs;
  int unit = by_splits ? SPLIT : PAIR, first_unit = oldest / unit, n_units = at / unit + 1 - first_unit;
  if (at < 0 || z >= n_units) {
    if (z == 0) wait_for_previous();  // so that this kernel does not end before the previous one
    return;
  }

  // Until the wait: what the previous kernels of a step do not write.
  Cache cache{k_cache.values, v_cache.values, k_cache.exponents, v_cache.exponents,
              tables + static_cast<long long>(token) * table_stride, block_size, n_head_kv, head_dim, at};
  int start = max((first_unit + z) * unit, oldest / PAIR * PAIR), next = start;
  Places places;
  request_places(places, cache, head, next, oldest);
  bool has_new = static_cast<unsigned>(n_units - 1) % gridDim.z == blockIdx.z;
  if (threadIdx.x == 0) {
    shared.row = (token * n_head_kv + head) * group + first_row;
    shared.n_rows = n_rows, shared.unit = unit, shared.n_units = n_units;
    shared.first = by_splits ? first_unit : first_unit * AT_ONCE;
    shared.new_row = has_new && first_row == 0 ? row_of(cache, head, at) : -1;
  }
  int i = threadIdx.x % 128;  // half of the threads for Q and cos, half for K and sin
  const float *norm = threadIdx.x < 128 ? q_norm : k_norm, *angles = threadIdx.x < 128 ? cos : sin;
  if (norm && i < head_dim) shared.norms[threadIdx.x / 128][i] = norm[i];
  if (angles && i < 2 * half) {
    bool is_first = neox ? i < half : i % 2 == 0;
    float angle = angles[static_cast<long long>(at) * half + (!neox ? i / 2 : is_first ? i : i - half)];
    (threadIdx.x < 128 ? shared.cos : shared.sin)[i] = threadIdx.x >= 128 && is_first ? -angle : angle;
  }
  int query_head = head * group + first_row;
  if (sinks && threadIdx.x < n_rows) shared.sinks[threadIdx.x] = sinks[query_head + threadIdx.x];
  // Rows that do not exist are zeros. Word i % 4 of a lane's operand is of row lane / 4 + i % 2 * 8.
#pragma unroll 1
  for (int i = threadIdx.x; i < G * 2 * 32 * 4; i += blockDim.x)
    if (i / 16 % 8 + i % 2 * 8 >= n_rows) reinterpret_cast<f16x2*>(shared.q)[i] = 0;
  if (threadIdx.x >= n_rows && threadIdx.x < STEP_ROWS) shared.factors[threadIdx.x] = 1.0f;
  __syncthreads();

  int n_jobs = n_rows + (has_new ? 2 : 0);  // heads of Q, then K and V: one or two for a warp
  const float* heads[2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    int job = warp + n * WARPS;
    bool of_q = job < n_rows, of_k = job == n_rows;
    heads[n] = (of_q ? qkv.q : of_k ? qkv.k : qkv.v) + (of_q ? query_head + job : head) * head_dim + lane +
               static_cast<long long>(token) * (of_q ? q_stride : of_k ? k_stride : v_stride);
  }
  float m_all = minus_infinity(), l_all = 0.0f, o[2][2] = {};  // of the unit so far
  Requested<G> requested = {};
  // Each pass computes the tiles from `start` on and requests those from `next` on. Pass 0, before the wait, requests the first
  // tiles; what it computes, of zeros, is a rehearsal: it fetches the instructions, which takes longer than to execute them.
#pragma unroll 1
  for (int pass = 0;; pass++) {
    if (pass < 2) {
      if (pass) wait_for_previous();
      float x[G], following[G];
      load_head<G>(x, heads[0], pass && warp < n_jobs ? head_dim : 0);
      load_head<G>(following, heads[1], pass && warp + WARPS < n_jobs ? head_dim : 0);
#pragma unroll 1
      for (int job = warp; job < n_jobs; job += WARPS) {
        bool of_q = job < n_rows, of_k = job == n_rows;
        if ((of_q && q_norm) || (of_k && k_norm)) norm_head<G>(x, shared.norms[of_q ? 0 : 1], head_dim, eps);
        if (cos && (of_q || of_k)) rotate_head<G>(x, shared.heads[warp], shared.cos, shared.sin, half, neox);
        if (of_q && q_factor != 1.0f)
#pragma unroll
          for (int j = 0; j < G; j++) x[j] = __fmul_rn(x[j], q_factor);
        f16 halves[G];
        int e = halves_of_head<G>(halves, x, head_dim);
        // Columns 8c … 8c + 7 of a group are what lane c of the row has of two products.
        f16* of_row = reinterpret_cast<f16*>(&shared.q[lane / 4 % 2][job * 4 + lane / 8].x[lane / 2 % 2 * 2]) + lane % 2;
        f16* to = of_q ? of_row : (of_k ? shared.new_k : shared.new_v) + lane;
        int stride = of_q ? 2 * sizeof(shared.q[0]) / sizeof(f16) : 32;
#pragma unroll
        for (int j = 0; j < G; j++) to[j * stride] = halves[j];
        if (of_q) {
          if (lane == 0) shared.factors[job] = __fmul_rn(power_of_two(e), __fmul_rn(scale, LOG2_E));
        } else {
          unsigned char exponent = static_cast<unsigned char>(e + 127);
          if (lane == 0) shared.new_exponents[of_k ? 0 : 1] = exponent;
          if (pass && shared.new_row >= 0) {
            f16* values = (of_k ? k_cache.values : v_cache.values) + shared.new_row * head_dim + lane;
#pragma unroll
            for (int j = 0; j < G; j++)
              if (j * 32 + lane < head_dim) values[j * 32] = halves[j];
            if (lane == 0) (of_k ? k_cache.exponents : v_cache.exponents)[shared.new_row] = exponent;
          }
        }
#pragma unroll
        for (int j = 0; j < G; j++) x[j] = following[j];
      }
      __syncthreads();
    }

    // Scores: a warp has 8 positions of each tile.
    if (has_new && (!pass || start + PAIR > at)) put_new<G>(requested, shared, start, at);
    shared.exponents[lane / 16][warp * 16 + lane % 16] = requested.exponent;
    MmaD s[AT_ONCE] = {};
#pragma unroll
    for (int g = 0; g < G; g++) {
      MmaA first = operand(shared.q[2 * g][lane]), second = operand(shared.q[2 * g + 1][lane]);
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++) {
        uint4 four = requested.k[t][g];
        mma_m16n8k16(s[t], first, {{four.x, four.y}});
        mma_m16n8k16(s[t], second, {{four.z, four.w}});
      }
    }
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++)
      *reinterpret_cast<float2*>(&shared.scores[t][r][warp * 8 + 2 * c]) = make_float2(s[t].x[0], s[t].x[1]);
    if (next <= at) request_k(requested, cache, places, next, oldest);
    __syncthreads();

    // Weights: a warp has a row, half of its lanes each tile. A lane has what it gives to a product: of 16 positions, 2c,
    // 2c + 1, 2c + 8 and 2c + 9.
    {
      int t = lane / 16, kk = lane / 4 % 4, first = kk * 16 + 2 * c, position = start + t * TILE + first;
      float2 low = *reinterpret_cast<const float2*>(&shared.scores[t][warp][first]);
      float2 high = *reinterpret_cast<const float2*>(&shared.scores[t][warp][first + 8]);
      uint32_t exponents[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        exponents[i] = *reinterpret_cast<const uint32_t*>(&shared.exponents[t][2 * (first + 8 * i)]);
      float p[4] = {low.x, low.y, high.x, high.y}, scaled[4];
      float factor = shared.factors[warp], m = minus_infinity(), top = 0.0f, l = 0.0f;
      auto cache_scale = [&](int i, int of_v) {
        return __uint_as_float((exponents[i / 2] >> (i % 2 * 16 + of_v * 8) & 255) << 23);
      };
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int of_i = position + i / 2 * 8 + i % 2;
        p[i] = of_i > at || of_i < oldest ? minus_infinity() : __fmul_rn(__fmul_rn(p[i], factor), cache_scale(i, 0));
        m = fmaxf(m, p[i]);
      }
      m = largest_of_sixteen(m);
      float base = m == minus_infinity() ? 0.0f : m;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        p[i] = exp2f(p[i] - base);
        scaled[i] = __fmul_rn(p[i], cache_scale(i, 1));
        top = fmaxf(top, scaled[i]);
      }
      uint32_t field = __float_as_uint(largest_of_sixteen(top)) >> 23;
      field = min(max(field, 15u), 254u);
      float up = __uint_as_float((268u - field) << 23), down = __uint_as_float((field - 14u) << 23);
      *reinterpret_cast<uint4*>(&shared.p[t][kk][warp * 4 + c]) =
          make_uint4(f32_to_f16x2(__fmul_rn(scaled[0], up), __fmul_rn(scaled[1], up)), 0,
                     f32_to_f16x2(__fmul_rn(scaled[2], up), __fmul_rn(scaled[3], up)), 0);
      // l: 16 numbers ascending, handed on by the four lanes that have them.
#pragma unroll
      for (int i = 0; i < 4; i++) l = __shfl_sync(ALL_LANES, l + p[0] + p[1] + p[2] + p[3], t * 16 + i * 4 + c);
      l = sum_of_four(l);
      if (lane % 16 == 0) shared.of_rows[t][warp] = make_float4(m, l, down, 0.0f);
    }
    __syncthreads();

    // Sums: a warp has 16 columns; sums[t][j][i], as o[j][i], is of column d + 2 · i + j.
    float sums[AT_ONCE][2][2];
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
      MmaD of_columns[2] = {};
#pragma unroll
      for (int kk = 0; kk < 4; kk++) {
        MmaA p = operand(shared.p[t][kk][lane]);
        const uint32_t* v = &requested.v[t][kk * 4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          unsigned selector = j ? 0x7632 : 0x5410;
          mma_m16n8k16(of_columns[j], p, {{__byte_perm(v[0], v[1], selector), __byte_perm(v[2], v[3], selector)}});
        }
      }
      float down = shared.of_rows[t][r].z;
#pragma unroll
      for (int i = 0; i < 4; i++) sums[t][i / 2][i % 2] = __fmul_rn(of_columns[i / 2].x[i % 2], down);
      if (next <= at) request_v(requested, cache, places, next, oldest, t);
    }
    // The tiles of a pair stay apart if the row sees other pairs.
    int unit = shared.unit;  // read anew, as other numbers here, because there are no registers to keep it
    bool is_alone = shared.n_units == 1, is_apart = unit == PAIR && !is_alone;
    int d = warp * 16 + c * 4;
    long long row = shared.row + r, at_entry = row * n_entries + (unit == PAIR ? start / TILE : start / SPLIT) - shared.first;
    auto write = [&](long long at_entry, const float (&o)[2][2], float m, float l) {
      float* entry = partial + at_entry * (head_dim + 2);
      *reinterpret_cast<float2*>(entry + d) = make_float2(o[0][0], o[1][0]);
      *reinterpret_cast<float2*>(entry + d + 2) = make_float2(o[0][1], o[1][1]);
      if (d == 0) *reinterpret_cast<float2*>(entry + head_dim) = make_float2(m, l);
    };
    bool exists = r < shared.n_rows && d < head_dim;
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
      float4 of_row = shared.of_rows[t][r];
      if (is_apart) {
        if (pass && exists) write(at_entry + t, sums[t], of_row.x, of_row.y);
        continue;
      }
      float keep, add;
      fold(m_all, l_all, of_row.x, of_row.y, keep, add);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = folded(o[i / 2][i % 2], sums[t][i / 2][i % 2], keep, add);
        o[i / 2][i % 2] = add == NOTHING ? o[i / 2][i % 2] : sum;
      }
    }
    if (!is_apart && (!pass || next % unit == 0 || next > at)) {  // the end of the unit
#pragma unroll
      for (int i = 0; i < 4; i++) o[i / 2][i % 2] = __fadd_rn(o[i / 2][i % 2], 0.0f);  // as folding into nothing does
      if (exists && is_alone) {
        float by = finish(m_all, l_all, sinks ? shared.sinks : nullptr, r);
        if (pass) {
          float4 four = make_float4(__fmul_rn(o[0][0], by), __fmul_rn(o[1][0], by), __fmul_rn(o[0][1], by),
                                    __fmul_rn(o[1][1], by));
          *reinterpret_cast<float4*>(y + row * head_dim + d) = four;
          if (stats) put_stats_of_four(stats + (row * head_dim + d) / GROUP * 2, four);
        }
      } else if (exists && pass) {
        write(at_entry, o, m_all, l_all);
      }
      m_all = minus_infinity(), l_all = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++) o[i / 2][i % 2] = 0.0f;
    }
    if (pass && next > at) break;
    start = next, next += PAIR;
    if (next % unit == 0) next += (n_blocks - 1) * unit;
    request_places(places, cache, head, next, oldest);
  }
  int n_seen = shared.n_units;
  if (n_seen == 1) return;
  bool of_tiles = shared.unit == PAIR;

  // The block that is last of those with the same rows folds all their entries.
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = arrived + blockIdx.x * gridDim.y + blockIdx.y;
    shared.is_last = arrive(counter) == min(n_seen, n_blocks) - 1;
    if (shared.is_last) *counter = 0;
  }
  __syncthreads();
  if (!shared.is_last || warp >= shared.n_rows) return;
  long long own = shared.row + warp;
  fold_entries<G>(partial + own * n_entries * (head_dim + 2), sinks ? shared.sinks : nullptr, y + own * head_dim,
                  stats ? stats + own * (head_dim / GROUP * 2) : nullptr, warp, head_dim,
                  of_tiles ? n_seen * AT_ONCE : n_seen, of_tiles ? shared.first % WARPS : WHOLE_SPLITS);
}

#define ATTENTION_STEP(name, G)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      name(Projections qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin, NewRows k,   \
           NewRows v, const int* tables, const int* positions, const float* sinks, float* partial, int* arrived,       \
           float* y, float* stats, int q_stride, int k_stride, int v_stride, int group, int n_head_kv, int head_dim,   \
           int half,                                                                                                   \
           int neox, int block_size, int window, int table_stride, int n_entries, int most_pairs, float eps,           \
           float q_factor, float scale) {                                                                              \
    attention_step<G>(qkv, q_norm, k_norm, cos, sin, k, v, tables, positions, sinks, partial, arrived, y, stats, q_stride,    \
                      k_stride, v_stride, group, n_head_kv, head_dim, half, neox, block_size, window, table_stride,   \
                      n_entries, most_pairs, eps, q_factor, scale);                                                    \
  }
ATTENTION_STEP(attention_step_32, 1)
ATTENTION_STEP(attention_step_64, 2)
ATTENTION_STEP(attention_step_96, 3)
ATTENTION_STEP(attention_step_128, 4)
