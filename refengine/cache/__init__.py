"""The paged KV cache and the prefix cache: block tables, reference counts, hashing. No attention arithmetic."""
