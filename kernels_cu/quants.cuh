// Quantised weights in the form that a warp reads: integers, exact in half precision, and their scales.
//
// Planes and lanes are those of refengine/cuda/layout.py. Every type has a struct with the same members:
//
//   Words load<M>(lane's, j)                 a lane's part of the tile of 16 x 32 that is j further on: two rows of 8
//                                            codes; LOW and HIGH are its bytes in the planes of these names; M is where
//                                            the weights are, InGlobal or InShared
//   operands(words, a)                       the same as halves, the operands of two mma
//   Scales scales<M>(planes, row)            the scales of 256 columns of a row, not yet unpacked, because that would wait
//                                            for the load; SCALE_BYTES and D_BYTES are their bytes in the planes `scales`
//                                            and `d`; a weight of block j is, with ggml's rounding,
//     scale(scales, j, half) · code - minimum(scales, j)           half: columns 0-15 or 16-31, if SPLIT
//
// and for products, which do as much as possible once per segment, exactly:
//
//   SCALED                                   scaled_operands(words, scales of rows r and r + 8, j, a): codes times a small
//                                            integer of block j, and a power of two that `whole` takes back, so that sums
//                                            need no scale before the segment's end
//   factor(scales, j, half)                  otherwise: the factor of the products of a block (SPLIT: of half a block)
//   second_half(scales)                      moves the scales of blocks 4 to 7 to the place of those of blocks 0 to 3
//   whole(scales)                            WHOLE: the factor of the segment's sum
//   minimum_operand(scales, c, m)            HAS_MINIMUM: the minimums of blocks c and c + 4, twice each
//   minimum_whole(scales)                    the factor of their products with the block sums
//
// The planes are those of a segment of a tile; row is 0 to 15.

constexpr int SEGMENT = 8;  // blocks of 32 columns

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
  const uint8_t *low, *high, *scales, *d;
};

// A matrix in the device's layout (refengine/cuda/layout.py), with rows of n_blocks blocks of 32 columns.
struct Tiles {
  const uint8_t* data;
  int n_blocks;
  __device__ __forceinline__ int n_segments() const { return (n_blocks + SEGMENT - 1) / SEGMENT; }
};

// The planes of a segment with n_blocks blocks that begins at `data`.
template <class Q>
__device__ __forceinline__ Planes planes_at(const uint8_t* data, int n_blocks) {
  const uint8_t *high = data + n_blocks * 32 * Q::LOW, *scales = high + n_blocks * 32 * Q::HIGH;
  return {data, high, scales, scales + 16 * Q::SCALE_BYTES};
}

// The planes of a segment of a tile.
template <class Q>
__device__ __forceinline__ Planes planes_of(const Tiles& w, long long tile, int segment) {
  constexpr int OF_BLOCK = 32 * (Q::LOW + Q::HIGH), OF_SCALES = 16 * (Q::SCALE_BYTES + Q::D_BYTES);
  long long of_tile = w.n_blocks * OF_BLOCK + w.n_segments() * OF_SCALES;
  const uint8_t* data = w.data + tile * of_tile + segment * (SEGMENT * OF_BLOCK + OF_SCALES);
  return planes_at<Q>(data, min(SEGMENT, w.n_blocks - segment * SEGMENT));
}

// Codes as halves, without conversion instructions, exactly, in one of two ways:
//   units   a half whose bits are a code c below 1024 is c · 2^-24, a subnormal number, which is multiplied exactly and at
//           full speed. A mask is all it takes, or for codes four bits higher one that gives 16 times as much. It must be
//           multiplied before an mma has it: tensor cores add products as if the codes' leading zeros were digits, which
//           costs as many bits of the sum
//   ones    the code is put into the fraction of 1024, where the last bit counts one, or four bits higher into that of 64;
//           then 1024 (or 64) and the type's offset are subtracted
constexpr f16x2 OF_1024 = 0x64006400u, OF_64 = 0x54005400u;  // 1024 and 64, twice
constexpr f16x2 NEGATIVE = 0x80008000u;
__device__ __forceinline__ f16x2 times(f16x2 a, f16x2 b) { return fma_f16x2(a, b, 0u); }
// Two adjacent bytes of a word, plus 1024.
__device__ __forceinline__ f16x2 two_bytes(uint32_t word, int first) {
  return __byte_perm(word, 0x64646464u, first ? 0x4342 : 0x4140);
}

