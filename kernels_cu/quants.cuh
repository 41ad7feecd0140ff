// Quantised weights as a warp takes them: integers, exact in half precision, and the scales that belong to them.
//
// Planes and lanes are those of refengine/cuda/layout.py. For every type there is a struct of one shape:
//
//   Words load(planes, place, lane)          what a lane has of a tile of 16 x 32: two rows of 8 codes
//   operands(words, a)                       the same as halves, the operands of two mma
//   Scales scales(planes, segment, row)      of 256 columns of a row; of those
//     scale(scales, j, half)                 what the products of block j's 32 columns are multiplied by; SPLIT: of 16
//     minimum(scales, j)                     what is subtracted for each 1 of the activations, where HAS_MINIMUM
//
//   AHEAD                                    blocks that a lane asks for before it uses the first: registers allow it
//
// place = tile * n_blocks + block of 32 columns; segment = tile * n_segments + segment of 256; row is 0 to 15.

constexpr int SEGMENT = 8;  // blocks of 32 columns

struct Planes {
  const uint8_t *low, *high, *scales, *d;
  int n_blocks, n_segments;
};

__device__ __forceinline__ Planes planes_of(const uint8_t* low, const uint8_t* high, const uint8_t* scales,
                                            const uint8_t* d, int n_in) {
  return Planes{low, high, scales, d, n_in / 32, (n_in / 32 + SEGMENT - 1) / SEGMENT};
}

// Codes as halves, without conversions: put into the fraction of 1024, where a half counts in ones, or four bits higher,
// where it counts in sixteenths of that; less 1024 (or 64) and the type's offset. All of it is exact.
template <int OFFSET>
struct Integers {
  static constexpr f16x2 ONE = 0x3c003c00u, SIXTEENTH = 0x2c002c00u, MAGIC = 0x64006400u;
  // -(1024 + OFFSET) and -(64 + OFFSET), for OFFSET 0, 8, 16 or 32
  static constexpr f16x2 LESS = (0xe400u + OFFSET) * 0x10001u, LESS_64 = (0xd400u + OFFSET * 16) * 0x10001u;
  // Bits 0-3 (with `more`, up to 0-5) of both halves of a word.
  static __device__ __forceinline__ f16x2 low(uint32_t word, uint32_t more = 0) {
    return fma_f16x2(select_or(word, 0x000f000fu, MAGIC) | more, ONE, LESS);
  }
  // Bits 4-7 (with `more`, up to 4-9).
  static __device__ __forceinline__ f16x2 high(uint32_t word, uint32_t more = 0) {
    return fma_f16x2(select_or(word, 0x00f000f0u, MAGIC) | more, SIXTEENTH, LESS_64);
  }
};

// A small integer as a float, exactly: below 2^23 it is the fraction of 2^23 + n. The conversion instruction is slow.
__device__ __forceinline__ float small_integer(uint32_t n, float bias) {
  return __fadd_rn(__uint_as_float(0x4b000000u | n), -8388608.0f - bias);
}

// Half i (0 … 7) of four words, as a float.
__device__ __forceinline__ float half_of(const uint4& words, int i) {
  uint32_t word = i < 2 ? words.x : i < 4 ? words.y : i < 6 ? words.z : words.w;
  return f16_to_f32(static_cast<f16>(i % 2 ? word >> 16 : word));
}

// What a lane has of a tile in nibbles: a word of row r, one of row r + 8.
__device__ __forceinline__ uint2 nibble_words(const Planes& w, long long place, int lane) {
  return load_constant<uint2>(w.low + place * 256 + lane * 8);
}

// Four words of scales a row and segment.
__device__ __forceinline__ uint4 scale_words(const Planes& w, long long segment, int row) {
  return load_constant<uint4>(w.scales + (segment * 16 + row) * 16);
}

// The i-th pair of columns of rows r and r + 8 goes to a[i / 2].x[2 * (i % 2)] and the one after it.
template <int OFFSET>
struct FourBits {
  static constexpr bool SPLIT = false;
  static constexpr int AHEAD = 8;
  using Words = uint2;
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    return nibble_words(w, place, lane);
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    using I = Integers<OFFSET>;
    a[0] = {{I::low(words.x), I::low(words.y), I::high(words.x), I::high(words.y)}};
    a[1] = {{I::low(words.x >> 8), I::low(words.y >> 8), I::high(words.x >> 8), I::high(words.y >> 8)}};
  }
};

