"""Benchmarks. `suite` and `load` measure a worker over HTTP, as its clients see it; `speed` measures the engine."""
