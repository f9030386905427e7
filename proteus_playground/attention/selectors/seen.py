"""What rows of one layer read and give, for each selector and for each thing that is taken away: for display, by masks.

Our own choice follows the rule of the `reference` backend, at every flux alpha, with dropped tokens and sleeping heads.
Other selectors get the same L, the same tokens and the same awake heads.

Axes: `T` tokens, `S` tokens that take part, `R` rows, `H` query heads, `G` KV groups, `C` gates, `d` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter import LayerRun, ProteusLayer
from ..backends.reference import Memberships, memberships
from ..budget import Budget
from ..decide import TokenDecisions, weigh
from ..functional import AttentionResult
from ..precision import at_least_float32
from ..rows import ANCHOR, DNA, LOCAL, NOTE, UNSEEN, RowReads
from ..shortlist import Shortlist, build_shortlist
from .attend import LONGEST, choose, row_steps
from .protocol import Sight, StandIns
from .way import Way


@dataclass(frozen=True)
class SeenRun(LayerRun):
    """`LayerRun` by masks; `first`: attention that each row gives the anchors, or the first token, `(1, T, H)`."""

    first: Tensor | None = None
    looks: float = 0.0  # summaries or keys that a row compares without reading them, averaged over rows


class _Rows(NamedTuple):
    out: Tensor  # (1, H, R, d)
    weight: Tensor  # (1, H, R, S), attention of each key; a note's is divided evenly among its keys
    read: Memberships
    reads: Tensor  # (1, H, R)


class Seeing:
    """One layer over one text, ready to be asked for rows. q `(1, T, H, d)`, k and v `(1, T, G, d)`, un-rotated.

    logits: `(1, T, G, gates)` of a trained router, where there is one.
    """

    def __init__(
        self, way: Way, layer: int, runner: ProteusLayer, q: Tensor, k: Tensor, v: Tensor, *,
        inv_freq: Tensor | None, scale: float, logits: Tensor | None = None,
    ):  # fmt: skip
        self.way, self.layer, self.gates, self._whole = way, layer, runner.gates, q.shape
        self.decisions: TokenDecisions = runner.decide(q, k, logits=logits)
        keep = self.decisions.keep
        self.at = torch.arange(q.shape[1], device=q.device) if keep is None else keep[0].nonzero()[:, 0]  # (S,)
        q, k, v = (x[:, self.at] for x in (q, k, v))
        self.budget: Budget = self.decisions.budget
        config = replace(runner.config, shortlist=max(1, min(self.budget.shortlist, q.shape[1])))
        self.sight = Sight.of(q, k, v, config, inv_freq=inv_freq, positions=self.at, gates=runner.gates, scale=scale)
        self.lured = self.gates.lure(k)[0]  # (1, S, G)
        self._q, self._short = q, None
        kept = set(self.at.tolist()) if way.without.keys else ()
        place = {token: index for index, token in enumerate(self.at.tolist())} if kept else {}
        self._without = replace(way.without, keys=tuple(place[key] for key in way.without.keys if key in place))

    @property
    def short(self) -> Shortlist | None:
        """Our index tables; None where the budget holds every key."""
        if self._short is None and not self.budget.dense:
            self._short = build_shortlist(self.lured, self._q, self.gates, self.budget, None)
        return self._short

    @property
    def gate(self) -> Tensor:
        """The gate of each key `(1, S, G)`, -1 for anchors."""
        first = self.budget.anchors if not self.budget.dense else 0
        anchor = torch.arange(len(self.at), device=self.at.device) < first
        return self.lured.masked_fill(anchor[:, None], -1)

    def _choice(self, rows: Tensor) -> tuple[Memberships, StandIns | None]:
        selector, (H, S) = self.way.chooser(), self.sight.q.shape[1:3]
        if selector is not None and not self.budget.dense:
            found = choose(selector, self.sight, rows)
            return _kinds(found.keys, rows, self.sight.anchors), found.stand_ins
        if self.short is not None:
            return memberships(self.short, H, rows), None
        every = (torch.arange(S, device=rows.device) <= rows[:, None]).expand(1, H, -1, -1)
        none = torch.zeros_like(every)
        return Memberships(every, none, none, none), None

    def see(self, rows: Tensor) -> _Rows:
        """rows `(R,)`: places among the tokens that take part. Raises as `choose`."""
        read, stand_ins = self._choice(rows)
        read = self._without.lessen(read, rows, self.gate[0].T, self.layer)
        if self._without.notes:
            stand_ins = None
        return _attend(self.sight, rows, read, self.gate[0].T, stand_ins)

    def scatter(self, x: Tensor) -> Tensor:
        """`(1, S, ...)` of the tokens that take part -> `(1, T, ...)`, 0 for the others."""
        whole = x.new_zeros(1, self._whole[1], *x.shape[2:])
        whole[:, self.at] = x
        return whole

    def finish(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Heads' outputs `(1, R or S, H, d)`, weighted by routing; heads that are asleep or taken away are 0."""
        weight = self.decisions.weight
        at = self.at if rows is None else self.at[rows]
        out = weigh(out, None if weight is None else weight[:, at])
        lost = [head for layer, head in self.way.without.heads if layer == self.layer and head < out.shape[2]]
        if lost:
            out = out.index_fill(2, torch.tensor(lost, device=out.device), 0)
        return out


