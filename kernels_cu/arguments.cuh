// Structs of kernel arguments that belong together, passed by value. Their members are pointers, or all are ints.
// refengine/cuda/runtime/source.py reads the structs from the text; a launch gives an array or null, or a number, for each member.

// The plan of a kernel: if PLAN is defined, these numbers, so that the compiler leaves out whatever they make needless; otherwise
// those of the launch, for a kernel that is right for all of them. A file that has plans has a struct Plan.
#ifdef PLAN
constexpr bool IS_PLANNED = true;
#define PLAN_OF(launch) constexpr Plan plan{PLAN}
#else
constexpr bool IS_PLANNED = false;
#define PLAN_OF(launch) const Plan& plan = launch
#endif

// Rows of activations for products. x, sums and scale: in the form that products read, see quantize_rows.cu. If they are
// null, a kernel makes this form from the rows of floats; after an RMS norm with the weights `norm`, unless they are null,
// for which it takes the sums of squares of every 16 columns from `squares` (norm.cuh).
struct Activations {
  const unsigned char* x;
  const int* sums;
  const float* scale;
  const float* floats;
  const float* squares;
  const float* norm;
};

// K or V of one layer in the cache, for kernels that read it. values (n_blocks, n_head_kv, block_size, head_dim): each row
// divided by a power of two; exponents (n_blocks, n_head_kv, block_size): that power's exponent + 127. So the positions of a
// head in a block are adjacent.
struct CachedRows {
  const f16* values;
  const unsigned char* exponents;
};

// The same for kernels that write it.
struct NewRows {
  f16* values;
  unsigned char* exponents;
};

// The row of a head in the cache, at an offset in a block.
__device__ __forceinline__ long long cached_row(int block, int n_head_kv, int head, int block_size, int offset) {
  return (static_cast<long long>(block) * n_head_kv + head) * block_size + offset;
}

// The addresses of Q, K and V of the first row; there is one new token per row.
struct Projections {
  const float* q;
  const float* k;
  const float* v;
};

// Which rows use which expert, from group_experts (moe.cu). If all members are null, output row i is made from row i.
// group (n_groups, 3): expert, first slot, number of slots. Slot s reads row x_rows[s] and writes row y_rows[s].
struct Groups {
  const int* group;
  const int* x_rows;
  const int* y_rows;
};
