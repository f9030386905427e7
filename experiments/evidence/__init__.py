"""What selection by gates is worth at equal keys per query: tasks, arms, ablations, tables."""
