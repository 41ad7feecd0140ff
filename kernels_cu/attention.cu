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
// Dynamic shared memory: see Shared. Reads the visible part of K and V once for every 16 rows. attention_step.cu has a kernel for one
// new token of each sequence.
#include "arguments.cuh"
#include "attention.cuh"

constexpr int ROWS = 16;

__device__ __forceinline__ Cache cache_of(const CachedRows& k, const CachedRows& v, const int* table, int block_size,
                                          int n_head_kv, int head_dim) {
  return Cache{k.values, v.values, k.exponents, v.exponents, table, block_size, n_head_kv, head_dim, 0};
}

__device__ __forceinline__ float largest_of_sixteen(float x) {
  x = largest_of_four(x);
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 4));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 8));
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
