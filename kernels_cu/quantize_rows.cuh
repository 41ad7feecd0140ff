// Converts rows of activations to the form that products read. Shared by quantize_rows.cu, norm.cu, one_row.cu and few_rows.cu.
//
// A warp converts a segment, 256 columns of a row. The segment has a power of two of its own.

constexpr int SEGMENT_COLUMNS = 256;
constexpr int ROW_BYTES = 2 * SEGMENT_COLUMNS, ROW_SUMS = SEGMENT_COLUMNS / 16;  // of a segment of a converted row

__device__ __forceinline__ int segments_of(int n_in) { return (n_in + SEGMENT_COLUMNS - 1) / SEGMENT_COLUMNS; }

// A lane's eight columns of a block of 32: 4c … 4c + 3 and 16 + 4c … 16 + 4c + 3, for lane 4r + c. Block r of eight.
struct EightColumns {
  float x[8];
};
// The lane's columns of a segment; zeros after the row's end.
__device__ __forceinline__ EightColumns columns_of_row(const float* row, int segment, int n_in) {
  int block = segment * SEGMENT_COLUMNS / 32 + static_cast<int>(threadIdx.x) % 32 / 4;
  if (block * 32 >= n_in) return {};
  const float4* from = reinterpret_cast<const float4*>(row + block * 32) + threadIdx.x % 4;
  float4 a = from[0], b = from[4];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

// The converted form of a lane's columns; in lane c = 0 of four, the sum of the integers in the first halves of the block,
// in c = 1 that of the second halves; and the segment's power of two, NaN if the segment has NaN or infinity.
struct Converted {
  uint4 words;
  int sum;
  float scale;
};

// The largest magnitudes of N segments.
template <int N>
__device__ __forceinline__ void tops_of_segments(const EightColumns (&x)[N], unsigned (&top)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    top[n] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) top[n] = max(top[n], magnitude(x[n].x[i]));
  }
#pragma unroll
  for (int n = 0; n < N; n++) top[n] = __reduce_max_sync(ALL_LANES, top[n]);
}

// As integers q = 256 h + l of signed bytes, with the lane's words h, h, l, l. N segments, each step of all of them side by side.
template <int N>
__device__ __forceinline__ void as_integers(const EightColumns (&x)[N], Converted (&to)[N]) {
  constexpr float TO_INTEGER = 12582912.0f + 128.0f;  // in the fraction of 3 · 2^22, the last bit counts one
  unsigned top[N];
  tops_of_segments(x, top);
  int sums[N][2];  // of the halves
#pragma unroll
  for (int n = 0; n < N; n++) {
    // The least e for which no q is above 127 · 256 + 127, after rounding: 0x7eff00 is the fraction of 32639.5.
    int e = max(static_cast<int>((top[n] + (0x800000u - 0x7eff00u)) >> 23) - 127 - 14, -126);
    float inverse = power_of_two(-e);
    uint32_t of[8];  // q + 128: the bytes h and l + 128
#pragma unroll
    for (int i = 0; i < 8; i++) of[i] = __float_as_uint(__fmaf_rn(x[n].x[i], inverse, TO_INTEGER));
    uint32_t words[2][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t* q = of + 4 * half;
      uint32_t first = __byte_perm(q[0], q[1], 0x5140), second = __byte_perm(q[2], q[3], 0x5140);  // l, l, h, h
      words[0][half] = __byte_perm(first, second, 0x7632), words[1][half] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
      int high = __dp4a(static_cast<int>(words[0][half]), 0x01010101, 0);
      sums[n][half] = __dp4a(static_cast<int>(words[1][half]), 0x01010101, high * 256);
    }
    to[n].words = make_uint4(words[0][0], words[0][1], words[1][0], words[1][1]);
    to[n].scale = top[n] < 0x7f800000u ? power_of_two(e) : __uint_as_float(0x7fc00000u);
  }
  // Lanes of even c add up first halves, those of odd c second halves.
  int odd = threadIdx.x % 2;
#pragma unroll
  for (int n = 0; n < N; n++)
    to[n].sum = (odd ? sums[n][1] : sums[n][0]) + __shfl_xor_sync(ALL_LANES, odd ? sums[n][0] : sums[n][1], 1);
#pragma unroll
  for (int n = 0; n < N; n++) to[n].sum += __shfl_xor_sync(ALL_LANES, to[n].sum, 2);
}

// As halves, for half-precision weights. NaN and infinity are copied.
template <int N>
__device__ __forceinline__ void as_halves(const EightColumns (&x)[N], Converted (&to)[N]) {
  unsigned top[N];
  tops_of_segments(x, top);
#pragma unroll
  for (int n = 0; n < N; n++) {
    int e = row_exponent(__uint_as_float(top[n]));
    auto pair = [&](int i) { return f32_to_f16x2(times_power(x[n].x[i], e), times_power(x[n].x[i + 1], e)); };
    to[n] = {make_uint4(pair(0), pair(2), pair(4), pair(6)), 0, power_of_two(e)};
  }
}

template <int N>
__device__ __forceinline__ void convert(const EightColumns (&x)[N], bool halves, Converted (&to)[N]) {
  if (halves)
    as_halves(x, to);
  else
    as_integers(x, to);
}

// Writes a segment with one warp. to, sums and scale: the segment's places.
__device__ __forceinline__ void put_segment(const Converted& segment, uint8_t* to, int* sums, float* scale) {
  int lane = threadIdx.x % 32;
  reinterpret_cast<uint4*>(to)[lane] = segment.words;
  if (lane % 4 < 2) sums[lane / 4 * 2 + lane % 4] = segment.sum;
  if (lane == 0) *scale = segment.scale;
}

// Writes row `out_row` from n_in floats with all threads of a block, segment after segment from number `first` on.
__device__ __forceinline__ void convert_row(const float* row, int out_row, bool halves, unsigned char* out, float* scale, int* sums,
                                            int n_in, int first, int step) {
  int n_segments = segments_of(n_in);
#pragma unroll 1
  for (int segment = first; segment < n_segments; segment += step) {
    long long at = static_cast<long long>(out_row) * n_segments + segment;
    EightColumns columns[] = {columns_of_row(row, segment, n_in)};
    Converted converted[1];
    convert(columns, halves, converted);
    put_segment(converted[0], out + at * ROW_BYTES, sums + at * ROW_SUMS, scale + at);
  }
}
