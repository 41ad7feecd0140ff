// Inserted before every kernel file: types, and the few instructions that cannot be written in C++.
//
// Nothing is included, so that NVRTC alone can compile the sources. HOSTCUDA is defined in the build for the CPU
// (kernels_cu/host), which has its own code in place of the assembler here.
#ifndef HOSTCUDA
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#endif

typedef uint16_t f16;    // one half-precision number, as bits
typedef uint32_t f16x2;  // two; the first in the low bits

constexpr unsigned ALL_LANES = 0xffffffffu;

// --- A function that is called, not inlined. Not `__noinline__` on the CPU: the C++ library's own attributes have that name ---
#ifdef HOSTCUDA
#define NOT_INLINED __attribute__((noinline))
#else
#define NOT_INLINED __noinline__
#endif

// --- Dynamic shared memory: declares `type* name`; the launch gives its size ---
#ifdef HOSTCUDA
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(hostcuda::dynamic_shared())
#else
#define DYNAMIC_SHARED(type, name)                  \
  extern __shared__ __align__(128) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

// --- Bytes: byte i of the result is the one that nibble i of the selector names, of a (0-3) and b (4-7); eight more: its sign ---
// __byte_perm ignores the eight on a GPU.
#ifdef HOSTCUDA
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) { return hostcuda::permuted(a, b, selector); }
#else
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
#endif

// --- Half precision ---
#ifdef HOSTCUDA
inline float f16_to_f32(f16 bits) {
  uint32_t sign = uint32_t{bits & 0x8000u} << 16, magnitude = uint32_t{bits & 0x7fffu} << 13;
  float finite = __uint_as_float(magnitude) * 0x1p112f;  // the exponents' biases are 127 and 15; exact
  return __uint_as_float(sign | (magnitude < 0x0f800000u ? __float_as_uint(finite) : magnitude | 0x7f800000u));
}
// Rounds to nearest, ties to even.
inline f16 f32_to_f16(float x) {
  uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // denormal: the addition rounds at the right place
    float shifted = __uint_as_float(magnitude) + 0.5f;
    return sign | (__float_as_uint(shifted) - 0x3f000000u);
  }
  return sign | ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13);
}
inline f16x2 pack_f16x2(f16 low, f16 high) { return low | uint32_t{high} << 16; }
inline f16x2 f32_to_f16x2(float low, float high) { return pack_f16x2(f32_to_f16(low), f32_to_f16(high)); }
#else
__device__ __forceinline__ float f16_to_f32(f16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ f16 f32_to_f16(float x) {
  f16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ f16x2 pack_f16x2(f16 low, f16 high) { return low | static_cast<uint32_t>(high) << 16; }
__device__ __forceinline__ f16x2 f32_to_f16x2(float low, float high) {
  f16x2 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// Half i (0 … 7) of four words, as a float.
__device__ __forceinline__ float half_of(const uint4& words, int i) {
  uint32_t word = i < 2 ? words.x : i < 4 ? words.y : i < 6 ? words.z : words.w;
  return f16_to_f32(static_cast<f16>(i % 2 ? word >> 16 : word));
}

// --- Overlap with the previous and the next kernel, if a launch asks for it (programmatic dependent launch, sm_90) ---
// Lets the next kernel in the stream begin; it calls wait_for_previous before it reads what this kernel writes. What was there when
// this kernel's own wait_for_previous returned may be read before that, if all its blocks call this after it.
__device__ __forceinline__ void let_next_begin() {
#if !defined(HOSTCUDA) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the previous kernels have ended and their results are visible. Before it, only what they do not write may be
// read, such as weights. A kernel that has ended must have waited, so that its end is the end of all before it.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(HOSTCUDA) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- Loads of several words, aligned to their total size ---
// load_constant: from memory that no kernel writes at the same time (weights); load_latest: past the first-level cache, for what
// an earlier kernel has written, where wait_for_previous has not been called.
#ifdef HOSTCUDA
template <class T>
T load_constant(const void* address) {
  hostcuda::require_alignment(address, sizeof(T));
  return *static_cast<const T*>(address);
}
template <class T>
T load_latest(const void* address) {
  hostcuda::require_alignment(address, sizeof(T));
  return *static_cast<const T*>(address);
}
#else
// In assembler, so that the compiler does not move them: a load that is issued early has finished when its value is used.
template <class T>
__device__ __forceinline__ T load_constant(const void* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "a word or several");
  T value;
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(value) : "l"(address));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(address));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address));
  } else {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
  }
  return value;
}
template <class T>
__device__ __forceinline__ T load_latest(const void* address) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 4 || sizeof(T) == 16, "a byte, a word or four");
  T value;
  if constexpr (sizeof(T) == 1) {
    uint32_t byte;
    asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(byte) : "l"(address));
    value = static_cast<T>(byte);
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(address));
  } else {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
  }
  return value;
}
#endif

