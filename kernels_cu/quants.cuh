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
//                                            integer of block j, so that sums need no scale before the segment's end
//   factor(scales, j, half)                  otherwise: the factor of the products of a block (SPLIT: of half a block)
//   second_half(scales)                      moves the scales of blocks 4 to 7 to the place of those of blocks 0 to 3
//   whole(scales)                            WHOLE: the factor of the segment's sum
//   minimum_operand(scales, c, m)            HAS_MINIMUM: the minimums' small integers of blocks c and c + 4, twice each
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

// Codes as halves, without conversion instructions: the code is put into the fraction of 1024, where the last bit counts
// one, or four bits higher into that of 64; then 1024 (or 64) and the type's offset are subtracted. All of it is exact.
struct Integers {
  f16x2 one, less, less_64;  // for both halves: s, -(1024 + offset) s, -(64 + offset) s
  // The codes in bits 0-3 (with `more`, up to 0-5) of both halves of a word.
  __device__ __forceinline__ f16x2 low(uint32_t word, uint32_t more = 0) const {
    return fma_f16x2(select_or(word, 0x000f000fu, 0x64006400u) | more, one, less);
  }
  // The codes in bits 4-7 (with `more`, up to 4-9).
  __device__ __forceinline__ f16x2 high(uint32_t word, uint32_t more = 0) const {
    return fma_f16x2(select_or(word, 0x00f000f0u, 0x54005400u) | more, one, less_64);
  }
};
// Codes minus an offset of 0, 8, 16 or 32.
template <int OFFSET>
__device__ __forceinline__ Integers integers() {
  return {0x3c003c00u, (0xe400u + OFFSET) * 0x10001u, (0xd400u + OFFSET * 16) * 0x10001u};
}
// Codes below 32 times an integer up to 63, given twice: below 2048, so every intermediate value is exact in half precision.
__device__ __forceinline__ Integers integers_times(f16x2 s) {
  return {s, fma_f16x2(s, 0xe400e400u, 0u), fma_f16x2(s, 0xd400d400u, 0u)};
}
// One half of a pair, twice.
__device__ __forceinline__ f16x2 twice(f16x2 pair, int half) { return __byte_perm(pair, 0, half ? 0x3232 : 0x1010); }

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

// The i-th pair of columns of rows r and r + 8 goes to a[i / 2].x[2 * (i % 2)] and the element after it.
template <int OFFSET>
struct FourBits {
  static constexpr bool SPLIT = false;
  static constexpr int LOW = 8, HIGH = 0;
  using Words = uint2;
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return nibble_words<M>(at, j);
  }
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    codes(words, integers<OFFSET>(), integers<OFFSET>(), a);
  }
  static __device__ __forceinline__ void codes(const Words& words, const Integers& first, const Integers& second,
                                               MmaA (&a)[2]) {
    a[0] = {{first.low(words.x), second.low(words.y), first.high(words.x), second.high(words.y)}};
    a[1] = {{first.low(words.x >> 8), second.low(words.y >> 8), first.high(words.x >> 8), second.high(words.y >> 8)}};
  }
};

// The fifth bits of a lane: two bytes, moved to bits 4-11 and 20-27. There, bits 4 and 20 belong to the pair in a word's
// bits 0-3, bits 8 and 24 to that in its bits 4-7; shifted by one, the pairs of the word shifted by eight; by two and
// three, those of row r + 8.
template <int OFFSET>
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
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    codes(words, integers<OFFSET>(), integers<OFFSET>(), a);
  }
  static __device__ __forceinline__ void codes(const Words& words, const Integers& first, const Integers& second,
                                               MmaA (&a)[2]) {
    uint32_t x = words.low.x, y = words.low.y, h = __byte_perm(words.high, 0, 0x4140) << 4;
    a[0] = {{first.low(x, h & 0x00100010u), second.low(y, h >> 2 & 0x00100010u), first.high(x, h & 0x01000100u),
             second.high(y, h >> 2 & 0x01000100u)}};
    a[1] = {{first.low(x >> 8, h >> 1 & 0x00100010u), second.low(y >> 8, h >> 3 & 0x00100010u),
             first.high(x >> 8, h >> 1 & 0x01000100u), second.high(y >> 8, h >> 3 & 0x01000100u)}};
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
  static constexpr bool HAS_MINIMUM = true, SCALED = false, WHOLE = false;
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
  static __device__ __forceinline__ void minimum_operand(const Scales& s, int c, f16x2 (&m)[2]) {
    m[0] = twice(c / 2 ? s.m.y : s.m.x, c % 2);
    m[1] = twice(c / 2 ? s.m.w : s.m.z, c % 2);
  }
  static __device__ __forceinline__ float minimum_whole(const Scales&) { return 1.0f; }
  static __device__ __forceinline__ void second_half(Scales& s) { s.d.x = s.d.z, s.d.y = s.d.w; }
};

