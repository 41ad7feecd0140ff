// Quantised weights as a warp takes them: integers, exact in half precision, and the scales that belong to them.
//
// Planes and lanes are those of refengine/cuda/layout.py. For every type there is a struct of one shape:
//
//   a(planes, place, lane, a)                 the two mma operands of a tile of 16 x 32: codes as halves
//   scale(planes, tile, block, row, half)     what the products of 32 columns are multiplied by; SPLIT: of 16 (`half`)
//   minimum(planes, tile, block, row)         what is subtracted for each 1 of the activations, where HAS_MINIMUM
//
// place = tile * n_blocks + block, with blocks of 32 columns; row is 0 to 15 in the tile.

struct Planes {
  const uint8_t *low, *high, *d, *m, *scales;
  int n_blocks;  // of 32 columns
};

constexpr f16x2 ONES = 0x3c003c00u;

// Codes 0 … 63 above 1024, where halves are integers, less `offset`: exact.
__device__ __forceinline__ f16x2 integers(uint32_t codes, f16x2 minus_1024_and_offset) {
  return fma_f16x2(codes | 0x64006400u, ONES, minus_1024_and_offset);
}
constexpr f16x2 MINUS_1024 = 0xe400e400u, MINUS_1032 = 0xe408e408u, MINUS_1040 = 0xe410e410u, MINUS_1056 = 0xe420e420u,
                MINUS_1152 = 0xe480e480u;

// Operand a[i / 2].x[2 * (i % 2) + row] has the i-th pair of columns of row r + 8 · row.
template <f16x2 OFFSET>
__device__ __forceinline__ void four_bits(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
  uint2 words = load_constant<uint2>(w.low + place * 256 + lane * 8);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[i / 2].x[2 * (i % 2)] = integers(words.x >> 4 * i & 0x000f000fu, OFFSET);
    a[i / 2].x[2 * (i % 2) + 1] = integers(words.y >> 4 * i & 0x000f000fu, OFFSET);
  }
}

// Bit n of a byte belongs to nibble n: columns pair i has bits i and 4 + i.
template <f16x2 OFFSET>
__device__ __forceinline__ void five_bits(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
  uint2 words = load_constant<uint2>(w.low + place * 256 + lane * 8);
  uint32_t fifth = load_constant<uint16_t>(w.high + place * 64 + lane * 2);
  uint32_t x = (fifth & 0x0fu) | (fifth & 0xf0u) << 12, y = (fifth >> 8 & 0x0fu) | (fifth >> 8 & 0xf0u) << 12;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[i / 2].x[2 * (i % 2)] = integers((words.x >> 4 * i & 0x000f000fu) | (x >> i & 0x00010001u) << 4, OFFSET);
    a[i / 2].x[2 * (i % 2) + 1] = integers((words.y >> 4 * i & 0x000f000fu) | (y >> i & 0x00010001u) << 4, OFFSET);
  }
}

// One half-precision number of each row for every block.
__device__ __forceinline__ float row_f16(const uint8_t* plane, long long block, int row) {
  return f16_to_f32(load_constant<f16>(plane + (block * 16 + row) * 2));
}

struct Q4_0 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false;
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    four_bits<MINUS_1032>(w, place, lane, a);
  }
  static __device__ __forceinline__ float scale(const Planes& w, long long tile, int block, int row, int) {
    return row_f16(w.d, tile * w.n_blocks + block, row);
  }
  static __device__ __forceinline__ float minimum(const Planes&, long long, int, int) { return 0.0f; }
};

struct Q4_1 : Q4_0 {
  static constexpr bool HAS_MINIMUM = true;
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    four_bits<MINUS_1024>(w, place, lane, a);
  }
  static __device__ __forceinline__ float minimum(const Planes& w, long long tile, int block, int row) {
    return -row_f16(w.m, tile * w.n_blocks + block, row);
  }
};

struct Q5_0 : Q4_0 {
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    five_bits<MINUS_1040>(w, place, lane, a);
  }
};

struct Q5_1 : Q4_1 {
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    five_bits<MINUS_1024>(w, place, lane, a);
  }
};

struct Q8_0 : Q4_0 {
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    uint4 words = load_constant<uint4>(w.low + place * 512 + lane * 16);
    uint32_t codes[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {  // row i / 2, half i % 2: four columns
      uint32_t biased = codes[i] ^ 0x80808080u;
      a[i % 2].x[i / 2] = fma_f16x2(__byte_perm(biased, 0x64646464u, 0x4140), ONES, MINUS_1152);
      a[i % 2].x[2 + i / 2] = fma_f16x2(__byte_perm(biased, 0x64646464u, 0x4342), ONES, MINUS_1152);
    }
  }
};

