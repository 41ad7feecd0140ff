// One token from a row of logits, all on the device. Twin: refengine.engine.sampling.draw, step by step and number by number:
// penalty, integer weights round(2^40 · e^((x - max) / temperature)), top-k, top-p, min-p, draw from 64 bits of Philox.
//
// logits (n_rows, n_vocab) float32. reals (n_rows, 4): temperature, top_p, min_p, repetition penalty. whole (n_rows, 4):
// top_k, seed, index of the token, number of ids in its history; history (n_rows, longest) int32. values, weights
// (n_rows, n_vocab): space. out (n_rows, 3): token; 0, or what is wrong (1 NaN, 2 +infinity, 3 all -infinity); where.
// Grid: x rows; block: 1024 threads (or any number of warps).
// Every sum is one of integers, whose order does not matter; so is every choice. Candidates are ranked by value, largest
// first, then by id. What is wanted of the ranking is always the first candidate at which a running sum reaches a target:
// it is found digit by digit of the value's bits, eight bits a pass, then by counting ids. Reads a row about ten times
// for each such search; at most three.
typedef unsigned long long u64;

constexpr int DIGITS = 256, MOST_THREADS = 1024;

// Bits whose ascending order is the descending order of doubles; no NaN comes here.
__device__ __forceinline__ u64 rank_bits(double x) {
  u64 bits = static_cast<u64>(__double_as_longlong(x + 0.0));  // -0 is 0
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffull;
}

struct Found {
  u64 key, mass;  // of the candidate; of it and all before it
  long long id;
};

struct Workspace {
  u64 bins[DIGITS];
  int counts[MOST_THREADS];
  u64 key, before;
  Found found;
  u64 total;
  double top;
  int token, problem, where;
};

// The first candidate in rank order at which the running sum of weights (COUNT: of ones) reaches target ≥ 1.
template <bool COUNT>
__device__ Found first_reaching(Workspace& space, const double* values, const u64* weights, int n, u64 target) {
  if (threadIdx.x == 0) space.key = 0, space.before = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) space.bins[d] = 0;
    __syncthreads();
    u64 key = space.key;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      u64 bits = rank_bits(values[i]), mass = COUNT ? 1 : weights[i];
      if (mass && (shift == 56 || bits >> (shift + 8) == key)) atomicAdd(&space.bins[bits >> shift & 255], mass);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int d = 0;
      while (d < DIGITS - 1 && space.before + space.bins[d] < target) space.before += space.bins[d++];
      space.key = key << 8 | d;
    }
    __syncthreads();
  }
  // Candidates of one value have one weight: which of them, in the order of ids. A thread counts a part of the row.
  u64 key = space.key, before = space.before;
  int part = (n + blockDim.x - 1) / blockDim.x, first = min(n, static_cast<int>(threadIdx.x) * part), end = min(n, first + part);
  int count = 0;
  for (int i = first; i < end; i++) count += rank_bits(values[i]) == key && (COUNT || weights[i]);
  space.counts[threadIdx.x] = count;
  __syncthreads();
  int passed = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); t++) passed += space.counts[t];
  for (int i = first; i < end; i++) {
    if (rank_bits(values[i]) != key || !(COUNT || weights[i])) continue;
    u64 each = COUNT ? 1 : weights[i], mass = before + (passed + 1) * each;
    passed++;
    if (mass >= target && mass - each < target) space.found = Found{key, mass, i};
  }
  __syncthreads();
  Found found = space.found;
  __syncthreads();
  return found;
}

// Sum of a number of each thread.
__device__ u64 total_of(Workspace& space, u64 x) {
  if (threadIdx.x == 0) space.total = 0;
  __syncthreads();
  atomicAdd(&space.total, x);
  __syncthreads();
  u64 total = space.total;
  __syncthreads();
  return total;
}

// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): Philox4x32-10, filled as engine/philox.py says.
__device__ u64 random_bits(u64 seed, u64 index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
    uint32_t high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return c0 | static_cast<u64>(c1) << 32;
}

