"""The kernels' bindings: one module for each file of `kernels_cu/`, with the same name, and `shapes` for all of them.

A function launches one operation. Its arguments are the launcher (`cuda.runtime.launch.Kernels`), the inputs, and the
output arrays. It determines the grid, the block and the shared memory, checks the preconditions, and allocates nothing.
`cuda.ops` passes outputs from a pool, `cuda.decode` outputs at fixed addresses.

If a function has the argument `overlap`, True lets the kernel begin before the previous one has ended
(`runtime.driver`). "Overlaps" in a docstring means that its launch always does so.
"""