// The address of a lane's part of a tile of 32 columns.
struct Lanes {
  const uint8_t *low, *high;
};
template <class Q>
__device__ __forceinline__ Lanes lane_of(const Planes& w, int block, int lane) {
  return {w.low + (block * 32 + lane) * Q::LOW, w.high + (block * 32 + lane) * Q::HIGH};
}

// A lane's part of a tile in nibbles: a word of row r and one of row r + 8.
template <class M>
__device__ __forceinline__ uint2 nibble_words(const Lanes& at, int j) { return M::template load<uint2>(at.low + j * 256); }

// Four words of scales per row and segment.
template <class M>
__device__ __forceinline__ uint4 scale_words(const Planes& w, int row) {
  return M::template load<uint4>(w.scales + row * 16);
}

// The i-th pair of columns of rows r and r + 8 goes to a[i / 2].x[2 * (i % 2)] and the element after it. Pairs 0 and 2 are
// in bits 0-3 of both halves of a word and of the word shifted by eight; pairs 1 and 3 four bits higher.
//
// `pairs` puts pairs 0 and 2 into the fraction of `low`, pairs 1 and 3, 16 times as much, into that of `high`; with zeros,
// codes are in units.
struct FourBits {
  static constexpr bool SPLIT = false;
  static constexpr int LOW = 8, HIGH = 0;
  using Words = uint2;
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return nibble_words<M>(at, j);
  }
  static __device__ __forceinline__ void pairs(const Words& words, f16x2 low, f16x2 high, MmaA (&a)[2]) {
    uint32_t of[4] = {words.x, words.y, words.x >> 8, words.y >> 8};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i / 2].x[i % 2] = select_or(of[i], 0x000f000fu, low);
      a[i / 2].x[2 + i % 2] = select_or(of[i], 0x00f000f0u, high);
    }
  }
};

// The fifth bits of a lane: two bytes, moved to bits 0-7 and 16-23. Shifted by four, bits 4 and 20 belong to the pair in a
// word's bits 0-3, bits 8 and 24 to that in its bits 4-7; shifted by one less, to the pairs of the word shifted by eight;
// by two and three less, to those of row r + 8.
struct FiveBits {
  static constexpr bool SPLIT = false;
  static constexpr int LOW = 8, HIGH = 2;
  struct Words {
    uint2 low;
    uint32_t high;
  };
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return {nibble_words<M>(at, j), M::template load<uint16_t>(at.high + j * 64)};
  }
  static __device__ __forceinline__ void pairs(const Words& words, f16x2 low, f16x2 high, MmaA (&a)[2]) {
    FourBits::pairs(words.low, low, high, a);
    uint32_t h = __byte_perm(words.high, 0, 0x4140);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t bits = h << (4 - i / 2 - i % 2 * 2);
      a[i / 2].x[i % 2] |= bits & 0x00100010u, a[i / 2].x[2 + i % 2] |= bits & 0x01000100u;
    }
  }
};

// The fifth and sixth bits of a lane, likewise: bits 4-5, 8-9, 20-21, 24-25, those two higher, and both again eight bits
// higher (around the end of the word) for row r + 8.
struct SixBits {
  static constexpr bool SPLIT = true;
  static constexpr int LOW = 8, HIGH = 4;
  struct Words {
    uint2 low;
    uint32_t high;
  };
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return {nibble_words<M>(at, j), M::template load<uint32_t>(at.high + j * 128)};
  }
  static __device__ __forceinline__ void pairs(const Words& words, f16x2 low, f16x2 high, MmaA (&a)[2]) {
    FourBits::pairs(words.low, low, high, a);
    uint32_t h = words.high, g = h >> 8 | h << 24;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t bits = (i % 2 ? g : h) >> i / 2 * 2;
      a[i / 2].x[i % 2] |= bits & 0x00300030u, a[i / 2].x[2 + i % 2] |= bits & 0x03000300u;
    }
  }
};

