"""A model trained twice on the same text, with dense attention and with Proteus (`proteus duel`)."""
