// Weights that are numbers: float32, or bfloat16 as its bits.
__device__ __forceinline__ float value_of(float w) { return w; }
__device__ __forceinline__ float value_of(uint16_t w) { return __uint_as_float(static_cast<uint32_t>(w) << 16); }
