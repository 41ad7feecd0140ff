// Quantised weights in the form that a warp reads: integers of eight bits, operands of tensor cores, and their scales.
//
// The layout is that of refengine/cuda/layout.py. A tile is 16 rows of a matrix, a segment 256 columns of it: up to eight
// blocks of 32, in pairs. With n_pairs pairs, pair j is blocks j and j + n_pairs. Lane 4 r + c of a warp has columns 4c …
// 4c + 3 and 16 + 4c … 16 + 4c + 3 of rows r and r + 8 of a block, which is the order of mma.m16n8k32. Every type has a struct
// with the same members:
//
//   Codes codes<M>(lanes, j)       a lane's codes of pair j: x[k] for block j + k · n_pairs, as MmaCodes. M is where the weights
//                                  are, InGlobal or InShared. LOW and HIGH are the lane's bytes for a pair in the planes of
//                                  these names. With codes<M, false>, those of x[1] are not yet divided by 1 << SHIFT
//   SIGNED, OFFSET                 whether codes are signed bytes; what is subtracted from them
//   Scales scales<M>(planes, l)    a lane's scales: those of block j of row r + 8 i, and of its pair, are read by lane
//                                  4 r + j; SCALES are its bytes in the plane `scales`
//   Whole whole<M>(planes, r)      scales of whole segments of rows r and r + 8; WHOLE are their bytes in the plane `whole`
//   factor(scales, i, k)           not INTEGER: the scale of block j + k · n_pairs of row r + 8 i, divided by UNIT
//   minimum(scales, i, k)          HAS_MINIMUM: what is added to it for every column
//   integer(scales, i, k)          INTEGER: the scale is an integer, times `d` of the row
//   integer_minimum(scales, i, k)  HAS_MINIMUM: the same, times -`dmin`
//
// HALVES (Q6_K) says that each half of a block has a scale. Then the scales of half `half` of blocks j and j + n_pairs are
// read by lane 4 r + 2 (j % 2) + half, and integer(scales, i, 2 (j / 2) + k).

constexpr int SEGMENT = 8;     // blocks of 32 columns
constexpr int MOST_PAIRS = 4;  // of a segment

// Where weights are read from.
struct InGlobal {
  template <class T>
  static __device__ __forceinline__ T load(const void* address) { return load_constant<T>(address); }
};
struct InShared {
  template <class T>
  static __device__ __forceinline__ T load(const void* address) { return *static_cast<const T*>(address); }
};

// The planes of a segment of a tile.
struct Planes {
  const uint8_t *low, *high, *scales, *whole;
};

// A matrix in the device's layout, with rows of n_blocks blocks of 32 columns.
struct Tiles {
  const uint8_t* data;
  int n_blocks;
  __device__ __forceinline__ int n_segments() const { return (n_blocks + SEGMENT - 1) / SEGMENT; }
  __device__ __forceinline__ int n_pairs(int segment) const { return (min(n_blocks - segment * SEGMENT, SEGMENT) + 1) / 2; }
};

// The planes of a segment with n_pairs pairs that begins at `data`.
template <class Q>
__device__ __forceinline__ Planes planes_at(const uint8_t* data, int n_pairs) {
  const uint8_t *high = data + n_pairs * 32 * Q::LOW, *scales = high + n_pairs * 32 * Q::HIGH;
  return {data, high, scales, scales + 32 * Q::SCALES};
}

// The planes of a segment of a tile.
template <class Q>
__device__ __forceinline__ Planes planes_of(const Tiles& w, long long tile, int segment) {
  constexpr int OF_PAIR = 32 * (Q::LOW + Q::HIGH), OF_SCALES = 32 * Q::SCALES + 8 * Q::WHOLE;
  long long of_tile = (w.n_blocks + 1) / 2 * OF_PAIR + w.n_segments() * OF_SCALES;
  const uint8_t* data = w.data + tile * of_tile + segment * (MOST_PAIRS * OF_PAIR + OF_SCALES);
  return planes_at<Q>(data, w.n_pairs(segment));
}

// The addresses of a lane's codes of pair 0.
struct Lanes {
  const uint8_t *low, *high;
};
template <class Q>
__device__ __forceinline__ Lanes lane_of(const Planes& w, int lane) {
  return {w.low + lane * Q::LOW, w.high + lane * Q::HIGH};
}

