"""A text read token by token through KV banks, so that one can watch what they remember.

`Reading` is what a panel needs; here is the one that needs no model. `hf.bank_reading` has the other.
"""

from __future__ import annotations

from threading import RLock
from time import perf_counter
from typing import Protocol

import torch

from ..attention import plan_budget
from ..attention.bank.bank import ENDLESS, KVBank
from ..attention.bank.view import BankContents
from ..attention.calibration import Calibration
from ..attention.settings import Settings, config_for
from ..common.texts import Text, calibration_text
from .random_source import RandomSource

CALIBRATION_TOKENS = 2048
# Window and rings small enough to be watched while they fill.
SETTINGS = Settings(shortlist=80, dna_fraction=0.7, gates=28)


class Reading(Protocol):
    """One token at a time; every method may be called from any thread."""

    name: str
    note: str  # one sentence: who reads what
    random: bool
    layers: tuple[int, ...]  # those with a bank
    groups: int  # KV groups of each
    tokens: list[str]  # what has been read, and written, so far
    given: int  # tokens of the text; later ones were written by the model
    seconds: float  # that the last step took, measured
    nbytes: int  # of all banks

    def step(self) -> bool:
        """Take in one more token. False where there is none."""

    def contents(self, layer: int, group: int) -> BankContents:
        """What a bank holds now."""


def open_reading(text: Text, model: str = "smollm2", *, tokens: int = 1024, start: int = 256) -> Reading:
    """`text` as a pulled `model` reads it, or a random layer for "random"; `start` of its `tokens` are read at once.

    `ValueError` for a model that is not pulled.
    """
    if model == "random":
        return RandomReading(text, tokens=tokens, start=start)
    from ..hf.models import load
    from .model_reading import ModelReading

    return ModelReading(*load(model), model, text, tokens=tokens, start=start)


class RandomReading:
    """A text's words through the banks of a random layer: nothing was learned, equal words meet at equal gates."""

    name, random, given = "random layer", True, 0

    def __init__(self, text: Text, *, tokens: int = 1024, start: int = 0, settings: Settings = SETTINGS, seed: int = 0):
        """Reads the first `tokens` words of `text`, of which `start` are in the banks already."""
        source = RandomSource(seed)
        self._words = source.encode(text.body)[:tokens]
        self.note = (
            f"Random weights, nothing learned: a stand-in layer reads {len(self._words):,} words of {text.name}."
        )
        self._captured = source.capture(source.ids(self._words))
        learned = Calibration(source, calibration_text(text.name), CALIBRATION_TOKENS, None)
        budget = plan_budget(config_for(settings, source.shape), ENDLESS)
        self.layers, self.groups = source.full_layers, source.shape.n_groups
        self._banks = {}
        for layer, seen in self._captured.items():
            gates = learned.gates(layer, settings.gates)
            self._banks[layer] = KVBank.empty(budget, gates, inv_freq=seen.inv_freq, scale=seen.scale)
        self.tokens: list[str] = []
        self.given, self.seconds = len(self._words), 0.0
        self._lock = RLock()
        for _ in range(min(start, self.given)):
            self.step()

    @property
    def nbytes(self) -> int:
        return sum(bank.nbytes for bank in self._banks.values())

    @torch.inference_mode()
    def step(self) -> bool:
        at = len(self.tokens)
        if at == self.given:
            return False
        with self._lock:
            begun = perf_counter()
            for layer, bank in self._banks.items():
                seen = self._captured[layer]
                bank.step(*(x[None, at : at + 1].float() for x in (seen.q, seen.k, seen.v)))
            self.tokens.append(self._words[at])
            self.seconds = perf_counter() - begun
        return True

    def contents(self, layer: int, group: int) -> BankContents:
        with self._lock:
            return self._banks[layer].contents(0, group)
