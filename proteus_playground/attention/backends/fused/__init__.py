"""The `triton` backend: fused GPU kernels, forward and backward."""
