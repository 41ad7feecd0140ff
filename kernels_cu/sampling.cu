// Samples tokens from rows of logits, with many blocks per row. The rows' state is on the device and advances by a token.
//
// Array code: refengine.engine.sampling.draw, with the same numbers: penalty, integer weights round(2^40 · e^((x - max) /
// temperature)), top-k, top-p, min-p, draw from 64 bits of Philox.
//
// logits (n_rows, n_vocab) float32. reals (n_rows, 4): temperature, top_p, min_p, repetition penalty. whole (n_rows, 4):
// top_k, seed, index of the token, number of ids in its history; history (n_rows, longest) int32. out (n_rows, 3): token;
// 0 or the problem (1 NaN, 2 +infinity, 3 all -infinity); its index. ids, positions (n_rows,) int32: for rows with a
// position below zero nothing is read or written. values (n_rows, n_vocab) float64: the penalised logits of rows with a
// penalty. keys (n_rows, n_parts) u64, marks (n_rows, n_parts, 3) int32, counts (n_rows, BINS) u32, masses (n_rows,
// BINS + 1) u64, listed (n_rows, MOST_LISTED, 3) u64, numbers (n_rows, 2) int32: work space.
//
//   scan_f32   for each part of a row: its best candidate, first NaN, first +infinity; applies penalties; clears the bins
//   weigh_f32  counts and weights of candidates by bin; a bin has an interval of values, and bins are in rank order
//   draw_f32   finds the bins in which running sums can reach their targets, and lists the candidates in them. A row's last
//              block to arrive ranks those of each bin where a sum does reach its target; then it advances ids, positions,
//              index and history of the row. If there are too many to list, it searches digit by digit of the values' bits
//              (sampling.cuh)
//
// Candidates are ranked by value, largest first, then by id. The result is always the first candidate at which a running
// sum reaches a target. All sums are of integers, so their order does not matter. Grid: x n_parts, of at most MOST_OF_PART
// candidates, y rows; block: whole warps (draw: a divisor of BINS). Reads a row of logits three times. All may be launched
// to overlap with the previous kernel.
#include "sampling.cuh"

constexpr int BINS = 2048, MOST_LISTED = 896, MOST_OF_PART = 4095;
constexpr float BINS_EACH = 64.0f;  // bins per temperature; the last bin has all values 32 temperatures below the best

struct Row {
  const float* logits;
  const double* values;  // null: use the logits
  double temperature, top;
  float top_near, per_bin;
  __device__ __forceinline__ double value(int i) const { return values ? values[i] : static_cast<double>(logits[i]); }
  // Lower values never have a lower bin, because every rounding keeps their order. Equal values have the same bin.
  __device__ __forceinline__ int bin(double x) const {
    float d = (top_near - static_cast<float>(x)) * per_bin;
    return d < BINS - 1 ? static_cast<int>(d) : BINS - 1;
  }
  __device__ __forceinline__ u64 weight(double x) const {
    return x - top < -29.0 * temperature ? 0 : weight_of(x, top, temperature);  // e^-29 is less than half of 2^-40
  }
};

// Calls take(i, value) for each candidate of a block's part of a row. AHEAD loads of a thread are in flight together.
template <int AHEAD, class Load, class Take>
__device__ __forceinline__ void for_part(int n_vocab, const Load& load, const Take& take) {
  int size = (n_vocab + gridDim.x - 1) / gridDim.x, threads = blockDim.x;
  int first = min(n_vocab, static_cast<int>(blockIdx.x) * size), end = min(n_vocab, first + size);
#pragma unroll 1
  for (int start = first + threadIdx.x; start < end; start += AHEAD * threads) {
    decltype(load(0)) values[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) values[i] = load(min(start + i * threads, end - 1));
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (start + i * threads < end) take(start + i * threads, values[i]);
  }
}

struct Best {
  u64 key;
  int id, nan, infinity;  // n_vocab means none
};

