"""The tokenizer of the models that read shelves: byte-level BPE in which every word of the shelves is one token.

Any text can be encoded: other words are split into smaller pieces, down to bytes.
"""

from __future__ import annotations

from functools import cached_property
from importlib.resources import files
from pathlib import Path

VOCABULARY = 2048  # enough for every word of the shelves to be one token


class ShelfTokenizer:
    """The shipped tokenizer, or one from `path` (a `tokenizers` JSON file). `vocab_size` is its number of tokens."""

    def __init__(self, path: str | Path | None = None):
        path = files(__package__) / "shelf_tokenizer.json" if path is None else Path(path)
        self.path, self._json = path, path.read_text(encoding="utf-8")

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self._json)
        except Exception as err:  # the library raises no narrower class
            raise ValueError(f"path={str(self.path)!r}: must be a tokenizers JSON file ({err})") from None
        tokenizer.encode_special_tokens = True  # control tokens that are spelled out in a text stay text
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of each token of `encode(text)`, in characters."""
        return self._tokenizer.encode(text).offsets

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def strings(self, ids: list[int]) -> list[str]:
        """Each token as text, with the space before it."""
        return [self._tokenizer.decode([token]) for token in ids]


def fit(texts: list[str], path: Path, vocabulary: int = VOCABULARY) -> None:
    """Learn the merges from `texts` and write the tokenizer to `path`, whole or not at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from ...common.files import write_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    write_text(path, tokenizer.to_str())
