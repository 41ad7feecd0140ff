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
// BINS + 1) u64: work space.
//
//   scan_f32   for each part of a row: its best candidate, first NaN, first +infinity; applies penalties; clears the bins
//   weigh_f32  counts and weights of candidates by bin; a bin has an interval of values, and bins are in rank order
//   draw_f32   finds the bin in which a running sum reaches its target, and ranks the candidates in it; then advances ids,
//              positions, index and history of the row. A bin with too many candidates is searched digit by digit of the
//              values' bits (sampling.cuh)
//
// Candidates are ranked by value, largest first, then by id. The result is always the first candidate at which a running
// sum reaches a target. All sums are of integers, so their order does not matter. Grid of scan and weigh: x n_parts, y
// rows; block: any; of draw: x rows; block: a divisor of BINS, whole warps. Reads a row of logits three to five times. All
// may be launched to overlap with the previous kernel.
#include "sampling.cuh"

constexpr int BINS = 2048, MOST_LISTED = 512;
constexpr float BINS_EACH = 64.0f;  // bins per temperature; the last bin has all values 32 temperatures below the best

struct Row {
  const float* logits;
  const double* values;  // null: use the logits
  double temperature, top;
  float top_near, per_bin;
  __device__ __forceinline__ double value(int i) const { return values ? values[i] : static_cast<double>(logits[i]); }
  // Lower values never have a lower bin, because every rounding keeps their order. Equal values have the same bin.
  __device__ __forceinline__ int bin(int i) const {
    float near = values ? static_cast<float>(values[i]) : logits[i], d = (top_near - near) * per_bin;
    return d < BINS - 1 ? static_cast<int>(d) : BINS - 1;
  }
  __device__ __forceinline__ u64 weight(int i) const {
    double x = value(i);
    return x - top < -29.0 * temperature ? 0 : weight_of(x, top, temperature);  // e^-29 is less than half of 2^-40
  }
};

struct Best {
  u64 key;
  int id, nan, infinity;  // n_vocab means none
};

// The best of all threads' values. A key of ~0 means none.
__device__ __forceinline__ void best_of_block(Best& best, u64 key, int id, int nan, int infinity, int none) {
  if (threadIdx.x == 0) best.key = ~0ull, best.id = best.nan = best.infinity = none;
  __syncthreads();
  atomicMin(&best.key, key);
  if (nan < none) atomicMin(&best.nan, nan);
  if (infinity < none) atomicMin(&best.infinity, infinity);
  __syncthreads();
  if (key == best.key) atomicMin(&best.id, id);
  __syncthreads();
}
// The best of all parts of a row.
__device__ __forceinline__ void best_of_row(Best& best, const u64* keys, const int* marks, int n_parts, int n_vocab) {
  u64 key = ~0ull;
  int id = n_vocab, nan = n_vocab, infinity = n_vocab;
  for (int part = threadIdx.x; part < n_parts; part += blockDim.x) {
    const int* mark = marks + 3 * part;
    if (keys[part] < key) key = keys[part], id = mark[0];  // in ascending order, so the first of equal keys is kept
    nan = min(nan, mark[1]), infinity = min(infinity, mark[2]);
  }
  best_of_block(best, key, id, nan, infinity, n_vocab);
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
             double* values, unsigned long long* keys, int* marks, unsigned* counts, unsigned long long* masses, int n_vocab,
             int longest) {
  __shared__ Best best;
  let_next_begin();
  wait_for_previous();
  long long row = blockIdx.y;
  if (positions[row] < 0) return;
  int n_parts = gridDim.x, size = (n_vocab + n_parts - 1) / n_parts;
  int first = min(n_vocab, static_cast<int>(blockIdx.x) * size), end = min(n_vocab, first + size);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i <= BINS; i += n_parts * blockDim.x) {
    if (i < BINS) counts[row * BINS + i] = 0;
    masses[row * (BINS + 1) + i] = 0;
  }
  const float* x = logits + row * n_vocab;
  double penalty = reals[row * 4 + 3];
  values += row * n_vocab;
  if (penalty != 1.0) {
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) values[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < whole[row * 4 + 3]; i += blockDim.x) {
      int id = history[row * longest + i];
      if (first <= id && id < end) values[id] = penalised(x[id], penalty);  // the same for each time that the id occurs
    }
    __syncthreads();
  }
  u64 key = ~0ull;
  int id = n_vocab, nan = n_vocab, infinity = n_vocab;
  for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
    if (x[i] != x[i]) {
      nan = min(nan, i);
      continue;
    }
    if (x[i] == __uint_as_float(0x7f800000u)) infinity = min(infinity, i);
    u64 bits = rank_bits(penalty != 1.0 ? values[i] : static_cast<double>(x[i]));
    if (bits < key) key = bits, id = i;
  }
  best_of_block(best, key, id, nan, infinity, n_vocab);
  if (threadIdx.x) return;
  keys[row * n_parts + blockIdx.x] = best.key;
  int* mark = marks + (row * n_parts + blockIdx.x) * 3;
  mark[0] = best.id, mark[1] = best.nan, mark[2] = best.infinity;
}

