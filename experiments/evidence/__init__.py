"""Selection by gates against other ways to choose keys, at equal keys per query (`proteus evidence`)."""
