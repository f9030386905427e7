"""The `torch` backend: plain PyTorch, in tiles, without a tokens x tokens array."""
