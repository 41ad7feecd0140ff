"""Everything around the forward pass: sampling, stop strings, sequences, scheduling, and the step that batches them.

Independent of HTTP, the command line and other engines.
"""
