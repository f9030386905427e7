"""A text read token by token through KV banks, so that one can watch what the banks keep.

`BankReader` is what a panel needs; a random layer and a language model implement it.
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
from ..common.progress import Progress, Stop, check_stop, tell
from ..common.texts import Text, calibration_text
from ..hf.models import DEFAULT
from ..lm.sampling import Sampling
from .random_source import RandomSource

CALIBRATION_TOKENS = 2048
PROMPT_TOKENS_PER_STEP = 256  # tokens of the beginning that go through a language model in one pass
# Window and rings are small, so that they fill while one watches.
SETTINGS = Settings(shortlist=80, dna_fraction=0.7, gates=28, probes=2, nearest_gates=False)


class BankReader(Protocol):
    """Reads one token per step; every method may be called from any thread."""

    name: str  # of the model
    note: str  # one sentence: which model reads which text
    random: bool  # whether the weights are random
    layers: tuple[int, ...]  # layers that have a bank
    groups: int  # KV groups per layer
    tokens: list[str]  # the tokens read and written so far
    given: int  # number of tokens in the text; later ones were written by the model
    seconds: float  # measured time of the last step
    nbytes: int  # bytes of all banks together

    def step(self) -> bool:
        """Read or write one more token. False when none is left."""

    def contents(self, layer: int, group: int) -> BankContents:
        """What the bank of one layer and KV group holds now."""


def open_reading(
    text: Text,
    model: str = DEFAULT,
    *,
    tokens: int = 1024,
    start: int = 256,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> BankReader:
    """Read `text` with the pulled model `model`, or with a random layer if it is "random".

    tokens: how much of the text is read; start: how many of these are read before this returns.
    Raises `ValueError` for a model that is not pulled, `Stopped` when `stop` requests it.
    """
    asked = {"tokens": tokens, "start": start, "progress": progress, "stop": stop}
    if model == "random":
        return RandomReader(text, **asked)
    from ..hf.opening import load, title

    return ModelReader(*load(model), title(model), text, **asked)


class RandomReader:
    """A `BankReader` of whole words with a random layer: nothing was learned, but equal words enter equal gates."""

    name, random = "random layer", True

    def __init__(
        self,
        text: Text,
        *,
        tokens: int = 1024,
        start: int = 0,
        settings: Settings = SETTINGS,
        seed: int = 0,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ):
        """Take the first `tokens` words of `text` and read `start` of them. Raises `Stopped` when `stop` says so."""
        source = RandomSource(seed)
        self._words = source.encode(text.body)[:tokens]
        self.note = (
            f"Random weights, nothing learned: a stand-in layer reads {len(self._words):,} words of “{text.name}”."
        )
        self._captured = source.capture(source.ids(self._words))
        calibration = Calibration(source, calibration_text(text.name), CALIBRATION_TOKENS, None)
        budget = plan_budget(config_for(settings, source.shape), ENDLESS)
        self.layers, self.groups = source.full_layers, source.shape.n_groups
        self._banks = {}
        for layer, seen in self._captured.items():
            gates = calibration.gates(layer, settings.gates, stop=stop)
            self._banks[layer] = KVBank.empty(budget, gates, inv_freq=seen.inv_freq, scale=seen.scale)
        self.tokens: list[str] = []
        self.given, self.seconds = len(self._words), 0.0
        self._lock = RLock()
        for at in range(first := min(start, self.given)):
            check_stop(stop)
            tell(progress, at / first, "reading the beginning of the text")
            self.step()

    @property
    def nbytes(self) -> int:
        return sum(bank.nbytes for bank in self._banks.values())

    @torch.inference_mode()
    def step(self) -> bool:
        with self._lock:
            at = len(self.tokens)
            if at == self.given:
                return False
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


class ModelReader:
    """A `BankReader` of a transformers model that `hf.patch` supports: it reads the text and then writes on.

    Every layer with full attention has a bank. Needs the `hf` extra.
    """

    random = False

    def __init__(
        self,
        model,
        tokenizer,
        name: str,
        text: Text,
        *,
        tokens: int = 1024,
        start: int = 256,
        settings: Settings = SETTINGS,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ):
        """Take the first `tokens` tokens of `text` and read `start` of them. sampling: how the model writes on.

        Raises `Stopped` when `stop` requests it.
        """
        from ..hf.cache import ProteusCache
        from ..hf.source import ModelSource

        source = ModelSource(model, tokenizer, name)
        self.name, self.groups, self.layers = name, source.shape.n_groups, source.full_layers
        self._model, self._tokenizer, self._choose = model, tokenizer, sampling or Sampling(0.7, None, 0.95, 0)
        self._cache = ProteusCache.for_model(model, tokenizer, settings, name=name, progress=progress, stop=stop)
        self._ids = source.encode(text.body)[:tokens]
        self.note = f"{name} reads {len(self._ids):,} tokens of “{text.name}” one by one, and then writes on by itself."
        self.tokens: list[str] = []
        self.given, self.seconds = len(self._ids), 0.0
        self._lock, self._logits = RLock(), None
        first = self._ids[: max(1, min(start, self.given))]
        try:
            for at in range(0, len(first), PROMPT_TOKENS_PER_STEP):
                check_stop(stop)
                tell(progress, at / len(first), "reading the beginning of the text")
                self._read(first[at : at + PROMPT_TOKENS_PER_STEP])
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def step(self) -> bool:
        with self._lock:
            begun, at = perf_counter(), len(self.tokens)
            token = self._ids[at] if at < self.given else int(self._choose(self._logits, at))
            self._read([token])
            self.seconds = perf_counter() - begun
        return True

    def contents(self, layer: int, group: int) -> BankContents:
        with self._lock:
            return self._cache.banks[layer].contents(0, group)

    def close(self) -> None:
        """Put the model back as it was."""
        self._cache.close()

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> None:
        from ..hf.patch import handed

        row = torch.tensor([ids], device=self._model.device)
        self._logits = self._model(row, **handed(self._model, self._cache), logits_to_keep=1).logits[:, -1]
        self.tokens += self._tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
