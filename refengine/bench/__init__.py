"""Throughput and latency measurements. Numbers are reported, never asserted."""