// From shared memory, or from global memory that this kernel does not write.
template <class T>
__device__ __forceinline__ T load_near(const void* address) {
#ifdef HOSTCUDA
  hostcuda::require_alignment(address, sizeof(T));
#endif
  return *static_cast<const T*>(address);
}

// --- Asynchronous copies from global to shared memory (PTX ISA, cp.async) ---
// A thread's copies since the last end_of_copies() are a group; wait_for_copies<N> waits for all groups of the thread but
// the last N. Other threads see the copied bytes after a barrier.
// copy16: 16 bytes, or 16 zeros unless they exist. Both addresses are multiples of 16.
#ifdef HOSTCUDA
inline void copy16(void* to, const void* from, bool exists = true) {
  hostcuda::require_alignment(to, 16);
  hostcuda::require_alignment(from, 16);
  *static_cast<uint4*>(to) = exists ? *static_cast<const uint4*>(from) : uint4{};
}
inline void end_of_copies() {}
template <int N>
void wait_for_copies() {}
#else
__device__ __forceinline__ void copy16(void* to, const void* from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// Loads *from to `to` if `exists`, without a branch.
#ifdef HOSTCUDA
template <class T>
void load_if(T& to, const float* from, bool exists) {
  if (!exists) return;
  hostcuda::require_alignment(from, sizeof(T));
  to = *reinterpret_cast<const T*>(from);
}
#else
__device__ __forceinline__ void load_if(float4& to, const float* from, bool exists) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.f32 {%0, %1, %2, %3}, [%4];}"
               : "+f"(to.x), "+f"(to.y), "+f"(to.z), "+f"(to.w)
               : "l"(from), "r"(static_cast<int>(exists)));
}
__device__ __forceinline__ void load_if(float& to, const float* from, bool exists) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.f32 %0, [%1];}"
               : "+f"(to)
               : "l"(from), "r"(static_cast<int>(exists)));
}
#endif

// The same address, computed here once: the compiler does not derive it anew for every load.
template <class T>
__device__ __forceinline__ T* computed_once(T* address) {
#ifndef HOSTCUDA
  asm("" : "+l"(address));
#endif
  return address;
}

// The same address, computed before what follows, such as a wait.
template <class T>
__device__ __forceinline__ T* computed_here(T* address) {
#ifndef HOSTCUDA
  asm volatile("" : "+l"(address));
#endif
  return address;
}

// The same number, unknown to the compiler: what is loaded with it is loaded here, even if it was loaded before.
__device__ __forceinline__ int computed_anew(int number) {
#ifndef HOSTCUDA
  asm volatile("" : "+r"(number));
#endif
  return number;
}
// The same number, which was loaded: waited for here, and not before.
__device__ __forceinline__ float needed_here(float number) {
#ifndef HOSTCUDA
  asm volatile("" : "+f"(number));
#endif
  return number;
}

// A constant in a register of its own: the compiler does not make it anew for each use.
__device__ __forceinline__ uint32_t in_register(uint32_t constant) {
#ifndef HOSTCUDA
  constant = __shfl_sync(ALL_LANES, constant, 0);
#endif
  return constant;
}

