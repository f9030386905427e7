"""Shelves: made-up texts and questions about them, for the small model that comes with the package."""

from .grammar import Question, Shelf, shelf
from .tokenizer import ShelfTokenizer

__all__ = ["Question", "Shelf", "ShelfTokenizer", "shelf"]
