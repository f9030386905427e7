"""KV bank: keys and values of one attention layer, in memory that does not grow with the length of the sequence.

A new key is written into the window. Once per block of b kept tokens, keys older than the window move to the ring of
the gate they were lured to. The ring holds the gate's newest keys; older ones remain in the gate's note, the mean of
its keys. The row of a new token, read from this, is the row that the parallel pass computes.

Axes: `B` sequences, `H` query heads, `G` KV groups, `d` head dim, `n` tokens taken in at once.
"""

from __future__ import annotations

import hashlib
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.checks import whole_number
from ...common.tensors import read_tensors, write_tensors
from ..backends.dispatch import bank_fill, bank_step
from ..budget import Budget
from ..functional import check_budget, check_inputs
from ..gates import Gates
from ..rope import rotate, rotate_both
from .row import dense_row, sparse_row
from .slots import Slots
from .view import BankContents, view_of

ENDLESS = 1 << 62  # tokens: length to plan a budget for where it does not depend on the length, as at flux alpha 1
NUMBERS_PER_STEP = 1 << 24  # features of keys and values, and cosines to prototypes, that `extend` makes at a time


class KVBank(Slots):
    """The bounded state of one attention layer for B sequences.

    Made by `KVBank.empty`; `extend` takes in a prefill, `step` one token per sequence and returns its output row.
    Both change the bank in place, without autograd. A token whose key or value is NaN or infinite gets a row of NaN and
    is not stored. Memory is fixed, whatever the length, unless `budget.dense`: then
    this is a plain KV cache that grows with its tokens. `count` `(B,)`: kept tokens; `seen` `(B,)`: tokens,
    dropped ones included; `tokens`: the same as a Python int (it does not change while a CUDA graph replays a step).
    """

    @classmethod
    def empty(
        cls,
        budget: Budget,
        gates: Gates,
        batch: int = 1,
        *,
        inv_freq: Tensor | None,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        int8: bool = False,
        reach: int | None = None,
    ) -> KVBank:
        """A bank without tokens.

        budget: from `plan_budget`, for the longest the sequences may become (`ENDLESS` where alpha is 1).
        gates: the layer's, read at every step and never changed. inv_freq: `(d / 2,)` rotary frequencies in radians per
        token, or None. scale: of the scores, default d^-1/2. dtype: of stored keys and values. device: the gates'
        by default. int8: store keys and values in int8 with a float32 scale per row (not when dense).
        reach: largest distance at which a key may appear, in tokens; None for no bound. Beyond it, keys outside the
        window are rotated along with the text, so that they never appear farther away: this keeps a model within the
        distances it was trained on. Only the bank does this, not the parallel pass.
        Raises `TypeError` or `ValueError` naming the argument.
        """
        if not isinstance(budget, Budget):
            raise TypeError(f"budget={type(budget).__name__}: expected Budget, from plan_budget")
        if not isinstance(gates, Gates):
            raise TypeError(f"gates={type(gates).__name__}: expected Gates")
        whole_number("batch", batch, 1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype!r}: expected a floating-point torch.dtype")
        d = gates.head_dim
        if inv_freq is not None and (not isinstance(inv_freq, Tensor) or tuple(inv_freq.shape) != (d // 2,)):
            raise ValueError(f"inv_freq={inv_freq!r}: must be None or a tensor of shape ({d // 2},)")
        check_budget(budget, 1, gates.gates_per_group)
        device = gates.prototypes.device if device is None else torch.device(device)
        stored = torch.int8 if int8 and not budget.dense else dtype
        scale = d**-0.5 if scale is None else float(scale)
        return cls(budget, gates, batch, stored, device, inv_freq=inv_freq, scale=scale, reach=reach)

    @property
    def batch(self) -> int:
        return len(self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of everything the bank holds, bookkeeping included."""
        return sum(x.nbytes for x in self._tensors().values())

    def __repr__(self) -> str:
        kind = "dense" if self.budget.dense else f"window {self.window}, ring {self.ring}"
        return f"KVBank(batch={self.batch}, tokens={self.tokens}, {kind}, {self.nbytes:,} bytes)"

    @torch.no_grad()
    def extend(
        self,
        k: Tensor,
        v: Tensor,
        *,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
        index: Any = None,
        is_finite: bool = False,
    ) -> None:
        """Take in n tokens at once: a prefill, or the next part of one. Equals n steps up to rounding of the sums.

        k, v: un-rotated, `(B, n, G, d)`. keep: `(B, n)` bool, tokens that take part (padding is False).
        positions: `(n,)` or `(B, n)`, in tokens; by default they follow on from the last.
        index: `AttentionResult.index` of a call with these keys, values and positions and this bank's budget and gates;
        it fills an empty bank more quickly. is_finite: the caller knows that all keys and values are finite, or finds
        out from `index.total`; else the host waits for a GPU to see.
        Raises `ValueError` when the budget was planned for fewer tokens than the bank would hold.
        """
        self.gates.check_keys(k)
        check_inputs(k, k, v, self.gates, positions, keep, None, None)
        if index is not None and index.shape != k.shape:
            raise ValueError(f"index is of keys {tuple(index.shape)}: must be of k, {tuple(k.shape)}")
        empty = self.tokens == 0
        self._admit(k)
        where = None if positions is None else positions.to(k.device)
        quickly = index is not None and empty and keep is None and (is_finite or bool(index.total.isfinite()))
        if quickly and bank_fill(self, index, where):
            return
        keep, _ = _finite(k, v, keep)
        size = max(1, NUMBERS_PER_STEP // (self.rows[:, :, 0].numel() + self.retired.numel()))
        with torch.autocast(k.device.type, enabled=False):
            for i in range(0, k.shape[1], size):
                cut = slice(i, i + size)
                at = self._positions(None if positions is None else positions[..., cut], k[:, cut])
                rotated = rotate(k[:, cut], at, self.inv_freq)
                here = None if keep is None else keep[:, cut]
                self.write_many(k[:, cut], rotated, v[:, cut], here, is_empty=empty and i == 0)

    @torch.no_grad()
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        keep: Tensor | None = None,
        awake: Tensor | None = None,
        positions: Tensor | None = None,
        turned: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Take in one token per sequence and return its row, `(B, 1, H, d)`: zero for dropped tokens, sleeping heads.

        q: `(B, 1, H, d)`, k and v: `(B, 1, G, d)`, un-rotated, H any multiple of G. keep: `(B, 1)` bool, False for
        a token that takes no part. awake: `(B, 1, H)` bool. positions: `(1,)` or `(B, 1)`, in tokens; by default
        they follow on. turned: q and k rotated at `positions`, if the caller has them.
        The same row as `proteus_attention` over all tokens so far, with this budget.
        Raises `TypeError` or `ValueError` naming the argument.
        """
        check_inputs(q, k, v, self.gates, positions, keep, awake, self.inv_freq)
        if q.shape[1] != 1:
            raise ValueError(f"q has {q.shape[1]} tokens: a step takes 1 per sequence; steps takes many")
        return self._advance(q, k, v, keep, awake, positions, turned)

    @torch.no_grad()
    def steps(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        keep: Tensor | None = None,
        awake: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The rows of n calls of `step`, `(B, n, H, d)`, for tensors of n tokens: all tokens of a block at once.

        Waits for a GPU once per block, to find where each sequence's next block begins.
        """
        check_inputs(q, k, v, self.gates, positions, keep, awake, self.inv_freq)
        rows, start, n, b = [], 0, q.shape[1], self.budget.block
        while start < n:
            most = n if self.budget.dense else b - int((self.count % b).max())
            cut = slice(start, start + most)
            here = (None if x is None else x[:, cut] for x in (keep, awake))
            at = None if positions is None else positions[..., cut]
            rows.append(self._advance(q[:, cut], k[:, cut], v[:, cut], *here, at))
            start += most
        return torch.cat(rows, dim=1)

    def _advance(self, q: Tensor, k: Tensor, v: Tensor, keep, awake, positions, turned=None) -> Tensor:
        """Take in tokens that belong to one block of each sequence, and return their rows."""
        self._admit(k)
        kernels = self._kernels(q, k, v)
        if kernels is not None:
            if self.reach is not None:
                self._stop_ageing(self._due(_finite(k, v, keep)[0]))
            at = self.next_position[:, None] if positions is None else positions.to(k.device).expand(self.batch, 1)
            return kernels(self, q, k, v, keep, awake, at)
        keep, finite = _finite(k, v, keep)
        at = self._positions(positions, k)
        with torch.autocast(q.device.type, enabled=False):
            rotated_q, rotated_k = turned or rotate_both(q, k, at, self.inv_freq)
            self.write(k, rotated_k, v, keep)
            out = dense_row(self, rotated_q) if self.budget.dense else sparse_row(self, q, rotated_q)
        if keep is not None:
            out = out.masked_fill(~keep[..., None, None], 0)
        if finite is not None:
            out = out.masked_fill(~finite[..., None, None], torch.nan)
        return out if awake is None else out.masked_fill(~awake[..., None], 0)

    def _kernels(self, q: Tensor, k: Tensor, v: Tensor):
        """What takes in one token by Triton, or None where PyTorch's operations do."""
        alike = q.dtype == k.dtype == v.dtype and self.sums.dtype == torch.float32
        if q.shape[1] > 1 or self.budget.dense or self.int8 or not alike:
            return None
        return bank_step(q.device, q.shape[3], q.dtype)

    def _admit(self, k: Tensor) -> None:
        """Check that k `(B, n, G, d)` fits, and make room for it where the cache is dense."""
        n = k.shape[1]
        if k.shape[0] != self.batch:
            raise ValueError(f"k has {k.shape[0]} sequences: must be the bank's {self.batch}")
        if k.device != self.rows.device:
            raise ValueError(f"k is on {k.device}: must be on {self.rows.device}, as the bank")
        self.admit(n)
        if self.budget.dense and self.tokens > self.window:
            self.grow(self.tokens)

    def admit(self, n: int) -> None:
        """Count n tokens that a step takes in, also one that a CUDA graph replays. Raises `ValueError` for too many."""
        if self.tokens + n > self.budget.tokens:
            raise ValueError(
                f"tokens={self.tokens + n}: the state was planned for at most {self.budget.tokens}; plan it for more"
            )
        self.tokens += n

    def _positions(self, positions: Tensor | None, like: Tensor) -> Tensor:
        """Positions `(B, n)` of the next n tokens. Later tokens continue from the last of them."""
        n = like.shape[1]
        if positions is None:
            positions = self.next_position[:, None] + torch.arange(n, device=like.device)
        positions = positions.to(like.device).expand(self.batch, n)
        self.next_position.copy_(positions[:, -1] + 1)
        return positions

    def contents(self, batch: int = 0, group: int = 0) -> BankContents:
        """The keys held for one sequence and one KV group, as plain numbers."""
        whole_number("batch", batch, 0, self.batch - 1)
        whole_number("group", group, 0, self.token.shape[1] - 1)
        return view_of(self, batch, group)

    def fork(self) -> KVBank:
        """An independent copy over the same gates: stepping one does not change the other."""
        if self._memory is None:
            return self.select(torch.arange(self.batch, device=self.count.device))
        twin = self._twin()
        with torch.inference_mode(False):
            twin._lie_in(self._memory.clone())
        return twin

    def select(self, rows: Tensor) -> KVBank:
        """A bank of the sequences at `rows` (n,) int64, in that order, repeats allowed: beams, or a smaller batch."""
        twin = self._twin()
        with torch.inference_mode(False):
            twin._replace({name: getattr(self, name)[rows] for name in self.TENSORS.values()})
        return twin

    def _tensors(self) -> dict[str, Tensor]:
        """The bank's tensors, by their names in files."""
        return {name: getattr(self, attribute) for name, attribute in self.TENSORS.items()}

    def state_dict(self) -> dict:
        """`{"about": plain values, "tensors": {name: tensor}}`; the tensors are copies."""
        return {"about": self._about(), "tensors": {name: x.clone() for name, x in self._tensors().items()}}

    def _about(self) -> dict:
        return {"budget": self.budget.to_dict(), "gates": fingerprint(self.gates), "scale": self.scale}

    def load_state_dict(self, state: dict) -> None:
        """Copy in the tensors of a `state_dict` of a bank with the same gates, budget, scale, dtype and number of
        sequences. Raises `ValueError` naming what differs."""
        try:
            about, tensors = state["about"], {name: state["tensors"][name] for name in self.TENSORS}
        except (KeyError, TypeError) as problem:
            raise ValueError(f"state is not what state_dict gave: {problem} is missing") from problem
        for name, mine in self._about().items():
            if about.get(name) != mine:
                raise ValueError(f"state has {name}={about.get(name)}: must be {mine}, as the bank")
        for name, old in self._tensors().items():
            new = tensors[name]
            sized = 2 if self.budget.dense else None  # a dense cache may hold any number of slots
            if new.shape[:sized] != old.shape[:sized] or new.dtype != old.dtype:
                raise ValueError(
                    f"state's {name} is {new.dtype} {tuple(new.shape)}: must be {old.dtype} {tuple(old.shape)}"
                )
        with torch.inference_mode(False):
            device = self.rows.device
            self._replace({mine: tensors[name].to(device, copy=True) for name, mine in self.TENSORS.items()})
        self.tokens = int(self.seen.max())
        if self.budget.dense:
            self.window = self.scratch

    def save(self, path: str | Path) -> Path:
        """Write the bank to one safetensors file, whole or not at all."""
        state = self.state_dict()
        freq = {} if self.inv_freq is None else {"inv_freq": self.inv_freq}
        return write_tensors(path, state["tensors"] | freq, state["about"])

    @classmethod
    def load(cls, path: str | Path, gates: Gates, device: torch.device | str | None = None) -> KVBank:
        """A saved bank, over the gates it was filled with.

        Raises `FileNotFoundError`, or `ValueError` for other gates or when the file is not one of ours.
        """
        if not isinstance(gates, Gates):
            raise TypeError(f"gates={type(gates).__name__}: expected Gates")
        tensors, about = read_tensors(path, "KVBank.save")
        try:
            if isinstance(about["budget"]["notes"], bool):  # files of before: notes of every gate, or of none
                about["budget"]["notes"] *= gates.gates_per_group
            about["budget"].setdefault("ring_reads", about["budget"]["probes"] * about["budget"]["ring"])
            budget, dtype, batch = Budget(**about["budget"]), tensors["rows"].dtype, len(tensors["count"])
            scale, theirs, freq = about["scale"], about["gates"], tensors.pop("inv_freq", None)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"path={str(path)!r}: not a file that KVBank.save wrote ({problem})") from problem
        if theirs != fingerprint(gates):
            raise ValueError(f"path={str(path)!r}: a bank of gates {theirs}: must be of gates {fingerprint(gates)}")
        kind = {"int8": True} if dtype == torch.int8 else {"dtype": dtype}
        bank = cls.empty(budget, gates, batch, inv_freq=freq, scale=scale, device=device, **kind)
        bank.load_state_dict({"about": about, "tensors": tensors})
        return bank


def _finite(k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The tokens to store, `(B, n)` bool or None for all, and which of the tokens that take part are finite.

    A key or value that is NaN or infinite would spoil every later row. On a GPU the host does not wait for the answer.
    """
    if k.device.type == "cpu" and isfinite(k.sum() + v.sum()):
        return keep, None
    finite = (k - k == v - v).all((-2, -1))  # a finite number less itself is 0; otherwise NaN, which equals nothing
    return (finite, finite) if keep is None else (keep & finite, finite | ~keep)


def fingerprint(gates: Gates) -> str:
    """Short hash of what decides which gate a key falls into: the prototypes, and which of them are alive."""
    digest = hashlib.sha256()
    for x in (gates.prototypes, gates.alive):
        digest.update(x.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
