"""The panel of healing: the gap closes while a model learns to read few keys."""