// Codes minus an offset of 0, 8, 16 or 32, in ones. Not by the block sums, as the minimums: that would take as many
// instructions, and cancellation would double the error.
template <class Bits, int OFFSET>
struct InOnes : Bits {
  static __device__ __forceinline__ void operands(const typename Bits::Words& words, MmaA (&a)[2]) {
    Bits::pairs(words, OF_1024, OF_64, a);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i / 2].x[i % 2] = add_f16x2(a[i / 2].x[i % 2], (OF_1024 | NEGATIVE) + OFFSET * 0x10001u);
      a[i / 2].x[2 + i % 2] = add_f16x2(a[i / 2].x[2 + i % 2], (OF_64 | NEGATIVE) + OFFSET * 0x100010u);
    }
  }
};

// Eight d of blocks of 32.
struct EightD {
  static constexpr bool HAS_MINIMUM = false, SCALED = false, WHOLE = false;
  static constexpr int SCALE_BYTES = 16, D_BYTES = 0;
  using Scales = uint4;
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    return M::template load<uint4>(w.scales + row * 16);
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) { return half_of(s, j); }
  static __device__ __forceinline__ float factor(const Scales& s, int j, int) { return half_of(s, j); }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
  static __device__ __forceinline__ void second_half(Scales& s) { s.x = s.z, s.y = s.w; }
};

// Eight d, then eight m. m is added, so the minimum, which is subtracted, is -m.
struct EightDM {
  static constexpr bool HAS_MINIMUM = true, SCALED = false, WHOLE = true;
  static constexpr int SCALE_BYTES = 32, D_BYTES = 0;
  struct Scales {
    uint4 d, m;
  };
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    const uint8_t* words = w.scales + row * 32;
    return {M::template load<uint4>(words), M::template load<uint4>(words + 16)};
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) { return half_of(s.d, j); }
  static __device__ __forceinline__ float factor(const Scales& s, int j, int) { return half_of(s.d, j); }
  static __device__ __forceinline__ float minimum(const Scales& s, int j) { return -half_of(s.m, j); }
  static __device__ __forceinline__ float whole(const Scales&) { return 1.0f; }
  static __device__ __forceinline__ void minimum_operand(const Scales& s, int c, f16x2 (&m)[2]) {
    uint32_t selector = 0x1010u + c * 0x2222u;
    m[0] = __byte_perm(s.m.x, s.m.y, selector), m[1] = __byte_perm(s.m.z, s.m.w, selector);
  }
  static __device__ __forceinline__ float minimum_whole(const Scales&) { return 32.0f; }
  static __device__ __forceinline__ void second_half(Scales& s) { s.d.x = s.d.z, s.d.y = s.d.w; }
};