struct Codes {
  MmaCodes x[2];
};

struct SignedCodes {
  Codes positive, negative;
};

// A byte of a word.
__device__ __forceinline__ int byte_of(uint32_t word, int i) { return static_cast<int>(__byte_perm(word, 0, 0x4440 + i)); }

// Four words for the four registers of an operand. The low nibbles of their bytes are the first block's codes, the high
// ones the second block's.
struct FourBits {
  static constexpr int LOW = 16, HIGH = 0, SHIFT = 4;
  template <class M, bool SHIFTED = true>
  static __device__ __forceinline__ Codes codes(const Lanes& at, int j) {
    uint4 words = M::template load<uint4>(at.low + j * 512);
    uint32_t of[4] = {words.x, words.y, words.z, words.w};
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      codes.x[0].x[i] = of[i] & 0x0f0f0f0fu;
      codes.x[1].x[i] = SHIFTED ? of[i] >> 4 & 0x0f0f0f0fu : of[i] & 0xf0f0f0f0u;
    }
    return codes;
  }
};

// The same, and a word of fifth bits: bit i + 4 k of each byte belongs to the byte's code in register i of block k.
struct FiveBits {
  static constexpr int LOW = 16, HIGH = 4, SHIFT = 0;
  template <class M, bool SHIFTED = true>
  static __device__ __forceinline__ Codes codes(const Lanes& at, int j) {
    Codes codes = FourBits::codes<M>(at, j);
    uint32_t high = M::template load<uint32_t>(at.high + j * 128);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      codes.x[0].x[i] |= high << (4 - i) & 0x10101010u;
      codes.x[1].x[i] |= high >> i & 0x10101010u;
    }
    return codes;
  }
};

// The same with two words: bits 2 i and 2 i + 1 of each byte of word k.
struct SixBits {
  static constexpr int LOW = 16, HIGH = 8, SHIFT = 0;
  template <class M, bool SHIFTED = true>
  static __device__ __forceinline__ Codes codes(const Lanes& at, int j) {
    Codes codes = FourBits::codes<M>(at, j);
    uint2 high = M::template load<uint2>(at.high + j * 256);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint32_t word = k ? high.y : high.x;
        codes.x[k].x[i] |= (i < 2 ? word << (4 - 2 * i) : word >> (2 * i - 4)) & 0x30303030u;
      }
    return codes;
  }
};

struct NoWhole {
  static constexpr int WHOLE = 0;
  struct Whole {};
  template <class M>
  static __device__ __forceinline__ Whole whole(const Planes&, int) { return {}; }
};

// One d for a block, in half precision.
struct BlockScale : NoWhole {
  static constexpr bool SPLIT = false, INTEGER = false, HAS_MINIMUM = false, HALVES = false;
  static constexpr int SCALES = 8;
  static constexpr float UNIT = 1.0f;
  using Scales = uint2;
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int lane) {
    return M::template load<uint2>(w.scales + lane * 8);
  }
  static __device__ __forceinline__ float factor(const Scales& s, int i, int k) {
    uint32_t word = i ? s.y : s.x;
    return f16_to_f32(static_cast<f16>(k ? word >> 16 : word));
  }
  static __device__ __forceinline__ float minimum(const Scales&, int, int) { return 0.0f; }
};

// d and m.
struct BlockScaleAndMinimum : NoWhole {
  static constexpr bool SPLIT = false, INTEGER = false, HAS_MINIMUM = true, HALVES = false;
  static constexpr int SCALES = 16;
  static constexpr float UNIT = 1.0f;
  using Scales = uint4;
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int lane) {
    return M::template load<uint4>(w.scales + lane * 16);
  }
  static __device__ __forceinline__ float factor(const Scales& s, int i, int k) {
    uint32_t word = i ? s.z : s.x;
    return f16_to_f32(static_cast<f16>(k ? word >> 16 : word));
  }
  static __device__ __forceinline__ float minimum(const Scales& s, int i, int k) {
    uint32_t word = i ? s.w : s.y;
    return f16_to_f32(static_cast<f16>(k ? word >> 16 : word));
  }
};