// Eight scales and eight minimums of six bits, one byte each; d and dmin.
template <class Codes>
struct SixBits : Codes {
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
  static __device__ __forceinline__ float whole(const Scales& s) { return f16_to_f32(static_cast<f16>(s.d)); }
  static __device__ __forceinline__ float minimum_whole(const Scales& s) {
    return -f16_to_f32(static_cast<f16>(s.d >> 16));
  }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int) {
    return __fmul_rn(whole(s), f16_to_f32(static_cast<f16>(scale_twice(s, j))));
  }
  static __device__ __forceinline__ float minimum(const Scales& s, int j) {
    f16x2 m = of_byte(j < 4 ? s.bytes.z : s.bytes.w, j % 4);
    return __fmul_rn(-minimum_whole(s), f16_to_f32(static_cast<f16>(m)));
  }
  static __device__ __forceinline__ void minimum_operand(const Scales& s, int c, f16x2 (&m)[2]) {
    m[0] = of_byte(s.bytes.z, c);
    m[1] = of_byte(s.bytes.w, c);
  }
  static __device__ __forceinline__ void scaled_operands(const typename Codes::Words& words, const Scales (&s)[2], int j,
                                                         MmaA (&a)[2]) {
    Codes::codes(words, integers_times(scale_twice(s[0], j)), integers_times(scale_twice(s[1], j)), a);
  }
  static __device__ __forceinline__ void second_half(Scales& s) { s.bytes.x = s.bytes.y; }
};

struct Q4_0 : FourBits<8>, EightD {};
struct Q4_1 : FourBits<0>, EightDM {};
struct Q5_0 : FiveBits<16>, EightD {};
struct Q5_1 : FiveBits<0>, EightDM {};
struct Q4_K : SixBits<FourBits<0>> {};
struct Q5_K : SixBits<FiveBits<0>> {};

struct Q8_0 : EightD {
  static constexpr bool SPLIT = false;
  static constexpr int LOW = 16, HIGH = 0;
  using Words = uint4;  // row r: columns of the first and of the second mma; then the same for row r + 8
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return M::template load<uint4>(at.low + j * 512);
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
  static constexpr bool SPLIT = true, HAS_MINIMUM = false, SCALED = false, WHOLE = true;
  static constexpr int LOW = 8, HIGH = 4, SCALE_BYTES = 16, D_BYTES = 2;
  struct Words {
    uint2 low;
    uint32_t high;
  };
  template <class M>
  static __device__ __forceinline__ Words load(const Lanes& at, int j) {
    return {nibble_words<M>(at, j), M::template load<uint32_t>(at.high + j * 128)};
  }
  // As FiveBits, with two bits each: bits 4-5, 8-9, 20-21, 24-25, those two higher, and both again eight bits higher
  // (around the end of the word) for row r + 8.
  static __device__ __forceinline__ void operands(const Words& words, MmaA (&a)[2]) {
    const Integers n = integers<32>();
    uint32_t x = words.low.x, y = words.low.y, h = words.high, g = h >> 8 | h << 24;
    a[0] = {{n.low(x, h & 0x00300030u), n.low(y, g & 0x00300030u), n.high(x, h & 0x03000300u),
             n.high(y, g & 0x03000300u)}};
    a[1] = {{n.low(x >> 8, h >> 2 & 0x00300030u), n.low(y >> 8, g >> 2 & 0x00300030u),
             n.high(x >> 8, h >> 2 & 0x03000300u), n.high(y >> 8, g >> 2 & 0x03000300u)}};
  }
  struct Scales {
    uint4 factors;  // sixteen signed bytes
    f16 d;
  };
  template <class M>
  static __device__ __forceinline__ Scales scales(const Planes& w, int row) {
    return {scale_words<M>(w, row), M::template load<f16>(w.d + row * 2)};
  }
  // A byte in the fraction of 2^23 counts ones: exact, and without the conversion instruction, which is slow.
  static __device__ __forceinline__ float factor(const Scales& s, int j, int half) {
    uint32_t word = j < 2 ? s.factors.x : j < 4 ? s.factors.y : j < 6 ? s.factors.z : s.factors.w;
    word ^= 0x80808080u;  // 128 added
    return __fadd_rn(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + j % 2 * 2 + half)), -8388736.0f);
  }
  static __device__ __forceinline__ float whole(const Scales& s) { return f16_to_f32(s.d); }
  static __device__ __forceinline__ float scale(const Scales& s, int j, int half) {
    return __fmul_rn(whole(s), factor(s, j, half));
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
