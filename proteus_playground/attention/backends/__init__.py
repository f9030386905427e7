"""Ways to compute the shortlist; `dispatch` is the one public door."""

from .dispatch import choose_backend

__all__ = ["choose_backend"]
