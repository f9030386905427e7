"""Fixtures of the documents' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from books import WORDS

from proteus_playground.streaming import sources, token_cache, tokenising


@pytest.fixture
def small(monkeypatch):
    """Pieces and blocks so small that a page of text has many of each."""
    monkeypatch.setattr(tokenising, "CHARACTERS_PER_PIECE", 64)
    monkeypatch.setattr(sources, "BYTES_PER_READ", 50)
    monkeypatch.setattr(token_cache, "TOKENS_PER_HASH", 100)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes((WORDS * 60).encode())
    return path