// A scale and a minimum of six bits for a block, d and dmin for 256 columns.
struct SixBitScales {
  static constexpr bool SPLIT = false, INTEGER = true, HAS_MINIMUM = true, HALVES = false;
  static constexpr float UNIT = 1.0f;
  static constexpr int SCALES = 8, WHOLE = 8;
  using Scales = uint2;
  using Whole = uint2;  // d, and 16 bits higher dmin, of both rows
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int lane) {
    return M::template load<uint2>(w.scales + lane * 8);
  }
  template <class M>
  static __device__ __forceinline__ Whole whole(const Planes& w, int r) {
    return M::template load<uint2>(w.whole + r * 8);
  }
  static __device__ __forceinline__ int integer(const Scales& s, int i, int k) { return byte_of(i ? s.y : s.x, k); }
  static __device__ __forceinline__ int integer_minimum(const Scales& s, int i, int k) { return byte_of(i ? s.y : s.x, 2 + k); }
  static __device__ __forceinline__ float d(const Whole& w, int i) { return f16_to_f32(static_cast<f16>(i ? w.y : w.x)); }
  static __device__ __forceinline__ float dmin(const Whole& w, int i) {
    return f16_to_f32(static_cast<f16>((i ? w.y : w.x) >> 16));
  }
};

struct Q4_0 : FourBits, BlockScale {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 8;
};
struct Q4_1 : FourBits, BlockScaleAndMinimum {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 0;
};
struct Q5_0 : FiveBits, BlockScale {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 16;
};
struct Q5_1 : FiveBits, BlockScaleAndMinimum {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 0;
};
struct Q4_K : FourBits, SixBitScales {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 0;
};
struct Q5_K : FiveBits, SixBitScales {
  static constexpr bool SIGNED = false;
  static constexpr int OFFSET = 0;
};

// The codes of the pair's first block in the plane `low`, those of its second in `high`.
struct Q8_0 : BlockScale {
  static constexpr bool SIGNED = true;
  static constexpr int OFFSET = 0, LOW = 16, HIGH = 16, SHIFT = 0;
  template <class M, bool SHIFTED = true>
  static __device__ __forceinline__ Codes codes(const Lanes& at, int j) {
    uint4 first = M::template load<uint4>(at.low + j * 512), second = M::template load<uint4>(at.high + j * 512);
    return {{{{first.x, first.y, first.z, first.w}}, {{second.x, second.y, second.z, second.w}}}};
  }
};

struct Q6_K : SixBits {
  static constexpr bool SPLIT = false, SIGNED = false, INTEGER = true, HAS_MINIMUM = false, HALVES = true;
  static constexpr int OFFSET = 32, SCALES = 8, WHOLE = 4;
  static constexpr float UNIT = 1.0f;
  using Scales = uint2;
  using Whole = uint32_t;  // d of both rows
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int lane) {
    return M::template load<uint2>(w.scales + lane * 8);
  }
  template <class M>
  static __device__ __forceinline__ Whole whole(const Planes& w, int r) {
    return M::template load<uint32_t>(w.whole + r * 4);
  }
  static __device__ __forceinline__ int integer(const Scales& s, int i, int number) {
    return static_cast<int>(permuted(i ? s.y : s.x, 0, 0x8880 + 0x1111 * number));  // and its sign, three times
  }
  static __device__ __forceinline__ float d(const Whole& w, int i) { return f16_to_f32(static_cast<f16>(i ? w >> 16 : w)); }
};

