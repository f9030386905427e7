"""The validation suite: facts planted in long documents, and whether the buffer keeps them (`proteus verify`)."""
