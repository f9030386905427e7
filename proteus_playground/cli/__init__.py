"""The `proteus` command."""