extern "C" __global__ void __launch_bounds__(256)
    weigh_f32(const float* logits, const double* reals, const int* positions, const double* values,
              const unsigned long long* keys, const int* marks, unsigned* counts, unsigned long long* masses, int n_vocab) {
  __shared__ Best best;
  __shared__ u64 mass_of[BINS + 1];  // the last one: the mass of the candidates that min_p keeps
  __shared__ unsigned count_of[BINS];
  let_next_begin();
  wait_for_previous();
  long long at = blockIdx.y;
  reals += at * 4;
  if (positions[at] < 0 || reals[0] == 0.0) return;
  int n_parts = gridDim.x, size = (n_vocab + n_parts - 1) / n_parts;
  best_of_row(best, keys + at * n_parts, marks + at * n_parts * 3, n_parts, n_vocab);
  if (unusable(best, n_vocab)) return;
  for (int i = threadIdx.x; i <= BINS; i += blockDim.x) {
    mass_of[i] = 0;
    if (i < BINS) count_of[i] = 0;
  }
  __syncthreads();
  Row row = row_of(logits + at * n_vocab, values + at * n_vocab, reals, best.id);
  double least = ceil(reals[2] * ONE);
  int first = min(n_vocab, static_cast<int>(blockIdx.x) * size), end = min(n_vocab, first + size);
  for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
    int bin = row.bin(i);
    atomicAdd(&count_of[bin], 1u);
    u64 weight = row.weight(i);
    if (weight) atomicAdd(&mass_of[bin], weight);
    if (weight && static_cast<double>(weight) >= least && least > 0.0) atomicAdd(&mass_of[BINS], weight);
  }
  __syncthreads();
  for (int i = threadIdx.x; i <= BINS; i += blockDim.x) {
    if (mass_of[i]) atomicAdd(&masses[at * (BINS + 1) + i], mass_of[i]);
    if (i < BINS && count_of[i]) atomicAdd(&counts[at * BINS + i], count_of[i]);
  }
}

struct Drawing {
  Best best;
  u64 sums[MOST_THREADS], of_warps[32];
  int bin, n_listed, id;
  u64 before, mass_before, mass;
  u64 key[MOST_LISTED], weight[MOST_LISTED];
  int listed[MOST_LISTED];
  Workspace row;
};

// The bin in which the running sum of `amounts` reaches target; before: the sums of `amounts` and `other` before that bin.
template <class Amount, class Other>
__device__ void find_bin(Drawing& space, const Amount* amounts, const Other* other, u64 target) {
  int each = BINS / blockDim.x, first = threadIdx.x * each, warp = threadIdx.x / 32;
  u64 own = 0, of_other = 0;
  for (int i = first; i < first + each; i++) own += amounts[i];
  space.sums[threadIdx.x] = own;
  if (threadIdx.x == 0) space.mass_before = 0;
  __syncthreads();
  u64 before = 0;
  for (int t = warp * 32; t < static_cast<int>(threadIdx.x); t++) before += space.sums[t];
  if (threadIdx.x % 32 == 31) space.of_warps[warp] = before + own;
  __syncthreads();
  for (int w = 0; w < warp; w++) before += space.of_warps[w];
  if (before < target && before + own >= target) {
    int i = first;
    for (; before + amounts[i] < target; i++) before += amounts[i];
    space.bin = i, space.before = before;
  }
  __syncthreads();
  for (int i = first; i < min(first + each, space.bin); i++) of_other += other[i];
  if (of_other) atomicAdd(&space.mass_before, of_other);
  __syncthreads();
}

