"""Rows of training text, numbered: row n is the same in every run with the same seed, however often it is stopped.

Axes: `B` rows of a batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus

IGNORED = -100  # a target that is not learned
PERIOD = 1000  # rows after which the order of the sources repeats


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, padded on the right."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, the token after each one; IGNORED where it is not learned
    real: Tensor | None  # (B, T) bool, False at padding; None where there is none

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return int((self.targets != IGNORED).sum())

    def part(self, start: int, stop: int) -> Batch:
        """Rows `start` .. `stop - 1`."""
        real = None if self.real is None else self.real[start:stop]
        return Batch(self.ids[start:stop], self.targets[start:stop], None if real is None or real.all() else real)

    def to(self, device: torch.device) -> Batch:
        real = None if self.real is None else self.real.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), real)


class Rows:
    """Rows of one length from several sources, without end: each source starts again in another order."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], length: int, seed: Sequence[int]):
        """weights: share of each source, in any unit; empty for shares in proportion to their rows.

        seed: numbers that decide the order. Raises `ValueError` where a source has no row of this kind.
        """
        self.corpora, self.length, self.seed = corpora, length, tuple(seed)
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # by source: its turn, and the order of its rows
        self._tables = [corpus.rows(length) for corpus in corpora]
        for corpus, table in zip(corpora, self._tables, strict=True):
            if not len(table):
                raise ValueError(f"source={corpus.name!r} has {len(corpus.ids)} tokens: too few for one row")
        shares = np.array(weights or [len(table) for table in self._tables], float)
        ends = np.round(np.cumsum(shares / shares.sum()) * PERIOD).astype(int)
        pattern = np.searchsorted(ends, np.arange(PERIOD), side="right")
        self._pattern = self._order(0).permutation(pattern)
        self._count = np.array([(self._pattern == at).sum() for at in range(len(corpora))])
        self._nth = np.zeros(PERIOD, int)  # how often a row's source came before it in the period
        for at in range(len(corpora)):
            here = self._pattern == at
            self._nth[here] = np.arange(here.sum())

    def _order(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, self.length, *key])

    def batch(self, first: int, count: int) -> Batch:
        """Rows `first` .. `first + count - 1`."""
        return stack([self._row(number) for number in range(first, first + count)], self.length)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        turn, place = divmod(number, PERIOD)
        source = int(self._pattern[place])
        epoch, at = divmod(turn * int(self._count[source]) + int(self._nth[place]), len(self._tables[source]))
        if self._epochs.get(source, (None,))[0] != epoch:
            self._epochs[source] = epoch, self._order(1 + source, epoch).permutation(len(self._tables[source]))
        return row_of(self.corpora[source], self._tables[source][self._epochs[source][1][at]])


def row_of(corpus: Corpus, span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of one row of `corpus.rows(length)`. The document's next token is the last one's target."""
    start, stop, end = span.tolist()
    ids = corpus.ids[start:stop].astype(np.int64)
    targets = np.full(len(ids), IGNORED, np.int64)
    after = slice(start + 1, min(stop + 1, end))
    targets[: after.stop - after.start] = np.where(corpus.learned[after], corpus.ids[after], IGNORED)
    return ids, targets


def stack(rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> Batch:
    """Rows as one batch; `length`: what shorter ones are padded to, where any is shorter than another."""
    sizes = [len(ids) for ids, _ in rows]
    width = sizes[0] if len(set(sizes)) == 1 else length
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for at, (row, wanted) in enumerate(rows):
        ids[at, : len(row)], targets[at, : len(row)] = torch.from_numpy(row), torch.from_numpy(wanted)
        real[at, : len(row)] = True
    return Batch(ids, targets, None if real.all() else real)


def held_out_rows(corpus: Corpus, length: int, most: int) -> list[Batch]:
    """At most `most` rows, spread evenly over the corpus, each a batch of its own; whole ones where there are any."""
    table = corpus.rows(length)
    whole = table[table[:, 1] - table[:, 0] == length]
    table = whole if len(whole) else table
    chosen = table[np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int))]
    return [stack([row_of(corpus, span)], length) for span in chosen]
