"""Gate surgery on a live layer: clone, prune, merge or move gates, and add heads, without starting over.

A gate is a slot of one KV group: a prototype, a router row and the head it belongs to. Where a slot or a head is
added, parameters and buffers are replaced, so an optimiser must be rebuilt. Everything else is written in place, so
call these functions between a backward pass and the next forward pass.

Arguments: group in [0, G); gate in [0, C), a live slot; head in [0, H / G), index in the group. All functions raise
`TypeError` or `ValueError` naming the argument.
"""

from __future__ import annotations

from dataclasses import replace
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import whole_number
from .heads import check_linear
from .layer import ProteusAttention


def clone(attn: ProteusAttention, group: int, gate: int) -> int:
    """Copy a gate into a free slot (or a new one in every group) and return the slot.

    The two share the gate's routing probability half and half, and keys keep falling into one of them, so routing,
    reads and output stay as they were. The one exception: where the clone adds a slot, the budget reserves one more
    read for its note, which can shorten rings or leave no room for notes.
    """
    _check(attn, group, gate)
    gates = attn.gates
    if gates.alive[group].all():
        _grow(attn)
    slot = int((~gates.alive[group]).nonzero()[0])
    for table in (gates.prototypes, gates.confidence, gates.head_of_gate, gates.alive):
        table[group, slot] = table[group, gate]
    for table in (gates.pending_sum, gates.pending_count):
        table[group, slot] = 0
    gates.log_share[group, gate] -= log(2)
    gates.usage[group, gate] /= 2
    for table in (gates.log_share, gates.usage):
        table[group, slot] = table[group, gate]
    _copy_router_row(attn, group, gate, slot)
    return slot


def prune(attn: ProteusAttention, group: int, gate: int) -> None:
    """Remove a gate. Its keys fall into the next nearest gates and the other gates share its probability.

    The last live gate of a group cannot be removed, nor the last gate of a routed head.
    """
    _check(attn, group, gate)
    gates = attn.gates
    if int(gates.alive[group].sum()) == 1:
        raise ValueError(f"gate={gate}: the last live gate of group {group} cannot be pruned")
    _check_head_keeps_a_gate(attn, group, gate, "gate")
    gates.alive[group, gate] = False
    for table in (gates.usage, gates.pending_sum, gates.pending_count, gates.log_share):
        table[group, gate] = 0


def merge(attn: ProteusAttention, group: int, gate: int, other: int) -> None:
    """Fold `other` into `gate`: prototypes and router rows are averaged by usage, shares of probability added.

    For clones this is exact. The slot of `other` becomes free.
    """
    _check(attn, group, gate)
    _check(attn, group, other, "other")
    if gate == other:
        raise ValueError(f"other={other}: must be a different gate than gate={gate}")
    _check_head_keeps_a_gate(attn, group, other, "other", moving_to=int(attn.gates.head_of_gate[group, gate]))
    gates = attn.gates
    weight = gates.usage[group, [gate, other]].clamp(min=1e-9)
    weight = weight / weight.sum()
    for table in (gates.prototypes, gates.confidence):
        table[group, gate] = weight[0] * table[group, gate] + weight[1] * table[group, other]
    gates.prototypes[group, gate] = F.normalize(gates.prototypes[group, gate], dim=-1)
    for table in (gates.usage, gates.pending_sum, gates.pending_count):
        table[group, gate] += table[group, other]
    gates.log_share[group, gate] = torch.logaddexp(gates.log_share[group, gate], gates.log_share[group, other])
    if attn.router is not None:
        with torch.no_grad():
            rows = attn.router.weight[group]
            rows[gate] = weight[0] * rows[gate] + weight[1] * rows[other]
    prune(attn, group, other)


def move(attn: ProteusAttention, group: int, gate: int, head: int) -> None:
    """Give a gate to another head of its group. The shortlist does not change, but other heads may wake."""
    _check(attn, group, gate)
    whole_number("head", head, 0, attn.cfg.heads_per_group - 1)
    _check_head_keeps_a_gate(attn, group, gate, "gate", moving_to=head)
    attn.gates.head_of_gate[group, gate] = head


