"""What the quality table examines: a model, texts it was never fitted to, and gates for the arms that need them.

Axes: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from hashlib import sha256

import torch
from torch import Tensor

from ...attention import AttentionConfig, Gates
from ...attention.settings import config_for, default_settings
from ...common.texts import BOOK, TOPICS, load_text
from ...hf.opening import load_source
from ...hf.source import ModelSource
from ...lm.shelf import shelf
from ...lm.shelf.exam import HELD_OUT
from ...lm.shipped import load_shipped
from ...playground.shelf_source import ShelfSource
from ..needles.haystacks import Haystack, build
from ..needles.subjects import TokenWords
from .choice import fit_gates, keys_of, passages

SHELVES = "shelf-mini"
SENTENCE = 6  # tokens: the shortest of a shelf, so that a text of enough sentences is long enough


class Subject:
    """A language model that the patch supports, with the texts that judge it and those that its gates are fitted to.

    own: whether the source's own gates, where it has as many as are asked for, are used instead of fitted ones.
    """

    def __init__(
        self,
        source: ModelSource,
        tokenizer,
        texts: Sequence[str],
        calibrate: Sequence[str],
        calibration_tokens: int,
        own: bool = True,
    ):
        self.source, self.texts, self.calibrate = source, tuple(texts), tuple(calibrate)
        self._tokenizer, self.own = tokenizer, own
        self.haystack = lru_cache(4)(self.haystack)
        self.calibration_tokens = calibration_tokens
        self._gates: dict[int, dict[int, Gates]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are replaced."""
        return self.source.full_layers

    def about(self) -> dict:
        """What decides the subject's figures."""
        return {
            "model": self.source.name, "fingerprint": self.source.fingerprint, "text": list(self.texts),
            "calibrated_on": list(self.calibrate), "calibration_tokens": self.calibration_tokens, "own_gates": self.own,
            "texts_hash": self._texts_hash(), "computed_on": self.source.device.type,
        }  # fmt: skip

    def _texts_hash(self) -> str:
        bodies = [load_text(name).body for name in (*self.texts, *self.calibrate)]
        return sha256("\0".join(bodies).encode()).hexdigest()[:16]

    def config(self, **fields) -> AttentionConfig:
        """The layers of a converted folder, or the defaults for a model without a slider, with these fields.

        Raises `TypeError` or `ValueError` naming one that does not fit.
        """
        trained = self.source.config or config_for(default_settings(self.calibration_tokens), self.source.shape)
        return replace(trained, **fields)

    def passages(self, tokens: int, count: int) -> list[Tensor]:
        """`count` passages `(tokens,)` of each text."""
        return [ids for name in self.texts for ids in passages(self.source, name, tokens, count)]

    def gates(self, count: int) -> dict[int, Gates]:
        """Gates of every replaced layer: the source's own, if it has as many and they are wanted, or fitted ones."""
        own = {layer: self.source.own_gates.get((layer, count)) for layer in self.layers}
        if self.own and None not in own.values():
            return own
        if count not in self._gates:
            self._gates[count] = fit_gates(self.source, self._keys, count)
        return self._gates[count]

    @cached_property
    def _keys(self) -> dict[int, Tensor]:
        return keys_of(self.source, self.calibrate, self.calibration_tokens)

    @cached_property
    def words(self) -> TokenWords:
        return TokenWords(self._tokenizer)

    def haystack(self, tokens: int) -> Haystack:
        """`tokens` tokens of the first text, for facts to be written into."""
        return build(self.texts[0], tokens, self.words)


class ShelfSubject(Subject):
    """shelf-mini, whose few words are those of shelves: it reads shelves, and answers questions about them."""

    def __init__(self, source: ShelfSource, trained: AttentionConfig, calibration_tokens: int):
        super().__init__(source, None, ("shelves",), ("other shelves",), calibration_tokens)
        self._trained = trained

    def config(self, **fields) -> AttentionConfig:
        return replace(self._trained, **fields)

    def _texts_hash(self) -> str:
        return "seeded"

    def passages(self, tokens: int, count: int) -> list[Tensor]:
        found = [shelf(HELD_OUT + i, max(1, tokens // SENTENCE)).text for i in range(count)]
        return [self.source.ids(self.source.encode(text)[:tokens]) for text in found]

    @cached_property
    def _keys(self) -> dict[int, Tensor]:
        text = shelf(HELD_OUT - 1, max(1, self.calibration_tokens // SENTENCE)).text
        ids = self.source.ids(self.source.encode(text)[: self.calibration_tokens])
        return {layer: seen.k for layer, seen in self.source.capture(ids, keys_only=True).items()}


def load(name: str, device: torch.device, texts: list[str], calibrate: list[str], calibration_tokens: int) -> Subject:
    """A subject by the name of its model.

    Raises `ValueError` for a model that is not known or not pulled, for a text that is judged and calibrated on, and
    for texts given to shelf-mini, which reads shelves only.
    """
    if name == SHELVES:
        if texts or calibrate:
            raise ValueError(f"text={[*texts, *calibrate][0]!r}: {SHELVES} reads shelves only, so leave the texts out")
        model, tokenizer = load_shipped(name, str(device))
        return ShelfSubject(ShelfSource(model, tokenizer, name), model.cfg.attention, calibration_tokens)
    texts, calibrate, own = texts or [TOPICS], calibrate or [BOOK], not calibrate
    if both := sorted(set(texts) & set(calibrate)):
        raise ValueError(f"text={both[0]!r} is judged and calibrated on: must be two texts")
    source = load_source(name, str(device))
    return Subject(source, source.tokenizer, texts, calibrate, calibration_tokens, own)