// The best of a warp's candidates, in every lane. A key of ~0 means none.
__device__ __forceinline__ Best best_of_warp(const Best& own, int none) {
  unsigned upper = static_cast<unsigned>(own.key >> 32), lower = static_cast<unsigned>(own.key);
  unsigned least = __reduce_min_sync(ALL_LANES, upper);
  unsigned below = __reduce_min_sync(ALL_LANES, upper == least ? lower : ~0u);
  bool first = upper == least && lower == below;
  return {static_cast<u64>(least) << 32 | below, __reduce_min_sync(ALL_LANES, first ? own.id : none),
          __reduce_min_sync(ALL_LANES, own.nan), __reduce_min_sync(ALL_LANES, own.infinity)};
}
// The best of a block's candidates, in every thread. of_warps (32,): shared memory.
__device__ __forceinline__ Best best_of_block(const Best& own, Best* of_warps, int none) {
  int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  Best best = best_of_warp(own, none);
  if (lane == 0) of_warps[threadIdx.x / 32] = best;
  __syncthreads();
  return best_of_warp(lane < n_warps ? of_warps[lane] : Best{~0ull, none, none, none}, none);
}
// A thread's share of the parts' results.
__device__ __forceinline__ Best best_of_parts(const u64* keys, const int* marks, int n_parts, int none) {
  Best best{~0ull, none, none, none};
  for (int part = threadIdx.x; part < n_parts; part += blockDim.x) {
    const int* mark = marks + 3 * part;
    if (keys[part] < best.key) best.key = keys[part], best.id = mark[0];  // ascending: the first of equal keys is kept
    best.nan = min(best.nan, mark[1]), best.infinity = min(best.infinity, mark[2]);
  }
  return best;
}
__device__ __forceinline__ bool unusable(const Best& best, int n_vocab) {
  return best.nan < n_vocab || best.infinity < n_vocab || best.key == rank_bits(__uint_as_float(0xff800000u));
}
__device__ __forceinline__ Row row_of(const float* logits, const double* values, const double* reals, int id) {
  Row row{logits, reals[3] == 1.0 ? nullptr : values, reals[0], 0.0, 0.0f, 0.0f};
  row.top = row.value(id);
  row.top_near = static_cast<float>(row.top);
  row.per_bin = static_cast<float>(fmin(BINS_EACH / row.temperature, 1e30));
  return row;
}

extern "C" __global__ void __launch_bounds__(256)
    scan_f32(const float* logits, const double* reals, const long long* whole, const int* history, const int* positions,
             double* values, unsigned long long* keys, int* marks, unsigned* counts, unsigned long long* masses,
             int* numbers, int n_vocab, int longest) {
  __shared__ Best of_warps[32];
  let_next_begin();
  wait_for_previous();
  long long row = blockIdx.y;
  if (positions[row] < 0) return;
  int n_parts = gridDim.x, size = (n_vocab + n_parts - 1) / n_parts, threads = blockDim.x;
  for (int i = blockIdx.x * threads + threadIdx.x; i <= BINS; i += n_parts * threads) {
    if (i < BINS) counts[row * BINS + i] = 0;
    masses[row * (BINS + 1) + i] = 0;
    if (i < 2) numbers[row * 2 + i] = 0;
  }
  const float* x = logits + row * n_vocab;
  double penalty = reals[row * 4 + 3];
  constexpr int AHEAD = 8;
  auto logit = [&](int i) { return x[i]; };
  values += row * n_vocab;
  if (penalty != 1.0) {
    const int* ids = history + row * longest;
    int first = min(n_vocab, static_cast<int>(blockIdx.x) * size), end = min(n_vocab, first + size);
    for_part<AHEAD>(n_vocab, logit, [&](int i, float value) { values[i] = value; });
    __syncthreads();
    int n_history = static_cast<int>(whole[row * 4 + 3]);
#pragma unroll 1
    for (int start = threadIdx.x; start < n_history; start += AHEAD * threads) {
      int some[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) some[i] = ids[min(start + i * threads, n_history - 1)];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)  // the same for each time that an id occurs
        if (first <= some[i] && some[i] < end) values[some[i]] = penalised(x[some[i]], penalty);
    }
    __syncthreads();
  }
  Best best{~0ull, n_vocab, n_vocab, n_vocab};
  for_part<AHEAD>(n_vocab, logit, [&](int i, float value) {
    if (value != value) {
      best.nan = min(best.nan, i);
      return;
    }
    if (value == __uint_as_float(0x7f800000u)) best.infinity = min(best.infinity, i);
    u64 bits = rank_bits(penalty != 1.0 ? values[i] : static_cast<double>(value));
    if (bits < best.key) best.key = bits, best.id = i;
  });
  best = best_of_block(best, of_warps, n_vocab);
  if (threadIdx.x) return;
  keys[row * n_parts + blockIdx.x] = best.key;
  int* mark = marks + (row * n_parts + blockIdx.x) * 3;
  mark[0] = best.id, mark[1] = best.nan, mark[2] = best.infinity;
}

