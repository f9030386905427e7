"""What sparse attention costs a model in likelihood, by how keys are chosen."""
