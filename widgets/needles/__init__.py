"""The panel of the needles."""
