"""Benchmarks of the worker, over HTTP and from outside, as its clients see it. `suite` and `load` are the two runs."""
