"""Healing: training a model until sparse attention costs it little. `plan` says what is trained, `run` trains."""
