"""The panel of the duel: two models learning side by side."""
