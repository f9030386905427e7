"""What the benchmarks and studies printed, as JSON: the figures of README and docs."""
