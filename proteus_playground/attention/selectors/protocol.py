"""What a selector is given, what it returns, and the table of all selectors by name.

A selector is a plain function of a `Sight` and of row numbers. It returns the keys that each of these rows reads, as a
mask, or a `Choice` where rows also read stand-ins. docs/selectors.md has an example of twenty lines.

Axes: `B` batch, `T` tokens, `R` rows, `H` query heads, `d` head dim, `E` stand-ins of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import AttentionConfig
from ..gates import Gates
from ..rope import rotate


@dataclass(frozen=True)
class Sight:
    """What a selector chooses by: queries, keys and values of one layer, and how many keys a row may read.

    Heads that share keys hold copies of them. A row may be chosen by its own and earlier tokens only, though the
    tensors hold later ones as well; `check_selector` finds a selector that uses these.
    """

    q: Tensor  # (B, H, T, d) before RoPE
    k: Tensor  # (B, H, T, d) before RoPE
    v: Tensor  # (B, H, T, d)
    rotated_q: Tensor  # (B, H, T, d)
    rotated_k: Tensor  # (B, H, T, d); the true scores are products of the rotated ones
    shortlist: int  # L: keys and stand-ins that a row may read
    far: int  # of L, those beyond the window
    anchors: int  # first tokens that some selectors always read
    groups: int  # KV groups; heads of one group follow each other
    scale: float  # of the scores
    config: AttentionConfig | None = None  # of our own gates, whose selectors need it
    gates: Gates | None = None
    salience: Tensor | None = None  # (B, T) of the gates
    kept: dict = field(default_factory=dict, repr=False)  # what `once` has computed

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, *, inv_freq: Tensor | None,
        positions: Tensor | None = None, gates: Gates | None = None, scale: float | None = None,
    ) -> Sight:  # fmt: skip
        """From un-rotated q `(B, T, H, d)`, k and v `(B, T, G, d)`; the rest is as in `proteus_attention`.

        config: its shortlist (at most T), dna_fraction and n_anchors decide how much a row may read.
        """
        L, (G, d) = min(config.shortlist, q.shape[1]), k.shape[2:]
        wide = (
            x.transpose(1, 2).repeat_interleave(q.shape[2] // G, dim=1) for x in (k, v, rotate(k, positions, inv_freq))
        )
        k_wide, v_wide, rotated_k = wide
        return cls(
            q=q.transpose(1, 2), k=k_wide, v=v_wide, rotated_q=rotate(q, positions, inv_freq).transpose(1, 2),
            rotated_k=rotated_k, shortlist=L, far=min(floor(config.dna_fraction * L + 1e-9), L - 1),
            anchors=config.n_anchors, groups=G, scale=d**-0.5 if scale is None else scale, config=config, gates=gates,
            salience=None if gates is None else gates.salience(k),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    def window(self, rows: Tensor, size: int) -> Tensor:
        """The `size` newest keys of each row, itself included: `(R, T)` bool."""
        key = torch.arange(self.tokens, device=rows.device)
        return (key <= rows[:, None]) & (key > rows[:, None] - size)

    def scores(self, rows: Tensor) -> Tensor:
        """True scores `(B, H, R, T)`, not scaled."""
        return self.rotated_q[:, :, rows] @ self.rotated_k.transpose(-1, -2)

    def best(self, score: Tensor, rows: Tensor) -> Tensor:
        """The window and the `far` older keys of largest `score`; score and result broadcast to `(B, H, R, T)`."""
        window = self.window(rows, self.shortlist - self.far)
        older = torch.arange(self.tokens, device=rows.device) < rows[:, None] - (self.shortlist - self.far) + 1
        return window | top(score, older, self.far)

    def once(self, name: str, make: Callable[[], object]) -> object:
        """`make()`, computed at the first call of this name and kept: tables that all rows of a text share."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


class StandIns(NamedTuple):
    """Means that rows read in place of many keys. The score of one is raised by log(count); none where that is 0."""

    key: Tensor  # (B, H, R, E, d) mean of rotated keys
    value: Tensor  # (B, H, R, E, d) mean of their values
    count: Tensor  # (B, H, R, E) how many keys it stands for


class Choice(NamedTuple):
    """What rows read: keys `(B, H, R, T)` bool one by one, and stand-ins, each of which counts as one read."""

    keys: Tensor
    stand_ins: StandIns | None = None

    @property
    def reads(self) -> Tensor:
        """Keys and stand-ins read by each row: `(B, H, R)` int64."""
        reads = self.keys.sum(-1)
        return reads if self.stand_ins is None else reads + (self.stand_ins.count > 0).sum(-1)


Choose = Callable[[Sight, Tensor], Tensor | Choice]  # rows (R,) -> a mask that broadcasts to (B, H, R, T), or a Choice
Looks = Callable[[Sight, Tensor], Tensor | int]  # rows (R,) -> (R,)


@dataclass(frozen=True)
class Selector:
    """A selector with what a table says about it.

    title: one sentence. paper: a link where the idea is somebody's. looks: the number of summaries or keys that a row
    compares to choose, without reading them; None for zero. capped: whether L limits what a row reads. needs_gates:
    whether the sight must hold gates.
    """

    name: str
    choose: Choose
    title: str
    paper: str = ""
    looks: Looks | None = None
    capped: bool = True
    needs_gates: bool = False

    def count_looks(self, sight: Sight, rows: Tensor) -> Tensor:
        """`looks` of these rows: `(R,)` int64."""
        return torch.zeros_like(rows) + (0 if self.looks is None else self.looks(sight, rows))


SELECTORS: dict[str, Selector] = {}


def register(
    name: str,
    title: str,
    *,
    paper: str = "",
    looks: Looks | None = None,
    capped: bool = True,
    needs_gates: bool = False,
) -> Callable[[Choose], Choose]:
    """A decorator that adds a function to `SELECTORS`; arguments as in `Selector`. The function stays as it is.

    Raises `ValueError` for a name that another function has. A module that is loaded again replaces its own.
    """

    def add(choose: Choose) -> Choose:
        if not callable(choose):
            raise TypeError(f"choose={choose!r}: expected a function of a Sight and row numbers")
        there = SELECTORS.get(name)
        if there is not None and (there.choose.__module__, there.choose.__name__) != (
            choose.__module__,
            choose.__name__,
        ):
            raise ValueError(f"name={name!r} is taken by {there.choose.__module__}: must be a name of its own")
        SELECTORS[name] = Selector(name, choose, title, paper, looks, capped, needs_gates)
        return choose

    return add


def top(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores along the last axis among `allowed`; of equal ones the newer."""
    score, allowed = torch.broadcast_tensors(score, allowed)
    count = min(count, score.shape[-1])
    if count == 0:
        return torch.zeros_like(allowed)
    newer = torch.arange(score.shape[-1], device=score.device, dtype=torch.float64) * 1e-10
    found = (score.double() + newer).masked_fill(~allowed, -torch.inf).topk(count, dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, found, True) & allowed