struct Q4_K {
  static constexpr bool SPLIT = false, HAS_MINIMUM = true;
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    four_bits<MINUS_1024>(w, place, lane, a);
  }
  static __device__ __forceinline__ float scale(const Planes& w, long long tile, int block, int row, int) {
    long long super = tile * (w.n_blocks / 8) + block / 8;
    const uint8_t* words = w.scales + (super * 16 + row) * 12;
    int j = block % 8;
    uint32_t low = load_constant<uint32_t>(words) >> 4 * j & 15, top = load_constant<uint32_t>(words + 8) >> 2 * j & 3;
    return row_f16(w.d, super, row) * static_cast<float>(low | top << 4);
  }
  static __device__ __forceinline__ float minimum(const Planes& w, long long tile, int block, int row) {
    long long super = tile * (w.n_blocks / 8) + block / 8;
    const uint8_t* words = w.scales + (super * 16 + row) * 12;
    int j = block % 8;
    uint32_t low = load_constant<uint32_t>(words + 4) >> 4 * j & 15;
    uint32_t top = load_constant<uint32_t>(words + 8) >> (16 + 2 * j) & 3;
    return row_f16(w.m, super, row) * static_cast<float>(low | top << 4);
  }
};

struct Q5_K : Q4_K {
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    five_bits<MINUS_1024>(w, place, lane, a);
  }
};

struct Q6_K {
  static constexpr bool SPLIT = true, HAS_MINIMUM = false;
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    uint2 words = load_constant<uint2>(w.low + place * 256 + lane * 8);
    uint32_t high = load_constant<uint32_t>(w.high + place * 128 + lane * 4);
    uint32_t x = (high & 0xffu) | (high & 0xff00u) << 8, y = (high >> 16 & 0xffu) | (high >> 16 & 0xff00u) << 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t x_top = (x >> 2 * i & 0x00030003u) << 4, y_top = (y >> 2 * i & 0x00030003u) << 4;
      a[i / 2].x[2 * (i % 2)] = integers((words.x >> 4 * i & 0x000f000fu) | x_top, MINUS_1056);
      a[i / 2].x[2 * (i % 2) + 1] = integers((words.y >> 4 * i & 0x000f000fu) | y_top, MINUS_1056);
    }
  }
  static __device__ __forceinline__ float scale(const Planes& w, long long tile, int block, int row, int half) {
    long long super = tile * (w.n_blocks / 8) + block / 8;
    int8_t factor = load_constant<int8_t>(w.scales + (super * 16 + row) * 16 + block % 8 * 2 + half);
    return row_f16(w.d, super, row) * static_cast<float>(factor);
  }
  static __device__ __forceinline__ float minimum(const Planes&, long long, int, int) { return 0.0f; }
};

// E2M1 codes: sign, two bits of exponent, one of mantissa. Put at those places of a half, they are 2^-14 times the
// value; times 2^15 they are ggml's doubled integers, whose scale is halved.
struct MXFP4 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false;
  static __device__ __forceinline__ f16x2 values(uint32_t codes) {
    // The code for -0 is +0 in ggml: adding +0 makes it so.
    return fma_f16x2((codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9, 0x78007800u, 0u);
  }
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    uint2 words = load_constant<uint2>(w.low + place * 256 + lane * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i / 2].x[2 * (i % 2)] = values(words.x >> 4 * i);
      a[i / 2].x[2 * (i % 2) + 1] = values(words.y >> 4 * i);
    }
  }
  static __device__ __forceinline__ float scale(const Planes& w, long long tile, int block, int row, int) {
    uint32_t e = load_constant<uint8_t>(w.d + (tile * w.n_blocks + block) * 16 + row);
    return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);  // half of 2^(e - 127)
  }
  static __device__ __forceinline__ float minimum(const Planes&, long long, int, int) { return 0.0f; }
};

struct F16 {
  static constexpr bool SPLIT = false, HAS_MINIMUM = false;
  static __device__ __forceinline__ void a(const Planes& w, long long place, int lane, MmaA (&a)[2]) {
    const uint8_t* words = w.low + place * 1024 + lane * 32;
#pragma unroll
    for (int row = 0; row < 2; row++) {
      uint4 four = load_constant<uint4>(words + 16 * row);
      a[0].x[row] = four.x, a[0].x[2 + row] = four.y, a[1].x[row] = four.z, a[1].x[2 + row] = four.w;
    }
  }
  static __device__ __forceinline__ float scale(const Planes&, long long, int, int, int) { return 1.0f; }
  static __device__ __forceinline__ float minimum(const Planes&, long long, int, int) { return 0.0f; }
};
