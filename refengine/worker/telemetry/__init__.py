"""Telemetry of a worker: log, metrics, status, uncaught errors."""
