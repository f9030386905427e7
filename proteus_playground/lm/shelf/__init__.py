"""Texts to read and questions to ask of them, for the small models that come with the package."""

from .grammar import Question, Shelf, shelf
from .tokenizer import ShelfTokenizer

__all__ = ["Question", "Shelf", "ShelfTokenizer", "shelf"]