def see_layer(seeing: Seeing, stop: Callable[[], object] = lambda: None) -> SeenRun:
    """Every row. `stop` is called between parts of the rows and may raise. ValueError beyond `LONGEST` tokens."""
    way, sight, T = seeing.way, seeing.sight, seeing._whole[1]
    refuse_long(T)
    first = max(1, seeing.budget.anchors)
    outs, reads, firsts, looks = [], [], [], 0.0
    selector = way.chooser()
    if selector is None and not seeing.budget.dense:
        looks = float(seeing.gates.gates_per_group * len(seeing.at))
    for rows in row_steps(1, sight.q.shape[1], len(seeing.at), sight.q.device):
        stop()
        seen = seeing.see(rows)
        outs.append(seen.out.transpose(1, 2))
        reads.append(seen.reads.transpose(1, 2))
        firsts.append(seen.weight[..., :first].sum(-1).transpose(1, 2))
        if selector is not None and not seeing.budget.dense:
            looks += float(selector.count_looks(sight, rows).sum())
    decisions = seeing.decisions
    awake = decisions.awake
    reads = seeing.scatter(torch.cat(reads, 1))
    if awake is not None:
        reads = reads.masked_fill(~awake, 0)
    out = seeing.scatter(seeing.finish(torch.cat(outs, 1)))
    gate = seeing.scatter(seeing.gate + 1) - 1
    why = "for display, not timed"
    result = AttentionResult(out, None, reads, gate, "masks", why)
    first_share = seeing.scatter(torch.cat(firsts, 1))
    return SeenRun(out, result, seeing.budget, decisions.keep, awake, decisions.weight, first_share,
                   looks / max(1, len(seeing.at)))  # fmt: skip


def refuse_long(tokens: int) -> None:
    """ValueError beyond `LONGEST` tokens."""
    if tokens > LONGEST:
        raise ValueError(
            f"{tokens:,} tokens: other selectors, and what is taken away, are computed by masks, which take time in "
            f"proportion to the square of the length; allowed is up to {LONGEST:,}"
        )


def see_row(seeing: Seeing, token: int, head: int) -> RowReads:
    """What row (token, head) reads; the head must be awake there and the token take part."""
    T, at = seeing._whole[1], seeing.at
    row = (at == token).nonzero()[:, 0]
    seen = seeing.see(row)
    code = torch.full((T,), UNSEEN, dtype=torch.uint8)
    parts = seen.read
    for kind, mask in ((LOCAL, parts.window), (ANCHOR, parts.anchors), (DNA, parts.rings), (NOTE, parts.notes)):
        code[at[mask[0, head, 0]].cpu()] = kind
    weight = torch.zeros(T)
    weight[at.cpu()] = seen.weight[0, head, 0].float().cpu()
    if any((seeing.layer, head) == lost for lost in seeing.way.without.heads):
        weight.zero_()
        code.zero_()
    opened, group = (), head // (seeing.sight.q.shape[1] // seeing.sight.groups)
    lost = {gate for layer, g, gate in seeing.way.without.gates if (layer, g) == (seeing.layer, group)}
    if seeing.way.chooser() is None and seeing.short is not None and not seeing.way.without.rings:
        row_gates = seeing.short.probes[0, row[0], head].tolist()
        opened = tuple(int(c) for c in row_gates if c >= 0 and int(c) not in lost)
    noted = seeing.gate[0, parts.notes[0, head, 0], group]
    return RowReads(code.numpy(), weight.numpy(), opened, len(noted.unique()))


def _kinds(keys: Tensor, rows: Tensor, anchors: int) -> Memberships:
    """Chosen keys `(1, H, R, S)` by how they lie: the unbroken run that ends at the row, the first ones, the others."""
    at = torch.arange(keys.shape[-1], device=keys.device)
    gap = torch.where(~keys & (at <= rows[:, None]), at, -1).amax(-1, keepdim=True)  # the newest key that is not read
    window = keys & (at > gap)
    first = keys & ~window & (at < anchors)
    return Memberships(window, first, keys & ~window & ~first, torch.zeros_like(keys))


def _attend(sight: Sight, rows: Tensor, read: Memberships, gate: Tensor, stand_ins: StandIns | None) -> _Rows:
    """One softmax over keys read one by one, the notes of our gates, and a selector's stand-ins.

    A note's score is the mean of its keys' scores plus log(count), since a mean key's product is the mean product.
    """
    q, k, v = (at_least_float32(x) for x in (sight.rotated_q[:, :, rows], sight.rotated_k, sight.v))
    score = q @ k.transpose(-1, -2) * sight.scale
    direct = read.direct
    parts, reads = [score.masked_fill(~direct, -torch.inf)], direct.sum(-1)
    has_notes = bool(read.notes.any())
    if has_notes:
        home = gate.clamp(min=0).repeat_interleave(score.shape[1] // len(gate), 0)[None, :, None].expand_as(score)
        C = int(gate.max()) + 1
        noted = read.notes.to(score.dtype)
        zeros = score.new_zeros(*score.shape[:3], C)
        count = zeros.scatter_add(-1, home, noted)
        mean = zeros.scatter_add(-1, home, score * noted) / count.clamp(min=1)
        parts.append((mean + count.clamp(min=1).log()).masked_fill(count == 0, -torch.inf))
        reads = reads + (count > 0).sum(-1)
    if stand_ins is not None:
        key, value, size = stand_ins
        mean = (at_least_float32(key) @ q[..., None])[..., 0] * sight.scale + size.clamp(min=1).to(q.dtype).log()
        parts.append(mean.masked_fill(size == 0, -torch.inf))
        reads = reads + (size > 0).sum(-1)
    p = torch.cat(parts, -1).softmax(-1).nan_to_num(0)  # a row that reads nothing any more gives 0
    S = score.shape[-1]
    weight = p[..., :S]
    if has_notes:
        weight = weight + noted * (p[..., S : S + C] / count.clamp(min=1)).gather(-1, home)
    out = weight @ v
    if stand_ins is not None:
        out = out + (p[..., None, -size.shape[-1] :] @ at_least_float32(value))[..., 0, :]
    return _Rows(out.to(sight.q.dtype), weight, read, reads)
