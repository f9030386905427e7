"""Associative recall: made-up texts with keys and values, to train on and to be tested with."""