extern "C" __global__ void __launch_bounds__(1024)
    weigh_f32(const float* logits, const double* reals, const int* positions, const double* values,
              const unsigned long long* keys, const int* marks, unsigned* counts, unsigned long long* masses, int n_vocab) {
  constexpr int LOW = 20;  // bits of a weight that are added apart: sums of MOST_OF_PART parts fit into 32 bits
  __shared__ Best of_warps[32];
  __shared__ unsigned low_of[BINS + 1], high_of[BINS + 1];  // the last one: the mass of the candidates that min_p keeps
  __shared__ unsigned count_of[BINS];
  let_next_begin();
  for (int i = threadIdx.x; i <= BINS; i += blockDim.x) {
    low_of[i] = high_of[i] = 0;
    if (i < BINS) count_of[i] = 0;
  }
  wait_for_previous();
  long long at = blockIdx.y;
  reals += at * 4;
  if (positions[at] < 0 || reals[0] == 0.0) return;
  int n_parts = gridDim.x;
  Best own = best_of_parts(keys + at * n_parts, marks + at * n_parts * 3, n_parts, n_vocab);
  Best best = best_of_block(own, of_warps, n_vocab);
  if (unusable(best, n_vocab)) return;
  Row row = row_of(logits + at * n_vocab, values + at * n_vocab, reals, best.id);
  double least = ceil(reals[2] * ONE);
  auto add = [&](int i, u64 weight) {
    atomicAdd(&low_of[i], static_cast<unsigned>(weight & ((1u << LOW) - 1)));
    atomicAdd(&high_of[i], static_cast<unsigned>(weight >> LOW));
  };
  for_part<2>(n_vocab, [&](int i) { return row.value(i); }, [&](int, double x) {
    int bin = row.bin(x);
    atomicAdd(&count_of[bin], 1u);
    u64 weight = row.weight(x);
    if (weight) add(bin, weight);
    if (weight && static_cast<double>(weight) >= least && least > 0.0) add(BINS, weight);
  });
  __syncthreads();
  for (int i = threadIdx.x; i <= BINS; i += blockDim.x) {
    u64 mass = low_of[i] + (static_cast<u64>(high_of[i]) << LOW);
    if (mass) atomicAdd(&masses[at * (BINS + 1) + i], mass);
    if (i < BINS && count_of[i]) atomicAdd(&counts[at * BINS + i], count_of[i]);
  }
}

// The candidates in the bins where a sum can reach a target.
struct List {
  u64 key[MOST_LISTED], weight[MOST_LISTED];
  int id[MOST_LISTED], bin[MOST_LISTED];
};

struct Drawing {
  Best of_warps[32];
  u64 mass_before[BINS + 1];  // the mass of all bins before each; the last one: of all bins
  unsigned count_before[BINS + 1];
  u64 masses[32], mass;  // of warps; of the candidates up to the one that was found
  unsigned counts[32];
  int arrived, n_listed, id;
  union {
    List list;
    Workspace row;  // if there are too many candidates to list
  };
};

// Replaces the masses and counts of bins by the sums over those before.
__device__ __forceinline__ void add_up(Drawing& space) {
  int each = BINS / blockDim.x, first = threadIdx.x * each, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 mass = 0, own_mass;
  unsigned count = 0, own_count;
  for (int i = first; i < first + each; i++) mass += space.mass_before[i], count += space.count_before[i];
  own_mass = mass, own_count = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    u64 other = __shfl_up_sync(ALL_LANES, mass, offset);
    unsigned others = __shfl_up_sync(ALL_LANES, count, offset);
    if (lane >= offset) mass += other, count += others;
  }
  if (lane == 31) space.masses[warp] = mass, space.counts[warp] = count;
  __syncthreads();
  mass -= own_mass, count -= own_count;
  for (int w = 0; w < warp; w++) mass += space.masses[w], count += space.counts[w];
  for (int i = first; i < first + each; i++) {
    u64 of_bin = space.mass_before[i];
    unsigned in_bin = space.count_before[i];
    space.mass_before[i] = mass, space.count_before[i] = count;
    mass += of_bin, count += in_bin;
  }
  if (first + each == BINS) space.mass_before[BINS] = mass, space.count_before[BINS] = count;
  __syncthreads();
}

// The bin in which a running sum reaches target ≥ 1: the last one that begins below it. For a whole warp.
template <class Sum>
__device__ __forceinline__ int bin_at(const Sum* before, u64 target) {
  constexpr int STRIDE = BINS / 32;
  static_assert(STRIDE == 64, "two bins a lane");
  int lane = threadIdx.x % 32;
  int first = STRIDE * (__popc(__ballot_sync(ALL_LANES, before[STRIDE * lane] < target)) - 1);
  int n = __popc(__ballot_sync(ALL_LANES, before[first + lane] < target));
  return first + n + __popc(__ballot_sync(ALL_LANES, before[first + 32 + lane] < target)) - 1;
}

