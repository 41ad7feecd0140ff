// Arguments of kernels that belong together, passed by value. Their members are pointers, which
// refengine/cuda/runtime/source.py reads from here: a launch gives an array, or null, for each.

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

// Which rows go to which experts, from group_experts (moe.cu); all null: row i goes to row i.
// group (n_groups, 3): expert, first slot, number of slots; slot s takes row x_rows[s] and gives row y_rows[s].
struct Groups {
  const int* group;
  const int* x_rows;
  const int* y_rows;
};
