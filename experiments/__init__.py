"""Benchmarks and studies that measure the figures in README and docs."""