// What a row's parameters make of masses. All functions are monotone, so that the bounds of a mass give bounds of the rest.
struct Limits {
  u64 top_k, of_min_p, bits;  // top_k: 0 if all are kept; of_min_p: ~0 if so
  double top_p;
  __device__ __forceinline__ u64 top_p_target(u64 all) const {
    u64 target = static_cast<u64>(ceil(top_p * static_cast<double>(all)));
    return target ? target : 1;
  }
  // Heavier candidates rank first, so min_p and top_k each keep a prefix of the same ranking.
  __device__ __forceinline__ u64 drawn(u64 kept) const { return __umul64hi(bits, min(kept, of_min_p)) + 1; }
};
__device__ __forceinline__ Limits limits_of(const double* reals, const long long* whole, u64 of_min_p, int n_vocab) {
  u64 top_k = static_cast<u64>(whole[0]), bits = random_bits(static_cast<u64>(whole[1]), static_cast<u64>(whole[2]));
  return {top_k < static_cast<u64>(n_vocab) ? top_k : 0, ceil(reals[2] * ONE) > 0.0 ? of_min_p : ~0ull, bits, reals[1]};
}

// The bins in which the sums for top_k, top_p and the draw reach their targets, as far as the masses of bins tell.
struct Bins {
  int first[3], last[3];  // last < first: none
  __device__ __forceinline__ bool have(int bin) const {
    return (first[0] <= bin && bin <= last[0]) || (first[1] <= bin && bin <= last[1]) || (first[2] <= bin && bin <= last[2]);
  }
};
__device__ __forceinline__ Bins bins_of(const Drawing& space, const Limits& limits) {
  Bins bins{{0, 0, 0}, {-1, -1, -1}};
  u64 least = space.mass_before[BINS], most = least;
  if (limits.top_k) {
    int bin = bins.first[0] = bins.last[0] = bin_at(space.count_before, limits.top_k);
    least = space.mass_before[bin], most = space.mass_before[bin + 1];
  }
  if (limits.top_p < 1.0) {
    bins.first[1] = bin_at(space.mass_before, limits.top_p_target(least));
    bins.last[1] = bin_at(space.mass_before, limits.top_p_target(most));
    least = space.mass_before[bins.first[1]] + 1, most = space.mass_before[bins.last[1] + 1];
  }
  bins.first[2] = bin_at(space.mass_before, limits.drawn(least));
  bins.last[2] = bin_at(space.mass_before, limits.drawn(most));
  return bins;
}

// The first candidate in rank order at which the running sum of weights (COUNT: of ones) reaches target ≥ 1: its id, and
// the sum of weights up to it.
template <bool COUNT>
__device__ Found reaching(Drawing& space, const Row& row, bool listed, int n, u64 target) {
  int bin = COUNT ? bin_at(space.count_before, target) : bin_at(space.mass_before, target);
  u64 mass_before = space.mass_before[bin], left = target - (COUNT ? space.count_before[bin] : mass_before);
  if (space.mass_before[bin + 1] == mass_before) return Found{0, mass_before, -1};  // COUNT: the rest have no weight
  if (!listed) {
    auto value = [&](int i) { return row.value(i); };
    auto mass = [&](int i) -> u64 { return row.bin(row.value(i)) != bin ? 0 : COUNT ? 1 : row.weight(row.value(i)); };
    Found found = first_reaching(space.row, value, mass, n, left);
    if (COUNT) {
      u64 sum = 0;
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        double x = row.value(i);
        u64 key = rank_bits(x);
        if (row.bin(x) == bin && (key < found.key || (key == found.key && i <= found.id))) sum += row.weight(x);
      }
      found.mass = total_of(space.row, sum);
    }
    return Found{found.key, mass_before + found.mass, found.id};
  }
  const List& list = space.list;
  for (int j = threadIdx.x; j < space.n_listed; j += blockDim.x) {
    if (list.bin[j] != bin) continue;
    u64 key = list.key[j], ranked = 0, mass = 0, own = COUNT ? 1 : list.weight[j];
    int id = list.id[j];
    for (int other = 0; other < space.n_listed; other++)
      if (list.bin[other] == bin && (list.key[other] < key || (list.key[other] == key && list.id[other] <= id)))
        ranked++, mass += list.weight[other];
    u64 reached = COUNT ? ranked : mass;
    if (reached >= left && reached - own < left) space.id = id, space.mass = mass;
  }
  __syncthreads();
  Found found{0, mass_before + space.mass, space.id};
  __syncthreads();
  return found;
}