// Requests the line of an address for the second-level cache. Only a hint.
__device__ __forceinline__ void prefetch(const void* address) {
#ifndef HOSTCUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// --- Which block is the last to arrive: adds one to a counter and returns what it was ---
// What the calling thread wrote or saw before it, and what its block wrote before a barrier in front of it, is visible to
// whoever arrives later, and to its block after a barrier.
#ifdef HOSTCUDA
inline int arrive(int* counter) { return atomicAdd(counter, 1); }
#else
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
#endif

// --- Tensor cores: d = a · b + d with halves a (16, 16) and b (16, 8), and floats d (16, 8) ---
// Lane 4·r + c has from a: rows r (a[0], a[2]) and r + 8 (a[1], a[3]), columns 2c, 2c + 1 (a[0], a[1]) and 2c + 8,
// 2c + 9 (a[2], a[3]); from b: column r, rows 2c, 2c + 1 (b[0]) and 2c + 8, 2c + 9 (b[1]); from d: rows r (d[0], d[1])
// and r + 8 (d[2], d[3]), columns 2c and 2c + 1. (PTX ISA, mma.m16n8k16.)
struct MmaA { f16x2 x[4]; };
struct MmaB { f16x2 x[2]; };
struct MmaD { float x[4]; };

#ifdef HOSTCUDA
struct MmaOperands { MmaA a; MmaB b; MmaD d; };
inline void mma_m16n8k16(MmaD& d, const MmaA& a, const MmaB& b, int line = __builtin_LINE()) {
  MmaOperands in{a, b, d};
  hostcuda::warp_operation(
      [](hostcuda::Lane* lanes, unsigned) {
        auto half = [](f16x2 pair, int i) { return double{f16_to_f32(pair >> (16 * i) & 0xffff)}; };
        double A[16][16], B[16][8], D[16][8];
        for (int lane = 0; lane < 32; lane++) {
          const auto& given = *static_cast<const MmaOperands*>(lanes[lane].in);
          int r = lane / 4, c = lane % 4;
          for (int i = 0; i < 8; i++) A[r + 8 * (i / 2 % 2)][2 * c + 8 * (i / 4) + i % 2] = half(given.a.x[i / 2], i % 2);
          for (int i = 0; i < 4; i++) B[2 * c + 8 * (i / 2) + i % 2][r] = half(given.b.x[i / 2], i % 2);
          for (int i = 0; i < 4; i++) D[r + 8 * (i / 2)][2 * c + i % 2] = given.d.x[i];
        }
        // Products of halves are exact in double; one rounding at the end.
        for (int row = 0; row < 16; row++)
          for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) D[row][column] += A[row][k] * B[k][column];
        for (int lane = 0; lane < 32; lane++) {
          auto& out = *static_cast<MmaD*>(lanes[lane].out);
          for (int i = 0; i < 4; i++) out.x[i] = static_cast<float>(D[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
        }
      },
      ALL_LANES, &in, &d, 0, line);
}
#else
__device__ __forceinline__ void mma_m16n8k16(MmaD& d, const MmaA& a, const MmaB& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
#endif

// --- Tensor cores: integers. d = a · b + d with bytes a (16, 32) and signed bytes b (32, 8), and d (16, 8) ---
// Exact. Lane 4·r + c has from a: rows r (a[0], a[2]) and r + 8 (a[1], a[3]), columns 4c … 4c + 3 (a[0], a[1]) and 16 + 4c …
// (a[2], a[3]); from b: column r, rows 4c … (b[0]) and 16 + 4c … (b[1]); from d as above. (PTX ISA, mma.m16n8k32.)
// Half of it has columns 0 to 15 only: a[0], a[1] and b[0], or a[2], a[3] and b[1].
struct MmaCodes { uint32_t x[4]; };
struct MmaInts { int x[4]; };

#ifdef HOSTCUDA
struct IntegerOperands { uint32_t a[4], b[2]; int d[4]; bool is_signed; };
inline void multiply_codes(MmaInts& d, const IntegerOperands& in, int line) {
  hostcuda::warp_operation(
      [](hostcuda::Lane* lanes, unsigned) {
        int A[16][32], B[8][32];
        for (int lane = 0; lane < 32; lane++) {
          const auto& given = *static_cast<const IntegerOperands*>(lanes[lane].in);
          int r = lane / 4, c = lane % 4;
          for (int i = 0; i < 16; i++) {
            int byte = given.a[i / 4] >> (8 * (i % 4)) & 255;
            A[r + 8 * (i / 4 % 2)][i / 8 * 16 + 4 * c + i % 4] = given.is_signed ? static_cast<int8_t>(byte) : byte;
          }
          for (int i = 0; i < 8; i++)
            B[r][i / 4 * 16 + 4 * c + i % 4] = static_cast<int8_t>(given.b[i / 4] >> (8 * (i % 4)) & 255);
        }
        for (int lane = 0; lane < 32; lane++) {
          const auto& given = *static_cast<const IntegerOperands*>(lanes[lane].in);
          auto& out = *static_cast<MmaInts*>(lanes[lane].out);
          for (int i = 0; i < 4; i++) {
            const int *a = A[lane / 4 + 8 * (i / 2)], *b = B[lane % 4 * 2 + i % 2];
            int sum = given.d[i];
            for (int k = 0; k < 32; k++) sum += a[k] * b[k];
            out.x[i] = sum;
          }
        }
      },
      ALL_LANES, &in, &d, 0, line);
}
template <bool SIGNED>
inline void mma_codes(MmaInts& d, const MmaCodes& a, uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  multiply_codes(d, {{a.x[0], a.x[1], a.x[2], a.x[3]}, {b0, b1}, {d.x[0], d.x[1], d.x[2], d.x[3]}, SIGNED}, line);
}
template <bool SIGNED>
inline void mma_half_codes(MmaInts& d, const MmaCodes& a, int half, uint32_t b, int line = __builtin_LINE()) {
  multiply_codes(d, {{a.x[2 * half], a.x[2 * half + 1], 0, 0}, {b, 0}, {d.x[0], d.x[1], d.x[2], d.x[3]}, SIGNED}, line);
}
#else
template <bool SIGNED>
__device__ __forceinline__ void mma_codes(MmaInts& d, const MmaCodes& a, uint32_t b0, uint32_t b1) {
  if constexpr (SIGNED)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d.x[0]), "+r"(d.x[1]), "+r"(d.x[2]), "+r"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d.x[0]), "+r"(d.x[1]), "+r"(d.x[2]), "+r"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}
template <bool SIGNED>
__device__ __forceinline__ void mma_half_codes(MmaInts& d, const MmaCodes& a, int half, uint32_t b) {
  if constexpr (SIGNED)
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d.x[0]), "+r"(d.x[1]), "+r"(d.x[2]), "+r"(d.x[3])
        : "r"(a.x[2 * half]), "r"(a.x[2 * half + 1]), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d.x[0]), "+r"(d.x[1]), "+r"(d.x[2]), "+r"(d.x[3])
        : "r"(a.x[2 * half]), "r"(a.x[2 * half + 1]), "r"(b));
}
#endif

