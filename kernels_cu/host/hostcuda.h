// CUDA C on the CPU: what a kernel source needs to compile with g++ (C++17) and to run as it would on a GPU.
//
// Included in front of an unchanged .cu file. Threads of a block are fibres, run one after another until each meets a
// barrier; blocks run one after another. Built with -fsanitize=thread (the instrumentation only: the functions it calls
// are ours, in runtime.cpp), every load and store is checked: outside of the buffers handed to the launch, into one
// handed over as read-only, misaligned, or from shared memory that nothing has written.
//
// Not here: timing, memory ordering between blocks, more than one block at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define HOSTCUDA 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
// Hidden, so that another loaded build of the same function does not share its static variables, such as shared memory.
#define __forceinline__ inline __attribute__((visibility("hidden")))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One section of its own, so that the runtime knows where shared memory is. Not inside templates (g++ cannot place
// those): take dynamic shared memory there.
#define __shared__ static __attribute__((section("hostcuda_shared")))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace hostcuda {

// Coordinates of the running thread.
struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned linear, lane;
};
extern Thread* running;

// What one lane brings to an operation of its warp, and where its result goes.
struct Lane {
  const void* in;
  void* out;
  int argument;
};
using WarpOperation = void (*)(Lane* lanes, unsigned mask);

void block_barrier(int line);
// Waits until every lane of `mask` is at the same operation; the last one performs it for all.
void warp_operation(WarpOperation operation, unsigned mask, const void* in, void* out, int argument, int line);
void* dynamic_shared();
// For loads and stores of several words: the compiler takes those apart, and only scalars are checked on their own.
void require_alignment(const void* pointer, std::size_t size);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T, class F>
void for_lanes(Lane* lanes, unsigned mask, F source) {
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) {
      int from = source(lane, lanes[lane].argument);
      if (from < 0 || from > 31 || !(mask >> from & 1)) from = lane;  // as the hardware: one's own value
      std::memcpy(lanes[lane].out, lanes[from].in, sizeof(T));
    }
}

template <class T, class F>
T reduced(Lane* lanes, unsigned mask, F combine) {
  bool first = true;
  T total{};
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) {
      T value;
      std::memcpy(&value, lanes[lane].in, sizeof(T));
      total = first ? value : combine(total, value);
      first = false;
    }
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) std::memcpy(lanes[lane].out, &total, sizeof(T));
  return total;
}

template <class T>
T warp(WarpOperation operation, unsigned mask, T value, int argument, int line) {
  T result;
  warp_operation(operation, mask, &value, &result, argument, line);
  return result;
}

// Calls a kernel with arguments given as pointers to their values, as cuLaunchKernel takes them. The launcher's own
// memory is no buffer of the kernel: its reads are not checked.
template <class... Types, std::size_t... i>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(Types...), void** arguments, std::index_sequence<i...>) {
  kernel(*static_cast<std::remove_reference_t<Types>*>(arguments[i])...);
}
template <class... Types>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(Types...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Types...>{});
}

}  // namespace hostcuda

// Placed after the source for every kernel: what the launcher finds by name.
#define HOSTCUDA_EXPORT(name) \
  extern "C" void hostcuda_call_##name(void** arguments) { hostcuda::call(&name, arguments); }

#define threadIdx (hostcuda::running->thread)
#define blockIdx (hostcuda::running->block)
#define blockDim (hostcuda::running->block_dim)
#define gridDim (hostcuda::running->grid_dim)
#define warpSize 32

#define __syncthreads() hostcuda::block_barrier(__LINE__)
#define __syncwarp(...) hostcuda_syncwarp(__LINE__, ##__VA_ARGS__)
inline void hostcuda_syncwarp(int line, unsigned mask = 0xffffffffu) {
  hostcuda::warp([](hostcuda::Lane*, unsigned) {}, mask, 0, 0, line);
}

#define HOSTCUDA_SHUFFLE(name, source)                                                                     \
  template <class T>                                                                                       \
  T name(unsigned mask, T value, int argument, int line = __builtin_LINE()) {                              \
    return hostcuda::warp<T>(                                                                              \
        [](hostcuda::Lane* lanes, unsigned mask) {                                                         \
          hostcuda::for_lanes<T>(lanes, mask, [](int lane, int argument) { return source; });              \
        },                                                                                                 \
        mask, value, argument, line);                                                                      \
  }
HOSTCUDA_SHUFFLE(__shfl_sync, ((void)lane, argument & 31))
HOSTCUDA_SHUFFLE(__shfl_xor_sync, lane ^ argument)
HOSTCUDA_SHUFFLE(__shfl_up_sync, lane - argument)
HOSTCUDA_SHUFFLE(__shfl_down_sync, lane + argument)
#undef HOSTCUDA_SHUFFLE

#define HOSTCUDA_REDUCE(name, expression)                                                                  \
  template <class T>                                                                                       \
  T name(unsigned mask, T value, int line = __builtin_LINE()) {                                            \
    return hostcuda::warp<T>(                                                                              \
        [](hostcuda::Lane* lanes, unsigned mask) {                                                         \
          hostcuda::reduced<T>(lanes, mask, [](T a, T b) -> T { return expression; });                     \
        },                                                                                                 \
        mask, value, 0, line);                                                                             \
  }
HOSTCUDA_REDUCE(__reduce_add_sync, a + b)
HOSTCUDA_REDUCE(__reduce_min_sync, a < b ? a : b)
HOSTCUDA_REDUCE(__reduce_max_sync, a > b ? a : b)
HOSTCUDA_REDUCE(__reduce_or_sync, a | b)
#undef HOSTCUDA_REDUCE

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  unsigned bit = predicate ? 1u << hostcuda::running->lane : 0;
  return __reduce_or_sync(mask, bit, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

// Blocks and fibres run one after another: an atomic is what it does.
#define HOSTCUDA_ATOMIC(name, expression)       \
  template <class T>                            \
  T name(T* address, T value) {                 \
    T old = *address;                           \
    *address = (expression);                    \
    return old;                                 \
  }
HOSTCUDA_ATOMIC(atomicAdd, old + value)
HOSTCUDA_ATOMIC(atomicMax, old > value ? old : value)
HOSTCUDA_ATOMIC(atomicMin, old < value ? old : value)
HOSTCUDA_ATOMIC(atomicOr, old | value)
HOSTCUDA_ATOMIC(atomicExch, value)
#undef HOSTCUDA_ATOMIC
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class To, class From>
To hostcuda_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return hostcuda_bits<unsigned>(x); }
inline int __float_as_int(float x) { return hostcuda_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return hostcuda_bits<float>(x); }
inline float __int_as_float(int x) { return hostcuda_bits<float>(x); }
template <class T>
T __ldg(const T* address) { return *address; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline long long __double_as_longlong(double x) { return hostcuda_bits<long long>(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
namespace hostcuda {
inline unsigned permuted(unsigned a, unsigned b, unsigned selector) {
  std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned choice = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign of the byte
    result |= byte << (8 * i);
  }
  return result;
}
}  // namespace hostcuda
// Of a selector's nibbles, a GPU uses three bits.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) { return hostcuda::permuted(a, b, selector & 0x7777u); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++)
    c += static_cast<int>(static_cast<std::int8_t>(a >> (8 * i))) * static_cast<std::int8_t>(b >> (8 * i));
  return c;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