// The first candidate in rank order at which the running sum of weights (COUNT: of ones) reaches target ≥ 1: its id, and
// the sum of weights up to it.
template <bool COUNT>
__device__ Found reaching(Drawing& space, const Row& row, const unsigned* counts, const u64* masses, int n, u64 target) {
  __syncthreads();  // until all threads have read the results of the previous search
  if (COUNT)
    find_bin(space, counts, masses, target);
  else
    find_bin(space, masses, masses, target);
  int bin = space.bin;
  u64 left = target - space.before, mass_before = space.mass_before;
  if (masses[bin] == 0) return Found{0, mass_before, -1};  // COUNT: the remaining candidates have no weight
  if (threadIdx.x == 0) space.n_listed = 0;
  __syncthreads();
  if (counts[bin] > MOST_LISTED) {
    auto value = [&](int i) { return row.value(i); };
    auto mass = [&](int i) -> u64 { return row.bin(i) != bin ? 0 : COUNT ? 1 : row.weight(i); };
    Found found = first_reaching(space.row, value, mass, n, left);
    if (COUNT) {
      u64 sum = 0;
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        u64 key = rank_bits(row.value(i));
        if (row.bin(i) == bin && (key < found.key || (key == found.key && i <= found.id))) sum += row.weight(i);
      }
      found.mass = total_of(space.row, sum);
    }
    return Found{found.key, mass_before + found.mass, found.id};
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    if (row.bin(i) == bin) {
      int place = atomicAdd(&space.n_listed, 1);
      space.key[place] = rank_bits(row.value(i)), space.weight[place] = row.weight(i), space.listed[place] = i;
    }
  __syncthreads();
  for (int j = threadIdx.x; j < space.n_listed; j += blockDim.x) {
    u64 key = space.key[j], ranked = 0, mass = 0, own = COUNT ? 1 : space.weight[j];
    int id = space.listed[j];
    for (int other = 0; other < space.n_listed; other++)
      if (space.key[other] < key || (space.key[other] == key && space.listed[other] <= id))
        ranked++, mass += space.weight[other];
    u64 reached = COUNT ? ranked : mass;
    if (reached >= left && reached - own < left) space.id = id, space.mass = mass;
  }
  __syncthreads();
  Found found{0, mass_before + space.mass, space.id};
  __syncthreads();
  return found;
}

__device__ __forceinline__ int drawn_token(Drawing& space, const Row& row, const unsigned* counts, const u64* masses,
                                           const double* reals, const long long* whole, int n_vocab) {
  u64 top_k = static_cast<u64>(whole[0]), all = 0;
  if (top_k && top_k < static_cast<u64>(n_vocab)) {
    all = reaching<true>(space, row, counts, masses, n_vocab, top_k).mass;
  } else {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) all += masses[i];
    all = total_of(space.row, all);
  }
  u64 kept = all;
  double top_p = reals[1];
  if (top_p < 1.0) {
    u64 target = static_cast<u64>(ceil(top_p * static_cast<double>(all)));
    kept = reaching<false>(space, row, counts, masses, n_vocab, target ? target : 1).mass;
  }
  // Heavier candidates rank first, so min_p and top_k each keep a prefix of the same ranking.
  if (ceil(reals[2] * ONE) > 0.0 && masses[BINS] < kept) kept = masses[BINS];
  u64 drawn = __umul64hi(random_bits(static_cast<u64>(whole[1]), static_cast<u64>(whole[2])), kept) + 1;
  return static_cast<int>(reaching<false>(space, row, counts, masses, n_vocab, drawn).id);
}

extern "C" __global__ void __launch_bounds__(1024)
    draw_f32(const float* logits, const double* reals, const double* values, const unsigned long long* keys,
             const int* marks, const unsigned* counts, const unsigned long long* masses, int* out, int* ids, int* positions,
             long long* whole, int* history, int n_vocab, int n_parts, int longest) {
  __shared__ Drawing space;
  let_next_begin();
  wait_for_previous();
  long long at = blockIdx.x;
  if (positions[at] < 0) return;
  reals += at * 4, whole += at * 4, out += at * 3;
  best_of_row(space.best, keys + at * n_parts, marks + at * n_parts * 3, n_parts, n_vocab);
  Best best = space.best;
  int token = best.id, problem = 0, where = 0;
  if (unusable(best, n_vocab)) {
    token = -1;
    problem = best.nan < n_vocab ? 1 : best.infinity < n_vocab ? 2 : 3;
    where = problem == 1 ? best.nan : problem == 2 ? best.infinity : n_vocab;
  } else if (reals[0] != 0.0) {
    Row row = row_of(logits + at * n_vocab, values + at * n_vocab, reals, best.id);
    token = drawn_token(space, row, counts + at * BINS, masses + at * (BINS + 1), reals, whole, n_vocab);
  }
  __syncthreads();
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
