"""The kernels' bindings: one module for each file of `kernels_cu/`, with the same name, and `shapes` for all of them.

A function launches one operation. It takes the launcher (`cuda.runtime.launch.Kernels`), the inputs, and the outputs it
is to write; it knows the grid, the block, the shared memory and the preconditions, and allocates nothing. `cuda.ops`
hands in outputs from a pool, `cuda.decode` outputs that never move.

Where `overlap` is an argument, True lets the kernel begin before the one in front of it has ended (`runtime.overlap`).
"""
