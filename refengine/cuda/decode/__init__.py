"""The decode step: one token for each of several sequences, on buffers at fixed addresses."""
