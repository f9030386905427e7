"""Ways to compute the shortlist; `dispatch` is the one public door."""

from .dispatch import attend, choose_backend, dense, dense_lse

__all__ = ["attend", "choose_backend", "dense", "dense_lse"]