extern "C" __global__ void __launch_bounds__(1024)
    sample_f32(const float* logits, const double* reals, const long long* whole, const int* history, double* values,
               unsigned long long* weights, int* out, int n_vocab, int longest) {
  __shared__ Workspace space;
  long long row = blockIdx.x;
  const float* x = logits + row * n_vocab;
  double temperature = reals[row * 4], top_p = reals[row * 4 + 1], min_p = reals[row * 4 + 2], penalty = reals[row * 4 + 3];
  u64 top_k = static_cast<u64>(whole[row * 4]), seed = static_cast<u64>(whole[row * 4 + 1]);
  u64 index = static_cast<u64>(whole[row * 4 + 2]);
  int n_history = static_cast<int>(whole[row * 4 + 3]);
  values += row * n_vocab, weights += row * n_vocab, history += row * longest;

  // What cannot be sampled from, and which is the first of it.
  if (threadIdx.x == 0) space.problem = 0, space.where = n_vocab;
  __syncthreads();
  u64 usable = 0;
  for (int i = threadIdx.x; i < n_vocab; i += blockDim.x) {
    values[i] = x[i];
    if (x[i] != x[i]) atomicMax(&space.problem, 2);
    if (x[i] == __uint_as_float(0x7f800000u)) atomicMax(&space.problem, 1);
    usable += x[i] > __uint_as_float(0xff800000u);
  }
  bool none = total_of(space, usable) == 0;
  if (space.problem || none) {
    for (int i = threadIdx.x; i < n_vocab; i += blockDim.x)
      if (space.problem == 2 ? x[i] != x[i] : x[i] == __uint_as_float(0x7f800000u)) atomicMin(&space.where, i);
    __syncthreads();
    if (threadIdx.x == 0)
      out[row * 3] = -1, out[row * 3 + 1] = space.problem ? 3 - space.problem : 3, out[row * 3 + 2] = space.where;
    return;
  }
  if (penalty != 1.0)
    for (int i = threadIdx.x; i < n_history; i += blockDim.x) {
      double before = x[history[i]];  // the same for each time that the id occurs
      values[history[i]] = before > 0 ? fmin(before / penalty, 1.7976931348623157e308) : before * penalty;
    }
  __syncthreads();
  Found best = first_reaching<true>(space, values, weights, n_vocab, 1);
  if (temperature == 0.0) {
    if (threadIdx.x == 0) out[row * 3] = static_cast<int>(best.id), out[row * 3 + 1] = 0, out[row * 3 + 2] = 0;
    return;
  }

  Found last{~0ull, 0, n_vocab};  // of top_k
  if (top_k && top_k < static_cast<u64>(n_vocab)) last = first_reaching<true>(space, values, weights, n_vocab, top_k);
  double top = values[best.id];
  constexpr double ONE = 1099511627776.0;  // 2^40
  double least = ceil(min_p * ONE);
  u64 mass = 0, above = 0;
  for (int i = threadIdx.x; i < n_vocab; i += blockDim.x) {
    u64 key = rank_bits(values[i]);
    bool candidate = key < last.key || (key == last.key && i <= last.id);
    u64 weight = candidate ? static_cast<u64>(rint(exp((values[i] - top) / temperature) * ONE)) : 0;
    weights[i] = weight;
    mass += weight;
    if (static_cast<double>(weight) >= least) above += weight;
  }
  u64 all = total_of(space, mass), kept = all;
  above = total_of(space, above);
  if (top_p < 1.0) {
    u64 target = static_cast<u64>(ceil(top_p * static_cast<double>(all)));
    kept = first_reaching<false>(space, values, weights, n_vocab, target ? target : 1).mass;
  }
  if (least > 0.0 && above < kept) kept = above;
  u64 drawn = __umul64hi(random_bits(seed, index), kept) + 1;
  Found token = first_reaching<false>(space, values, weights, n_vocab, drawn);
  if (threadIdx.x == 0) out[row * 3] = static_cast<int>(token.id), out[row * 3 + 1] = 0, out[row * 3 + 2] = 0;
}

// After a step of decoding: what was drawn is what is fed next. ids, positions (n_rows,) int32, whole, history as above;
// rows with a position below zero are not there. Grid: one block; a thread a row.
extern "C" __global__ void advance(const int* out, const double* reals, int* ids, int* positions, long long* whole,
                                   int* history, int n_rows, int longest) {
  let_next_begin();
  wait_for_previous();
  for (int row = threadIdx.x; row < n_rows; row += blockDim.x) {
    if (positions[row] < 0) continue;
    int token = max(out[row * 3], 0);  // -1: nothing could be drawn
    ids[row] = token;
    positions[row]++;
    whole[row * 4 + 2]++;
    if (reals[row * 4 + 3] == 1.0) continue;  // no penalty: no history
    long long at = whole[row * 4 + 3];
    if (at < longest) history[static_cast<long long>(row) * longest + at] = token, whole[row * 4 + 3] = at + 1;
  }
}
