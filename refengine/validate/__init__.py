"""Compares refengine with other engines, and finds the operation that is wrong."""
