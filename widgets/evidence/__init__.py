"""The panel of the evidence: which choice of keys finds what."""
