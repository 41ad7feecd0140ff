"""The decode step: one token for each of several sequences, on buffers that never move."""
