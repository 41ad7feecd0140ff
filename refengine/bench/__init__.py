"""Benchmarks of the worker over HTTP, from its clients' point of view. `suite` and `load` are the two runs."""