def add_head(attn: ProteusAttention) -> int:
    """Give every KV group one more query head and return its index in the group.

    The head starts with random queries and a zero output. Without routing the output stays as it was; with routing
    the new head gets a clone of the group's most used gate, and half of that gate's probability. Raises `TypeError` for
    an adapted q_proj or o_proj.
    """
    check_linear(q_proj=attn.q_proj, o_proj=attn.o_proj)
    cfg, gates = attn.cfg, attn.gates
    G, r, d, D = cfg.n_kv_heads, cfg.heads_per_group, cfg.head_dim, cfg.d_model
    new_rows = torch.randn(G, 1, d, D, device=attn.q_proj.weight.device) * cfg.init_scale * D**-0.5
    q = torch.cat((attn.q_proj.weight.detach().view(G, r, d, D), new_rows.to(attn.q_proj.weight.dtype)), dim=1)
    o = F.pad(attn.o_proj.weight.detach().view(D, G, r, d), (0, 0, 0, 1))
    q_bias = F.pad(attn.q_proj.bias.detach().view(G, r, d), (0, 0, 0, 1)).flatten() if cfg.bias else None
    attn.q_proj = _linear(attn.q_proj, q.reshape(-1, D), q_bias)
    attn.o_proj = _linear(attn.o_proj, o.reshape(D, -1), attn.o_proj.bias)
    most = r + 1 if cfg.heads_awake_max == r else cfg.heads_awake_max
    if attn.router is None:
        attn.cfg = replace(cfg, n_heads=G * (r + 1), heads_awake_max=most)
        return r
    wanted = max(cfg.gates_per_group, r + 1)
    attn.cfg = replace(cfg, n_heads=G * (r + 1), heads_awake_max=most, gates_per_group=wanted)
    while gates.gates_per_group < wanted:
        _grow(attn)
    attn.router.balance, attn.router.pending_load = (
        F.pad(x, (0, 1)) for x in (attn.router.balance, attn.router.pending_load)
    )
    for g in range(G):
        busiest = int(gates.usage[g].masked_fill(~gates.alive[g], -1).argmax())
        move(attn, g, clone(attn, g, busiest), r)
    return r


def _check_head_keeps_a_gate(attn: ProteusAttention, group: int, gate: int, name: str, moving_to: int = -1) -> None:
    """Raise if a routed head would be left without a gate: it could still be woken, at probability 0."""
    heads = attn.gates.head_of_gate[group]
    head = int(heads[gate])
    if attn.router is not None and head != moving_to and int(((heads == head) & attn.gates.alive[group]).sum()) == 1:
        raise ValueError(f"{name}={gate}: the last gate of head {head} in group {group} must stay with it")


def _linear(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these tensors, in the mode of `old`."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new.train(old.training)


def _grow(attn: ProteusAttention) -> None:
    """Add one free slot to every group."""
    gates = attn.gates
    for name in ("prototypes", "pending_sum"):
        setattr(gates, name, F.pad(getattr(gates, name), (0, 0, 0, 1)))
    for name in ("alive", "confidence", "usage", "head_of_gate", "log_share", "pending_count"):
        setattr(gates, name, F.pad(getattr(gates, name), (0, 1)))
    if attn.router is not None:
        attn.router.weight = nn.Parameter(F.pad(attn.router.weight.detach(), (0, 0, 0, 1)))
    attn.cfg = replace(attn.cfg, gates_per_group=gates.gates_per_group)


def _copy_router_row(attn: ProteusAttention, group: int, source: int, target: int) -> None:
    if attn.router is not None:
        with torch.no_grad():
            attn.router.weight[group, target] = attn.router.weight[group, source]


def _check(attn: ProteusAttention, group: int, gate: int, name: str = "gate") -> None:
    if not isinstance(attn, ProteusAttention):
        raise TypeError(f"attn={type(attn).__name__}: expected ProteusAttention")
    gates = attn.gates
    for label, value, size in (("group", group, gates.n_groups), (name, gate, gates.gates_per_group)):
        whole_number(label, value, 0, size - 1)
    if not gates.alive[group, gate]:
        live = gates.alive[group].nonzero()[:, 0].tolist()
        raise ValueError(f"{name}={gate}: not a live gate of group {group}; live: {live}")
