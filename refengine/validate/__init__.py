"""Comparing refengine with other engines."""
