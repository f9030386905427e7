"""Small panels: one control, one measured sentence."""
