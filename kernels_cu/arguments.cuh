// Arguments of kernels that belong together, passed by value. Their members are pointers. refengine/cuda/runtime/source.py
// reads them from here, and a launch gives an array, or null, for each.

// A matrix as it lies on the device (refengine/cuda/layout.py): codes, further bits of codes, scales, scales of scales.
struct Matrix {
  const unsigned char* low;
  const unsigned char* high;
  const unsigned char* scales;
  const unsigned char* d;
};

// Rows of activations as products take them: see quantize_rows.cu.
struct Activations {
  const f16* x;
  const unsigned* sums;
  const float* scale;
};

// K or V of a layer in the cache, for kernels that read it. values (n_slots, n_head_kv, head_dim): each row times a power of
// two; exponents (n_slots, n_head_kv): that power's exponent + 127.
struct CachedRows {
  const f16* values;
  const unsigned char* exponents;
};

// The same for kernels that write it.
struct NewRows {
  f16* values;
  unsigned char* exponents;
};

// Where Q, K and V of one new token for each of several rows begin.
struct Projections {
  const float* q;
  const float* k;
  const float* v;
};

// Which rows go to which experts, from group_experts (moe.cu). Where all are null, row i goes to row i.
// group (n_groups, 3): expert, first slot, number of slots; slot s takes row x_rows[s] and gives row y_rows[s].
struct Groups {
  const int* group;
  const int* x_rows;
  const int* y_rows;
};
