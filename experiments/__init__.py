"""Benchmarks and studies: everything that prints a figure of README or docs."""
