"""Benchmarks against peer implementations; a ratio is printed only if the results agree."""
