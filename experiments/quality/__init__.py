"""What sparse attention costs a model in likelihood and in answers, by how keys are chosen."""
