"""Benchmarks of time and memory (`proteus bench`)."""
