"""The panel of the wall."""
