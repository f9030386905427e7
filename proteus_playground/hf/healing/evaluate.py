"""What sparse attention costs the model on held-out text: the gap to its own dense pass.

Likelihoods are means over the second half of each row, in nats per token, as `proteus quality` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ...attention.adapter import ProteusLayer
from ..adapters import switched_off
from ..patch import patched
from .budgets import SMALLEST, Drawn
from .rows import IGNORED, Batch
from .student import Head, Student, budget_of, run, sparse_run

ROWS = 256  # of logits in float32 at a time


@dataclass(frozen=True)
class Measured:
    """Negative log-likelihood of held-out text."""

    base: float  # the untouched model
    dense: float  # the trained model, dense
    sparse: dict[int, float]  # by the number that the length is divided by for L
    reads: dict[int, float]  # keys and notes that a query read

    @property
    def gaps(self) -> dict[int, float]:
        """Sparse less dense, by the same number."""
        return {share: value - self.dense for share, value in self.sparse.items()}

    @property
    def gap(self) -> float:
        """Mean of the gaps."""
        return fmean(self.gaps.values())

    def to_dict(self) -> dict:
        gaps = {share: round(gap, 5) for share, gap in self.gaps.items()}
        return {"base": self.base, "dense": self.dense, "sparse": self.sparse, "reads": self.reads, "gaps": gaps}


@torch.no_grad()
def measure(student: Student, rows: Sequence[Batch], shares: Sequence[int]) -> Measured:
    """Measure rows at L = length / share for each share, all layers sparse at flux alpha 1."""
    base, dense, sparse, reads = [], [], {share: [] for share in shares}, {share: [] for share in shares}
    model = student.model
    for row in tqdm(rows, "held-out rows", leave=False, disable=None):
        row = row.to(next(model.parameters()).device)
        dense.append(_nll(model, student.head, row))
        with switched_off(student.teacher):
            base.append(_nll(student.teacher, student.teacher_head, row))
        for share in shares:
            seen: list[float] = []
            tokens = row.ids.shape[1]
            drawn = Drawn(1.0, max(SMALLEST, tokens // share))
            with patched(model, {at: _reading(layer, tokens, drawn, seen) for at, layer in student.layers.items()}):
                sparse[share].append(_nll(model, student.head, row))
            reads[share].append(fmean(seen))
    means = ({share: fmean(values) for share, values in each.items()} for each in (sparse, reads))
    return Measured(fmean(base), fmean(dense), *means)


def _reading(layer: ProteusLayer, tokens: int, drawn: Drawn, seen: list[float]):
    """The layer's attention at a budget; appends the mean reads of its rows to `seen`."""
    budget = budget_of(layer, tokens, drawn)

    def attend(call):
        done = sparse_run(layer, call, budget, explain=True)
        reads = done.result.reads.float()
        seen.append((reads if call.keep is None else reads[call.keep]).mean().item())
        return done.out

    return attend


def _nll(model: nn.Module, head: Head, row: Batch) -> float:
    """Of the learned tokens in the second half of a batch's rows."""
    half = row.ids.shape[1] // 2
    hidden, targets = run(model, row)[:, half - 1 :].flatten(0, 1), row.targets[:, half - 1 :].flatten()
    if not (targets != IGNORED).any():
        hidden, targets = run(model, row).flatten(0, 1), row.targets.flatten()
    hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
    pieces = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    total = sum(F.cross_entropy(head(rows).float(), wanted, reduction="sum").item() for rows, wanted in pieces)
    return total / len(targets)
