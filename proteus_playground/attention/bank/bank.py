"""KV bank: all that one attention layer remembers of a sequence, in memory that does not grow with its length.

A key is written into the window (the notebook). Once per block of b kept tokens, keys older than the window move to
the ring of the gate they were lured to (sticky notes), and what a ring drops is added to the gate's sum (its summary).
The row of a new token, read from this, is the row that the parallel pass computes.

Axes: `B` sequences, `H` query heads, `G` KV groups, `d` head dim, `n` tokens taken in at once.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ...common.checks import whole_number
from ...common.tensors import read_tensors, write_tensors
from ..budget import Budget
from ..functional import check_budget, check_inputs
from ..gates import Gates
from ..rope import rotate
from .row import dense_row, sparse_row
from .slots import Slots
from .view import BankContents, view_of

ENDLESS = 1 << 62  # tokens: `plan_budget(cfg, ENDLESS)` at flux alpha 1, or following the length, never runs out
PIECE = 1 << 20  # (sequence, group, gate, key) entries that `extend` ranks at a time


class KVBank(Slots):
    """The bounded state of one attention layer for B sequences.

    Made by `KVBank.empty`; `extend` takes in a prefill, `step` one token per sequence and returns its output row.
    Both change the bank in place, without autograd. Memory is fixed, whatever the length, unless `budget.dense`: then
    this is a plain KV cache that grows with its tokens. `count` `(B,)`: kept tokens; `seen` `(B,)`: tokens,
    dropped ones included; `tokens`: the same as a Python int (it stands still while a CUDA graph replays a step).
    `reach`, tokens, None for no bound: once a sequence holds more, what has left the window stops ageing, step by step:
    no key ever seems farther from its reader than that. The parallel pass knows no such bound.
    """

    reach: int | None = None

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
    ) -> KVBank:
        """A bank that has seen nothing.

        budget: from `plan_budget`, for as many tokens as the sequence may come to hold (`ENDLESS` where alpha is 1).
        gates: the layer's, read at every step and never changed. inv_freq: `(d / 2,)` rotary frequencies in radians per
        token, or None. scale: of the scores, default d^-1/2. dtype: of stored keys and values. device: the gates'
        by default. int8: store keys and values in int8 with a float32 scale per row (not when dense).
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
        bank = cls(budget, gates, batch, torch.int8 if int8 and not budget.dense else dtype, device)
        bank.tokens = 0
        bank.scale = d**-0.5 if scale is None else float(scale)
        bank.inv_freq = None if inv_freq is None else inv_freq.to(device)
        return bank

    @property
    def batch(self) -> int:
        return len(self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of everything the bank holds, bookkeeping included."""
        return sum(getattr(self, name).nbytes for name in self.TENSORS)

    def __repr__(self) -> str:
        kind = "dense" if self.budget.dense else f"window {self.window}, ring {self.ring}"
        return f"KVBank(batch={self.batch}, tokens={self.tokens}, {kind}, {self.nbytes:,} bytes)"

    @torch.no_grad()
    def extend(self, k: Tensor, v: Tensor, *, keep: Tensor | None = None, positions: Tensor | None = None) -> None:
        """Take in n tokens at once: a prefill, or the next part of one. As n steps would, up to rounding of sums.

        k, v: un-rotated, `(B, n, G, d)`. keep: `(B, n)` bool, tokens that take part (padding is False).
        positions: `(n,)` or `(B, n)`, in tokens; by default they follow on from the last.
        Raises `ValueError` when the budget was planned for fewer tokens than the bank would hold.
        """
        self.gates.check_keys(k)
        check_inputs(k, k, v, self.gates, positions, keep, None, None)
        self._admit(k)
        piece = max(1, PIECE // self.left.numel())
        with torch.autocast(k.device.type, enabled=False):
            for i in range(0, k.shape[1], piece):
                cut = slice(i, i + piece)
                at = self._positions(None if positions is None else positions[..., cut], k[:, cut])
                turned = rotate(k[:, cut], at, self.inv_freq)
                self._take_in(k[:, cut], turned, v[:, cut], None if keep is None else keep[:, cut])

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
    ) -> Tensor:
        """Take in one token per sequence and return its row, `(B, 1, H, d)`: zero for dropped tokens, sleeping heads.

        q: `(B, 1, H, d)`, k and v: `(B, 1, G, d)`, un-rotated, H any multiple of G. keep: `(B, 1)` bool, False for
        a token that takes no part. awake: `(B, 1, H)` bool. positions: `(1,)` or `(B, 1)`, in tokens; by default
        they follow on. The same row as `proteus_attention` over all tokens so far, with this budget.
        Raises `TypeError` or `ValueError` naming the argument.
        """
        check_inputs(q, k, v, self.gates, positions, keep, awake, self.inv_freq)
        if q.shape[1] != 1:
            raise ValueError(f"q has {q.shape[1]} tokens: a step takes 1 per sequence; steps takes many")
        return self._advance(q, k, v, keep, awake, positions)

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
        """What n calls of `step` return, `(B, n, H, d)`, for tensors of n tokens, by as many calls as blocks begin.

        A GPU is waited for once per call, to see where each sequence's next block begins.
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

    def _advance(self, q: Tensor, k: Tensor, v: Tensor, keep, awake, positions) -> Tensor:
        """Take in tokens that stand in one block of each sequence, and return their rows."""
        self._admit(k)
        at = self._positions(positions, k)
        with torch.autocast(q.device.type, enabled=False):
            turned = rotate(torch.cat((q, k), dim=2), at, self.inv_freq)
            rotated, key = turned.split((q.shape[2], k.shape[2]), dim=2)
            self._write(k, key, v, keep)
            out = dense_row(self, rotated) if self.budget.dense else sparse_row(self, q, rotated)
        if keep is not None:
            out = out.masked_fill(~keep[..., None, None], 0)
        return out if awake is None else out.masked_fill(~awake[..., None], 0)

    def _admit(self, k: Tensor) -> None:
        """Check that k `(B, n, G, d)` fits, and make room for it where the cache is dense."""
        n = k.shape[1]
        if k.shape[0] != self.batch:
            raise ValueError(f"k has {k.shape[0]} sequences: must be the bank's {self.batch}")
        if k.device != self.rows.device:
            raise ValueError(f"k is on {k.device}: must be on {self.rows.device}, as the bank")
        if self.tokens + n > self.budget.tokens:
            raise ValueError(
                f"tokens={self.tokens + n}: the state was planned for at most {self.budget.tokens}; plan it for more"
            )
        self.tokens += n
        if self.budget.dense and self.tokens > self.window:
            self._grow(self.tokens)

    def _positions(self, positions: Tensor | None, like: Tensor) -> Tensor:
        """Positions `(B, n)` of the next n tokens; those after them will follow on."""
        n = like.shape[1]
        if positions is None:
            positions = self.next_position[:, None] + torch.arange(n, device=like.device)
        positions = positions.to(like.device).expand(self.batch, n)
        self.next_position.copy_(positions[:, -1] + 1)
        return positions

    def contents(self, batch: int = 0, group: int = 0) -> BankContents:
        """What is held of one sequence for one KV group, as plain numbers."""
        whole_number("batch", batch, 0, self.batch - 1)
        whole_number("group", group, 0, self.token.shape[1] - 1)
        return view_of(self, batch, group)

    def fork(self) -> KVBank:
        """An independent copy over the same gates: stepping one leaves the other as it is."""
        return self.select(torch.arange(self.batch, device=self.count.device))

    def select(self, rows: Tensor) -> KVBank:
        """A bank of the sequences at `rows` (n,) int64, in that order, repeats allowed: beams, or a smaller batch."""
        twin = copy.copy(self)
        with torch.inference_mode(False):
            for name in self.TENSORS:
                setattr(twin, name, getattr(self, name)[rows])
        return twin

    def state_dict(self) -> dict:
        """`{"about": plain values, "tensors": {name: tensor}}`; the tensors are the bank's own, not copies."""
        about = {"budget": self.budget.to_dict(), "gates": fingerprint(self.gates), "scale": self.scale}
        return {"about": about, "tensors": {name: getattr(self, name) for name in self.TENSORS}}

    def load_state_dict(self, state: dict) -> None:
        """Take over a copy of what `state_dict` gave, for the same gates, budget, scale, dtype and number of
        sequences. Raises `ValueError` naming what differs."""
        try:
            about, tensors = state["about"], {name: state["tensors"][name] for name in self.TENSORS}
        except (KeyError, TypeError) as problem:
            raise ValueError(f"state is not what state_dict gave: {problem} is missing") from problem
        for name, mine in self.state_dict()["about"].items():
            if about.get(name) != mine:
                raise ValueError(f"state has {name}={about.get(name)}: must be {mine}, as the bank")
        for name in self.TENSORS:
            old, new = getattr(self, name), tensors[name]
            sized = 2 if self.budget.dense else None  # a dense cache takes as many slots as come
            if new.shape[:sized] != old.shape[:sized] or new.dtype != old.dtype:
                raise ValueError(
                    f"state's {name} is {new.dtype} {tuple(new.shape)}: must be {old.dtype} {tuple(old.shape)}"
                )
        with torch.inference_mode(False):
            for name in self.TENSORS:
                setattr(self, name, tensors[name].to(self.rows.device, copy=True))
        self.tokens = int(self.seen.max())
        if self.budget.dense:
            self.window = self._spare

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
        tensors, about = read_tensors(path, "KVBank.save")
        try:
            budget, dtype, batch = Budget(**about["budget"]), tensors["rows"].dtype, len(tensors["count"])
            scale, theirs, freq = about["scale"], about["gates"], tensors.pop("inv_freq", None)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"path={str(path)!r}: not a file that KVBank.save wrote ({problem})") from problem
        if not isinstance(gates, Gates):
            raise TypeError(f"gates={type(gates).__name__}: expected Gates")
        if theirs != fingerprint(gates):
            raise ValueError(f"path={str(path)!r}: a bank of gates {theirs}: must be of gates {fingerprint(gates)}")
        kind = {"int8": True} if dtype == torch.int8 else {"dtype": dtype}
        bank = cls.empty(budget, gates, batch, inv_freq=freq, scale=scale, device=device, **kind)
        bank.load_state_dict({"about": about, "tensors": tensors})
        return bank


def fingerprint(gates: Gates) -> str:
    """Short name of what decides where keys fall: the prototypes, and which of them are alive."""
    digest = hashlib.sha256()
    for x in (gates.prototypes, gates.alive):
        digest.update(x.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
