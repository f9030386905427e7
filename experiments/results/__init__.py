"""Results of the benchmarks and studies as JSON: the figures in README and docs."""
