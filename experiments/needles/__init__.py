"""Experiments as generators of dataclasses: one loop for the command line, the tests and the notebooks."""
