"""Reads GGUF files: bytes, metadata, the tensor index, split files."""
