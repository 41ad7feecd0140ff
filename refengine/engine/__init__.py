"""What happens around the forward pass: sampling, stop strings, sequences and the step that joins them.

Knows nothing of HTTP, command lines or other engines.
"""
