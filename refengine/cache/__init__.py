"""The paged KV cache and the prefix cache: block tables, reference counts, hashing. Nothing of attention arithmetic."""