// The fifth bits of a lane: two bytes, moved to bits 4-11 and 20-27. There, bits 4 and 20 belong to the pair in a word's
// bits 0-3, bits 8 and 24 to that in its bits 4-7; shifted by one, the pairs of the word shifted by eight; by two and
// three, those of row r + 8.
template <int OFFSET>
struct FiveBits {
  static constexpr bool SPLIT = false;
  static constexpr int AHEAD = 4;
  struct Words {
    uint2 low;
    uint32_t high;
  };
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    return {nibble_words(w, place, lane), load_constant<uint16_t>(w.high + place * 64 + lane * 2)};
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    using I = Integers<OFFSET>;
    uint32_t x = words.low.x, y = words.low.y, h = __byte_perm(words.high, 0, 0x4140) << 4;
    a[0] = {{I::low(x, h & 0x00100010u), I::low(y, h >> 2 & 0x00100010u), I::high(x, h & 0x01000100u),
             I::high(y, h >> 2 & 0x01000100u)}};
    a[1] = {{I::low(x >> 8, h >> 1 & 0x00100010u), I::low(y >> 8, h >> 3 & 0x00100010u),
             I::high(x >> 8, h >> 1 & 0x01000100u), I::high(y >> 8, h >> 3 & 0x01000100u)}};
  }
};

// Eight d of blocks of 32.
struct EightD {
  static constexpr bool HAS_MINIMUM = false;
  using Scales = uint4;
  static __device__ __forceinline__ Scales scales(const Planes& w, long long segment, int row) {
    return load_constant<uint4>(w.scales + (segment * 16 + row) * 16);
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) { return half_of(s, j); }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
};

// Eight d, then eight m, which are added: the minimum is -m.
struct EightDM {
  static constexpr bool HAS_MINIMUM = true;
  struct Scales {
    uint4 d, m;
  };
  static __device__ __forceinline__ Scales scales(const Planes& w, long long segment, int row) {
    const uint8_t* words = w.scales + (segment * 16 + row) * 32;
    return {load_constant<uint4>(words), load_constant<uint4>(words + 16)};
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) { return half_of(s.d, j); }
  static __device__ __forceinline__ float minimum(const Scales& s, int j) { return -half_of(s.m, j); }
};

// d and dmin; eight scales and eight minimums of six bits. Two neighbours' are decoded together, as halves.
struct SixBits {
  static constexpr bool HAS_MINIMUM = true;
  using Scales = uint4;
  static __device__ __forceinline__ Scales scales(const Planes& w, long long segment, int row) {
    return scale_words(w, segment, row);
  }
  // Nibbles i and 4 + i of `low`, and above them the bits 4, 5 and 20, 21 of `upper`.
  static __device__ __forceinline__ float code(uint32_t low, uint32_t upper, int j) {
    f16x2 both = Integers<0>::low(low >> 4 * (j / 2), upper & 0x00300030u);
    return f16_to_f32(static_cast<f16>(j % 2 ? both >> 16 : both));
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) {
    uint32_t upper = j < 4 ? s.w << (4 - j / 2 * 2) : s.w >> (j / 2 * 2 - 4);
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.x)), code(s.y, upper, j));
  }
  static __device__ __forceinline__ float minimum(const Scales& s, int j) {
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.x >> 16)), code(s.z, s.w >> (4 + j / 2 * 2), j));
  }
};

struct Q4_0 : FourBits<8>, EightD {};
struct Q4_1 : FourBits<0>, EightDM {};
struct Q5_0 : FiveBits<16>, EightD {};
struct Q5_1 : FiveBits<0>, EightDM {};
struct Q4_K : FourBits<0>, SixBits {};
struct Q5_K : FiveBits<0>, SixBits {
  static constexpr int AHEAD = 2;  // its scales take the registers
};

