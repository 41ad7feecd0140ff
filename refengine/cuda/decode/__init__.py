"""A model's `decode()` on kernels: steps of one token for each of several sequences, and passes over prompts.

Buffers are at fixed addresses.
"""
