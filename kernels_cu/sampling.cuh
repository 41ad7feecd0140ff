// Ranking, weights and random bits for sampling.cu.
typedef unsigned long long u64;

constexpr int DIGITS = 256, MOST_THREADS = 1024;

// Bits whose ascending order is the descending order of doubles. x is not NaN.
__device__ __forceinline__ u64 rank_bits(double x) {
  u64 bits = static_cast<u64>(__double_as_longlong(x + 0.0));  // -0 is 0
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffull;
}

struct Found {
  u64 key, mass;  // the candidate's key; the mass of it and all before it
  long long id;
};

struct Workspace {
  u64 bins[DIGITS];
  int counts[MOST_THREADS];
  u64 key, before;
  Found found;
  u64 total;
};

// The first of candidates 0 … n - 1 in rank order at which the running sum of mass(i) reaches target ≥ 1. Candidates with
// the same value(i) have the same mass, or none.
template <class Value, class Mass>
__device__ Found first_reaching(Workspace& space, const Value& value, const Mass& mass_of, int n, u64 target) {
  if (threadIdx.x == 0) space.key = 0, space.before = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < DIGITS; d += blockDim.x) space.bins[d] = 0;
    __syncthreads();
    u64 key = space.key;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      u64 bits = rank_bits(value(i)), mass = mass_of(i);
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
  // Candidates with the same value have the same weight; find the right one in the order of ids. A thread counts a part.
  u64 key = space.key, before = space.before;
  int part = (n + blockDim.x - 1) / blockDim.x, first = min(n, static_cast<int>(threadIdx.x) * part), end = min(n, first + part);
  int count = 0;
  for (int i = first; i < end; i++) count += rank_bits(value(i)) == key && mass_of(i);
  space.counts[threadIdx.x] = count;
  __syncthreads();
  int passed = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); t++) passed += space.counts[t];
  for (int i = first; i < end; i++) {
    u64 each = rank_bits(value(i)) == key ? mass_of(i) : 0, mass = before + (passed + 1) * each;
    if (!each) continue;
    passed++;
    if (mass >= target && mass - each < target) space.found = Found{key, mass, i};
  }
  __syncthreads();
  Found found = space.found;
  __syncthreads();
  return found;
}

__device__ __forceinline__ double penalised(double x, double penalty) {
  return x > 0 ? fmin(x / penalty, 1.7976931348623157e308) : x * penalty;
}
// round(2^40 · e^((x - top) / temperature))
constexpr double ONE = 1099511627776.0;
__device__ __forceinline__ u64 weight_of(double x, double top, double temperature) {
  return static_cast<u64>(rint(exp((x - top) / temperature) * ONE));
}

// The sum of one number per thread.
__device__ u64 total_of(Workspace& space, u64 x) {
  if (threadIdx.x == 0) space.total = 0;
  __syncthreads();
  atomicAdd(&space.total, x);
  __syncthreads();
  u64 total = space.total;
  __syncthreads();
  return total;
}

// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): Philox4x32-10, used as in engine/philox.py.
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