// E2M1 codes: a sign (bit 3) and the number of a magnitude. ggml doubles the values and halves the scale 2^(e - 127). In a word,
// the lower nibbles 0 to 3 are those of the first block's bytes, nibbles 4 to 7 those of the second block's.
struct MXFP4 : NoWhole {
  static constexpr bool SPLIT = true, SIGNED = false, INTEGER = false, HAS_MINIMUM = false, HALVES = false;
  static constexpr int OFFSET = 16, LOW = 16, HIGH = 0, SHIFT = 0, SCALES = 4;
  static constexpr float UNIT = 0.25f;  // so that the smallest scale, 2^-128, is a normal number
  // The magnitudes of codes that are positive, and of those that are negative; zeros for the others.
  static __device__ __forceinline__ SignedCodes signed_codes(const Lanes& at, int j, uint32_t table) {
    uint4 words = InShared::load<uint4>(at.low + j * 512);
    uint32_t of[4] = {words.x, words.y, words.z, words.w};
    SignedCodes codes;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        // A nibble below 8 selects a byte, another one the sign of a byte, which is 0 for all of these.
        codes.positive.x[k].x[i] = permuted(table, 0x0c080604u, of[i] >> 16 * k);
        codes.negative.x[k].x[i] = permuted(table, 0x0c080604u, (of[i] ^ 0x88888888u) >> 16 * k);
      }
    return codes;
  }
  template <class M, bool SHIFTED = true>
  static __device__ __forceinline__ Codes codes(const Lanes& at, int j) {
    uint4 words = M::template load<uint4>(at.low + j * 512);
    uint32_t of[4] = {words.x, words.y, words.z, words.w};
    Codes codes;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        // A nibble below 8 selects a byte, another one the sign of a byte, which is 0 for all of these.
        uint32_t other = of[i] ^ 0x88888888u;
        uint32_t positive = permuted(0x13121110u, 0x1c181614u, of[i] >> 16 * k);  // 16 + 0, 1, 2, 3, 4, 6, 8, 12
        uint32_t negative = permuted(0x0d0e0f10u, 0x04080a0cu, other >> 16 * k);  // 16 - 0, 1, 2, 3, 4, 6, 8, 12
        codes.x[k].x[i] = positive | negative;
      }
    return codes;
  }
  using Scales = uint32_t;
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int lane) {
    return M::template load<uint32_t>(w.scales + lane * 4);
  }
  // 2^(e - 126): e + 1 is below 255 (layout.py).
  static __device__ __forceinline__ float factor(const Scales& s, int i, int k) {
    return __uint_as_float((byte_of(s, 2 * i + k) + 1) << 23);
  }
  static __device__ __forceinline__ float minimum(const Scales&, int, int) { return 0.0f; }
};

// Half-precision weights are multiplied as they are: see half_sums in matmul.cuh. Each pair has its first block's 32 bytes of
// every lane, then its second block's: columns 4c … 4c + 3 and 16 + 4c … of row r, then of row r + 8.
struct F16 {
  static constexpr int LOW = 32, HIGH = 32, SCALES = 0, WHOLE = 0;
};

// Where the scales of a pair are: the lane, of those of row r, that reads those of half `half`, and which of its integers belongs to
// block j + k · n_pairs.
template <class Q>
__device__ __forceinline__ int lane_of_scales(int r, int j, int half) { return 4 * r + (Q::HALVES ? 2 * (j % 2) + half : j); }
template <class Q>
__device__ __forceinline__ int number_of_scale(int j, int k) { return Q::HALVES ? 2 * (j / 2) + k : k; }

// The struct of a type, by ggml's number of it.
template <int NUMBER>
struct TypeOf;
template <> struct TypeOf<2> { using Q = Q4_0; };
template <> struct TypeOf<3> { using Q = Q4_1; };
template <> struct TypeOf<6> { using Q = Q5_0; };
template <> struct TypeOf<7> { using Q = Q5_1; };
template <> struct TypeOf<8> { using Q = Q8_0; };
template <> struct TypeOf<12> { using Q = Q4_K; };
template <> struct TypeOf<13> { using Q = Q5_K; };
template <> struct TypeOf<14> { using Q = Q6_K; };
template <> struct TypeOf<39> { using Q = MXFP4; };

// The types that occur; a kernel that is compiled for few of them has them defined.
#ifndef TYPES
#define TYPES 2, 3, 6, 7, 8, 12, 13, 14, 39
#endif

template <int FIRST, int... OTHERS, class Call>
__device__ __forceinline__ void for_type_among(int type, const Call& call) {
  if constexpr (sizeof...(OTHERS) == 0) {
    call(typename TypeOf<FIRST>::Q{});
  } else {
    if (type == FIRST)
      call(typename TypeOf<FIRST>::Q{});
    else
      for_type_among<OTHERS...>(type, call);
  }
}

// Calls `call` with an object of the struct of a type that occurs, given ggml's number of it.
template <class Call>
__device__ __forceinline__ void for_type(int type, const Call& call) { for_type_among<TYPES>(type, call); }
