"""The worker serves one model on one device over HTTP. `serve` in server.py runs it from start to exit."""