__device__ __forceinline__ int drawn_token(Drawing& space, const Row& row, const Limits& limits, bool listed, int n_vocab) {
  u64 kept = space.mass_before[BINS];
  if (limits.top_k) kept = reaching<true>(space, row, listed, n_vocab, limits.top_k).mass;
  if (limits.top_p < 1.0) kept = reaching<false>(space, row, listed, n_vocab, limits.top_p_target(kept)).mass;
  return static_cast<int>(reaching<false>(space, row, listed, n_vocab, limits.drawn(kept)).id);
}

extern "C" __global__ void __launch_bounds__(1024)
    draw_f32(const float* logits, const double* reals, const double* values, const unsigned long long* keys,
             const int* marks, const unsigned* counts, const unsigned long long* masses, unsigned long long* listed,
             int* numbers, int* out, int* ids, int* positions, long long* whole, int* history, int n_vocab, int n_parts,
             int longest) {
  __shared__ Drawing space;
  let_next_begin();
  wait_for_previous();
  long long at = blockIdx.y;
  if (positions[at] < 0) return;
  reals += at * 4, whole += at * 4, out += at * 3, numbers += at * 2;
  counts += at * BINS, masses += at * (BINS + 1), listed += at * MOST_LISTED * 3;
  Best own = best_of_parts(keys + at * n_parts, marks + at * n_parts * 3, n_parts, n_vocab);
#pragma unroll 4
  for (int i = threadIdx.x; i < BINS; i += blockDim.x) space.mass_before[i] = masses[i], space.count_before[i] = counts[i];
  Best best = best_of_block(own, space.of_warps, n_vocab);
  int token = best.id, problem = 0, where = 0;
  if (unusable(best, n_vocab)) {
    if (blockIdx.x) return;
    token = -1;
    problem = best.nan < n_vocab ? 1 : best.infinity < n_vocab ? 2 : 3;
    where = problem == 1 ? best.nan : problem == 2 ? best.infinity : n_vocab;
  } else if (reals[0] == 0.0) {
    if (blockIdx.x) return;
  } else {
    Row row = row_of(logits + at * n_vocab, values + at * n_vocab, reals, best.id);
    Limits limits = limits_of(reals, whole, masses[BINS], n_vocab);
    add_up(space);
    Bins bins = bins_of(space, limits);
    unsigned n_needed = 0;
    for (int i = 0; i < 3; i++)
      if (bins.first[i] <= bins.last[i])
        n_needed += space.count_before[bins.last[i] + 1] - space.count_before[bins.first[i]];
    bool fits = n_needed <= MOST_LISTED;
    if (fits)
      for_part<2>(n_vocab, [&](int i) { return row.value(i); }, [&](int i, double x) {
        int bin = row.bin(x);
        if (!bins.have(bin)) return;
        u64* to = listed + 3 * atomicAdd(&numbers[0], 1);
        to[0] = rank_bits(x), to[1] = row.weight(x), to[2] = static_cast<u64>(bin) << 32 | static_cast<unsigned>(i);
      });
    __syncthreads();
    if (threadIdx.x == 0) space.arrived = arrive(&numbers[1]);
    __syncthreads();
    if (space.arrived + 1 != static_cast<int>(gridDim.x)) return;
    int n_listed = numbers[0];
    if (threadIdx.x == 0) space.n_listed = n_listed;
    for (int i = threadIdx.x; i < n_listed; i += blockDim.x) {
      const u64* from = listed + 3 * i;
      space.list.key[i] = from[0], space.list.weight[i] = from[1];
      space.list.bin[i] = static_cast<int>(from[2] >> 32), space.list.id[i] = static_cast<int>(from[2] & 0xffffffffu);
    }
    __syncthreads();
    token = drawn_token(space, row, limits, fits, n_vocab);
  }
  if (threadIdx.x) return;
  out[0] = token, out[1] = problem, out[2] = where;
  // The id that is fed next; a valid id even if nothing was drawn.
  token = max(token, 0);
  ids[at] = token;
  positions[at]++;
  whole[2]++;
  if (reals[3] == 1.0) return;
  long long n_history = whole[3];
  if (n_history < longest) history[at * longest + n_history] = token, whole[3] = n_history + 1;
}