// Eight scales and eight minimums of six bits, one byte each; d and dmin.
template <class Bits>
struct SixBitScales : InOnes<Bits, 0> {
  static constexpr bool HAS_MINIMUM = true, SCALED = true, WHOLE = true;
  static constexpr int SCALE_BYTES = 16, D_BYTES = 4;
  struct Scales {
    uint4 bytes;
    uint32_t d;
  };
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    return {scale_words<M>(w, row), M::template load<uint32_t>(w.d + row * 4)};
  }
  // A byte below 64 as a half, twice, by putting it into the fraction of 1024.
  static __device__ __forceinline__ f16x2 of_byte(uint32_t word, int i) {
    return fma_f16x2(__byte_perm(word, 0x64646464u, 0x4040u + i * 0x101u), 0x3c003c00u, 0xe400e400u);
  }
  static __device__ __forceinline__ f16x2 scale_twice(const Scales& s, int j) {
    return of_byte(j < 4 ? s.bytes.x : s.bytes.y, j % 4);
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) {
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.d)), f16_to_f32(static_cast<f16>(scale_twice(s, j))));
  }
  static __device__ __forceinline__ float minimum(const Scales& s, int j) {
    f16x2 m = of_byte(j < 4 ? s.bytes.z : s.bytes.w, j % 4);
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.d >> 16)), f16_to_f32(static_cast<f16>(m)));
  }
  static __device__ __forceinline__ void scaled_operands(const typename Bits::Words& words, const Scales (&s)[2], int j,
                                                         MmaA (&a)[2]) {
    Bits::pairs(words, 0, 0, a);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      // Of two blocks at once. Codes below 32 times integers below 64 are below 2048: exact. 1024 of a code's units are 2^-14,
      // the smallest normal half.
      f16x2 two = add_f16x2(two_bytes(j < 4 ? s[row].bytes.x : s[row].bytes.y, j % 4 / 2), OF_1024 | NEGATIVE);
      f16x2 scale = twice(times(two, OF_1024), j % 2), sixteenth = twice(times(two, OF_64), j % 2);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        a[half].x[row] = times(a[half].x[row], scale);
        a[half].x[2 + row] = times(a[half].x[2 + row], sixteenth);
      }
    }
  }
  static __device__ __forceinline__ float whole(const Scales& s) {
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.d)), 0x1p14f);
  }
  static __device__ __forceinline__ void minimum_operand(const Scales& s, int c, f16x2 (&m)[2]) {
    m[0] = of_byte(s.bytes.z, c), m[1] = of_byte(s.bytes.w, c);
  }
  static __device__ __forceinline__ float minimum_whole(const Scales& s) {
    return __fmul_rn(f16_to_f32(static_cast<f16>(s.d >> 16)), -32.0f);
  }
  static __device__ __forceinline__ void second_half(Scales& s) { s.bytes.x = s.bytes.y; }
};

struct Q4_0 : InOnes<FourBits, 8>, EightD {};
struct Q4_1 : InOnes<FourBits, 0>, EightDM {};
struct Q5_0 : InOnes<FiveBits, 16>, EightD {};
struct Q5_1 : InOnes<FiveBits, 0>, EightDM {};
struct Q4_K : SixBitScales<FourBits> {};
struct Q5_K : SixBitScales<FiveBits> {};

struct Q8_0 : EightD {
  static constexpr bool SPLIT = false;
  static constexpr int LOW = 16, HIGH = 0;
  using Words = uint4;  // row r: columns of the first and of the second mma; then the same for row r + 8
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return M::template load<uint4>(at.low + j * 512);
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    uint32_t of[4] = {words.x, words.z, words.y, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t codes = of[i] ^ 0x80808080u;  // 128 added, then 1024; 1152 subtracted
      a[i / 2].x[i % 2] = add_f16x2(two_bytes(codes, 0), 0xe480e480u);
      a[i / 2].x[2 + i % 2] = add_f16x2(two_bytes(codes, 1), 0xe480e480u);
    }
  }
};

struct Q6_K : InOnes<SixBits, 32> {
  static constexpr bool HAS_MINIMUM = false, SCALED = false, WHOLE = true;
  static constexpr int SCALE_BYTES = 16, D_BYTES = 2;
  struct Scales {
    uint4 factors;  // sixteen signed bytes
    f16 d;
  };
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    return {scale_words<M>(w, row), M::template load<f16>(w.d + row * 2)};
  }
  // Two factors together become halves, without the conversion instruction for integers, which is slow.
  static __device__ __forceinline__ float factor(const Scales& s, int j, int half) {
    uint32_t word = j < 2 ? s.factors.x : j < 4 ? s.factors.y : j < 6 ? s.factors.z : s.factors.w;
    f16x2 two = add_f16x2(two_bytes(word ^ 0x80808080u, j % 2), 0xe480e480u);  // 128 added, 1152 subtracted
    return f16_to_f32(static_cast<f16>(half ? two >> 16 : two));
  }
  static __device__ __forceinline__ float whole(const Scales& s) { return f16_to_f32(s.d); }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int half) {
    return __fmul_rn(f16_to_f32(s.d), factor(s, j, half));
  }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
  static __device__ __forceinline__ void second_half(Scales& s) { s.factors.x = s.factors.z, s.factors.y = s.factors.w; }
};

