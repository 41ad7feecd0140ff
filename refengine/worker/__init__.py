"""The worker: one model on one device, over HTTP. `serve` in life.py runs it from start to exit."""