struct Q8_0 : EightD {
  static constexpr bool SPLIT = false;
  static constexpr int AHEAD = 4;
  using Words = uint4;  // row r: columns of the first and of the second mma; row r + 8 likewise
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    return load_constant<uint4>(w.low + place * 512 + lane * 16);
  }
  static __device__ __forceinline__ f16x2 two(uint32_t word, uint32_t selector) {
    return fma_f16x2(__byte_perm(word ^ 0x80808080u, 0x64646464u, selector), 0x3c003c00u, 0xe480e480u);  // - 1152
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    a[0] = {{two(words.x, 0x4140), two(words.z, 0x4140), two(words.x, 0x4342), two(words.z, 0x4342)}};
    a[1] = {{two(words.y, 0x4140), two(words.w, 0x4140), two(words.y, 0x4342), two(words.w, 0x4342)}};
  }
};

struct Q6_K {
  static constexpr bool SPLIT = true, HAS_MINIMUM = false;
  static constexpr int AHEAD = 4;
  struct Words {
    uint2 low;
    uint32_t high;
  };
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    return {nibble_words(w, place, lane), load_constant<uint32_t>(w.high + place * 128 + lane * 4)};
  }
  // As FiveBits, with two bits each: bits 4-5, 8-9, 20-21, 24-25, those two higher, and both again eight bits higher
  // (around the end of the word) for row r + 8.
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    using I = Integers<32>;
    uint32_t x = words.low.x, y = words.low.y, h = words.high, g = h >> 8 | h << 24;
    a[0] = {{I::low(x, h & 0x00300030u), I::low(y, g & 0x00300030u), I::high(x, h & 0x03000300u),
             I::high(y, g & 0x03000300u)}};
    a[1] = {{I::low(x >> 8, h >> 2 & 0x00300030u), I::low(y >> 8, g >> 2 & 0x00300030u),
             I::high(x >> 8, h >> 2 & 0x03000300u), I::high(y >> 8, g >> 2 & 0x03000300u)}};
  }
  struct Scales {
    uint4 factors;
    float d;
  };
  static __device__ __forceinline__ Scales scales(const Planes& w, long long segment, int row) {
    return {scale_words(w, segment, row),
            f16_to_f32(load_constant<f16>(w.d + (segment * 16 + row) * 2))};
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int half) {
    uint32_t word = j < 2 ? s.factors.x : j < 4 ? s.factors.y : j < 6 ? s.factors.z : s.factors.w;
    uint32_t factor = (word >> 8 * (j % 2 * 2 + half) & 0xffu) ^ 0x80u;
    return __fmul_rn(s.d, small_integer(factor, 128.0f));
  }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
};

// E2M1 codes: sign, two bits of exponent, one of mantissa. Put at those places of a half, they are 2^-14 times the
// value; times 2^15 they are ggml's doubled integers, whose scale is halved.
struct MXFP4 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false;
  static constexpr int AHEAD = 8;
  using Words = uint2;
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    return nibble_words(w, place, lane);
  }
  static __device__ __forceinline__ f16x2 values(uint32_t codes) {
    // The code for -0 is +0 in ggml: adding +0 makes it so.
    return fma_f16x2((codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9, 0x78007800u, 0u);
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i / 2].x[2 * (i % 2)] = values(words.x >> 4 * i);
      a[i / 2].x[2 * (i % 2) + 1] = values(words.y >> 4 * i);
    }
  }
  using Scales = uint2;
  static __device__ __forceinline__ Scales scales(const Planes& w, long long segment, int row) {
    return load_constant<uint2>(w.scales + (segment * 16 + row) * 8);
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) {
    uint32_t e = (j < 4 ? s.x : s.y) >> 8 * (j % 4) & 255;
    return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // half of 2^(e - 127)
  }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
};

struct F16 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false;
  static constexpr int AHEAD = 2;
  struct Words {
    uint4 row[2];
  };
  static __device__ __forceinline__ Words load(const Planes& w, long long place, int lane) {
    const uint8_t* words = w.low + place * 1024 + lane * 32;
    return {{load_constant<uint4>(words), load_constant<uint4>(words + 16)}};
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint4& four = words.row[row];
      a[0].x[row] = four.x, a[0].x[2 + row] = four.y, a[1].x[row] = four.z, a[1].x[2 + row] = four.w;
    }
  }
  struct Scales {};
  static __device__ __forceinline__ Scales scales(const Planes&, long long, int) { return {}; }
  static __device__ __forceinline__ float scale(const Scales&, int, int) { return 1.0f; }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
};
