"""Associative recall: made-up texts of keys and values, on which models are trained and tested."""