// --- Sums in a fixed order ---
// The sum of one value per lane, by a butterfly: the same bits in every lane, independent of the rest of the grid.
__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}
// The sum of one value per thread of a block. `scratch` has a float for every warp; it may be reused after the call.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  float sum = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[warp] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < n_warps; i++) total += scratch[i];
  __syncthreads();
  return total;
}

// --- Rows as halves times a power of two ---
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(static_cast<uint32_t>(127 + e) << 23); }
// The exponent e for which top · 2^-e is in [2^14, 2^15), where top is a row's largest magnitude; 0 for 0, NaN, infinity.
__device__ __forceinline__ int row_exponent(float top) {
  int field = static_cast<int>(__float_as_uint(top) >> 23 & 255);
  return field == 255 || top == 0.0f ? 0 : max(field - 127 - 14, -126);
}
// x · 2^-e, with two factors, because 2^-e may be too large for a float.
__device__ __forceinline__ float times_power(float x, int e) {
  int first = -e / 2;
  return __fmul_rn(__fmul_rn(x, power_of_two(first)), power_of_two(-e - first));
}
// The bits of a magnitude, which are in the order of magnitudes, with NaN above all.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
// The larger of two magnitudes; NaN if one of them is NaN.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a != a || b <= a ? a : b; }
__device__ __forceinline__ float warp_top(float x) {
  for (int offset = 16; offset; offset /= 2) x = larger_or_nan(x, __shfl_xor_sync(ALL_LANES, x, offset));
  return x;
}
