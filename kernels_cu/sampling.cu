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
#include "sampling.cuh"

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
      values[history[i]] = penalised(x[history[i]], penalty);  // the same for each time that the id occurs
    }
  __syncthreads();
  auto value = [&](int i) { return values[i]; };
  auto one = [](int) -> u64 { return 1; };
  auto weight = [&](int i) { return weights[i]; };
  Found best = first_reaching(space, value, one, n_vocab, 1);
  if (temperature == 0.0) {
    if (threadIdx.x == 0) out[row * 3] = static_cast<int>(best.id), out[row * 3 + 1] = 0, out[row * 3 + 2] = 0;
    return;
  }

  Found last{~0ull, 0, n_vocab};  // of top_k
  if (top_k && top_k < static_cast<u64>(n_vocab)) last = first_reaching(space, value, one, n_vocab, top_k);
  double top = values[best.id];
  double least = ceil(min_p * ONE);
  u64 mass = 0, above = 0;
  for (int i = threadIdx.x; i < n_vocab; i += blockDim.x) {
    u64 key = rank_bits(values[i]);
    bool candidate = key < last.key || (key == last.key && i <= last.id);
    weights[i] = candidate ? weight_of(values[i], top, temperature) : 0;
    mass += weights[i];
    if (static_cast<double>(weights[i]) >= least) above += weights[i];
  }
  u64 all = total_of(space, mass), kept = all;
  above = total_of(space, above);
  if (top_p < 1.0) {
    u64 target = static_cast<u64>(ceil(top_p * static_cast<double>(all)));
    kept = first_reaching(space, value, weight, n_vocab, target ? target : 1).mass;
  }
  if (least > 0.0 && above < kept) kept = above;
  u64 drawn = __umul64hi(random_bits(seed, index), kept) + 1;
  Found token = first_reaching(space, value, weight, n_vocab, drawn);
  if (threadIdx.x == 0) out[row * 3] = static_cast<int>(token.id), out[row * 3 + 1] = 0, out[row * 3 + 2] = 0;
}
