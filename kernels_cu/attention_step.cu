// Attention of one new token for each of n_rows sequences, with all state on the device, in one launch.
//
// RMS norm of the heads of Q and K (if q_norm and k_norm are given), the rotation (if cos is given), Q times q_factor (if it
// is not 1), K and V to the cache, attention. The same bits as rms_norm_f32, rope_*_f32, kv_append_f16 and attention_rows_*
// one after another. The same launch is right for every length.
//
// Rows of Q, K and V begin at qkv; their distances are q_stride, k_stride and v_stride floats. q_norm, k_norm (head_dim,) or null.
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

#include "arguments.cuh"
#include "norm.cuh"
#include "attention.cuh"

// What a launch has: the bits of Plan::has, which say which arguments are not null, or not 1.
constexpr int HAS_Q_NORM = 1, HAS_K_NORM = 2, HAS_ROTATION = 4, HAS_SINKS = 8, HAS_FACTOR = 16;

// A launch, as Plan in cuda/kernels/attention_step.py, which has the same order. width: groups of 32 columns of a head. group: query
// heads of a KV head. half: columns of cos and sin. The others: see above. What depends on the size of the cache is not among them,
// so that a kernel for one plan is right for caches of all sizes.
struct Plan {
  int width;
  int has;
  int q_stride;
  int k_stride;
  int v_stride;
  int group;
  int n_head_kv;
  int head_dim;
  int half;
  int neox;
  int block_size;
  int window;
};

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
__device__ __forceinline__ void attention_step(const Plan& plan, const Projections& qkv, const float* q_norm, const float* k_norm,
                                               const float* cos, const float* sin, const NewRows& k_cache,
                                               const NewRows& v_cache, const int* tables, const int* positions,
                                               const float* sinks, float* partial, int* arrived, float* y, int table_stride,
                                               int n_entries, int most_quads, float eps, float q_factor, float scale) {
  DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<StepShared<G>*>(memory);
  let_next_begin();
  int group = plan.group, head_dim = plan.head_dim, n_head_kv = plan.n_head_kv, window = plan.window;
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
  int first_block = 0, of_table = warp * OWN / plan.block_size;
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
              tables,         plan.block_size, n_head_kv,         head_dim,          at};
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
               static_cast<long long>(token) * (of_q ? plan.q_stride : of_k ? plan.k_stride : plan.v_stride);
  }
  Angles<G> angles;
  long long angles_at = static_cast<long long>(at) * plan.half;
  load_angles(angles, plan.has & HAS_ROTATION ? cos + angles_at : nullptr, sin + angles_at, plan.half, plan.neox);
  float weight[G];
  const float* of_weight = warp < n_rows ? q_norm : k_norm;
  bool norms = plan.has & (warp < n_rows ? HAS_Q_NORM : HAS_K_NORM);
  load_head<G>(weight, of_weight + lane, norms ? head_dim : 0);
  bool writes_new = has_new && first_row == 0;
  Place new_place = place_of(cache, head, at, writes_new);
  if (threadIdx.x == 0) {
    shared.row = (token * n_head_kv + head) * group + first_row;
    shared.first_entry = by_splits ? first_unit : first_unit * AT_ONCE;
    shared.n_units = n_units;
    shared.table = tables;
  }
  float sink = 0.0f;
  if (plan.has & HAS_SINKS && threadIdx.x < n_rows) sink = sinks[query_head + threadIdx.x];
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
    if ((of_q && plan.has & HAS_Q_NORM) || (of_k && plan.has & HAS_K_NORM)) {
      if (job >= WARPS) load_head<G>(weight, k_norm + lane, head_dim);
      norm_head<G>(x, weight, head_dim, eps);
    }
    if (plan.has & HAS_ROTATION && (of_q || of_k)) rotate_head<G>(x, shared.heads[warp], angles, plan.half, plan.neox);
    if (of_q && plan.has & HAS_FACTOR)
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
              const float* of_sinks = plan.has & HAS_SINKS ? shared.sinks : nullptr;
              float by = is_row ? finish(shared.m[2 * c + i], l_all[i], of_sinks, 2 * c + i) : 0.0f;
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
  fold_entries<G>(partial + own_row * n_entries * (head_dim + 2), plan.has & HAS_SINKS ? shared.sinks : nullptr,
                  y + own_row * head_dim, warp, head_dim,
                  by_splits ? n_units : n_units * AT_ONCE, by_splits ? WHOLE_SPLITS : shared.first_entry % WARPS);
}

#define ATTENTION_STEP(name, G)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
      name(Projections qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin, NewRows k,   \
           NewRows v, const int* tables, const int* positions, const float* sinks, float* partial, int* arrived,       \
           float* y, Plan launch, int table_stride, int n_entries, int most_quads, float eps, float q_factor,          \
           float scale) {                                                                                              \
    PLAN_OF(launch);                                                                                                   \
    if (IS_PLANNED && plan.width != G) return;                                                                         \
    attention_step<G>(plan, qkv, q_norm, k_norm, cos, sin, k, v, tables, positions, sinks, partial, arrived, y,        \
                      table_stride, n_entries, most_quads, eps, q_factor, scale);                                      \
  }
ATTENTION_STEP(attention_step_32, 1)
ATTENTION_STEP(attention_step_64, 2)
ATTENTION_STEP(attention_step_96, 3)
ATTENTION_STEP(attention_step_128, 4)
