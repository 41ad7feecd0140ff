"""Kernel sources, compilation, loading and launching: on a GPU through NVRTC and CuPy, on the CPU through g++."""
