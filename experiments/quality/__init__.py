"""What sparse attention costs a model in likelihood and answers, by how keys are chosen."""
