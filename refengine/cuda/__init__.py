"""Raw CUDA kernels: sources, compilation, launches. `kernels_cu/` holds the CUDA C."""