// E2M1 codes: sign, two bits of exponent, one of mantissa. In a half's upper byte (bits 7 and 3-1) they are 2^-14 times the
// value. ggml doubles the values and halves the scale, which gives the same product. Scales are below 2^(241 - 127)
// (layout.py).
struct MXFP4 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false, SCALED = false, WHOLE = false;
  static constexpr int LOW = 8, HIGH = 0, SCALE_BYTES = 8, D_BYTES = 0;
  using Words = uint2;
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return nibble_words<M>(at, j);
  }
  // Columns 0-3 of a row have one byte each (sign in bit 7, the rest in bits 1-3); columns 4-7 use the bits between.
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      uint32_t x = row ? words.y : words.x;
      uint32_t first = x & 0x8e8e8e8eu, second = select_or(x << 7, 0x80808080u, x >> 3 & 0x0e0e0e0eu);
      a[0].x[row] = __byte_perm(first, 0, 0x1404), a[0].x[2 + row] = __byte_perm(first, 0, 0x3424);
      a[1].x[row] = __byte_perm(second, 0, 0x1404), a[1].x[2 + row] = __byte_perm(second, 0, 0x3424);
    }
  }
  using Scales = uint2;
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    return M::template load<uint2>(w.scales + row * 8);
  }
  static __device__ __forceinline__ float factor(const Scales& s, int j, int) {
    uint32_t word = (j < 4 ? s.x : s.y) + 0x0e0e0e0eu;  // times 2^14: none of the bytes reaches 255
    return __uint_as_float((j % 4 == 3 ? word >> 1 : word << (23 - 8 * (j % 4))) & 0x7f800000u);
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) { return factor(s, j, 0); }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
  static __device__ __forceinline__ void second_half(Scales& s) { s.x = s.y; }
};

struct F16 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false, SCALED = true, WHOLE = false;
  static constexpr int LOW = 32, HIGH = 0, SCALE_BYTES = 0, D_BYTES = 0;
  struct Words {
    uint4 row[2];
  };
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    const uint8_t* words = at.low + j * 1024;
    return {{M::template load<uint4>(words), M::template load<uint4>(words + 16)}};
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const uint4& four = words.row[row];
      a[0].x[row] = four.x, a[0].x[2 + row] = four.y, a[1].x[row] = four.z, a[1].x[2 + row] = four.w;
    }
  }
  struct Scales {};
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes&, int) { return {}; }
  static __device__ __forceinline__ void scaled_operands(const Words& words, const Scales (&)[2], int, MmaA (&a)[2]) {
    operands(words, a);
  }
  static __device__ __forceinline__ float scale(const Scales&, int, int) { return 1.0f; }
  static __device__ __forceinline__ float minimum(const Scales&, int) { return 0.0f; }
  static __device__ __forceinline__ void second_half(Scales&) {}
};

// Calls `call` with an object of the struct of a type, given ggml's number of it.
template <class Call>
__device__ __forceinline__ void for_type(int type, const Call& call) {
  switch (type) {
    case 1: return call(F16{});
    case 2: return call(Q4_0{});
    case 3: return call(Q4_1{});
    case 6: return call(Q5_0{});
    case 7: return call(Q5_1{});
    case 8: return call(Q8_0{});
    case 12: return call(Q4_K{});
    case 13: return call(Q5_K{});
    case 14: return call(Q6_K{});
    case 39: return call(MXFP4{});
  }
}
