"""Ways to compute the shortlist. `dispatch` chooses one; other modules import `dispatch` or `reference` only."""

from .dispatch import choose_backend

__all__ = ["choose_backend"]
