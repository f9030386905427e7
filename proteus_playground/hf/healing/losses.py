"""The losses of a student. Logits are made for a few hundred tokens at a time, so all of them never exist at once.

Axes: `N` tokens, `D` model width, `V` vocabulary, `B` batch, `T` tokens of a row, `H` query heads, `G` KV groups,
`C` gates per group, `d` head dim, `R` query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...attention import Gates
from ...attention.rope import rotate
from ...lm.losses import relative_square
from ..attention_call import AttentionCall
from .rows import IGNORED

Head = Callable[[Tensor], Tensor]  # hidden states (N, D) -> logits (N, V)
LOGITS = 1 << 26  # logits in memory at a time
QUERY_ROWS = 128  # of each text whose attention the gates are compared with
LEAST_PAST = 0.25  # share of a text in front of these rows


def token_losses(
    student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and cross-entropy of the next token, each summed over the tokens that are learned, nats.

    student, teacher: hidden states `(N, D)`, targets: `(N,)`, IGNORED where nothing is learned.
    """
    learned = targets != IGNORED
    student, teacher, targets = student[learned], teacher[learned], targets[learned]
    step = max(1, LOGITS // head(teacher[:1].detach()).shape[-1])
    kl = ce = student.new_zeros((), dtype=torch.float32)
    for rows, wanted, next_ids in zip(student.split(step), teacher.split(step), targets.split(step), strict=True):
        more = checkpoint(_piece, rows, head, wanted, teacher_head, next_ids, use_reentrant=False)
        kl, ce = kl + more[0], ce + more[1]
    return kl, ce


def _piece(student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        wanted = teacher_head(teacher).float().log_softmax(-1)
    got = head(student).float().log_softmax(-1)
    return F.kl_div(got, wanted, reduction="sum", log_target=True), F.nll_loss(got, targets, reduction="sum")


def output_match(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], real: Tensor | None) -> Tensor:
    """Squared distance of attention outputs `(B, T, D)` over the teacher's square, mean of the layers.

    real: `(B, T)`, False at padding.
    """
    parts = []
    for layer, wanted in teacher.items():
        got = student[layer]
        if real is not None:
            got, wanted = got[real], wanted[real]
        parts.append(relative_square(got, wanted))
    return torch.stack(parts).mean()


def gate_loss(prototypes: Tensor, gates: Gates, call: AttentionCall, window: int) -> Tensor:
    """Cross-entropy between softmax(q.p) and the share of dense attention that each gate's keys get, nats per row.

    prototypes: `(G, C, d)`, what is trained. Only keys further back than `window` count, and each row counts by the
    attention that it gives to them. Rows are taken evenly from the last three quarters of the text. Which keys a gate
    holds is decided by `gates`, without a gradient. Scores are multiplied by the mean length of the keys and the
    attention's own scale, since a prototype stands for keys of that length.
    """
    q, k, real = call.q.detach(), call.k.detach(), call.keep
    B, T, H, d = q.shape
    G, C = prototypes.shape[:2]
    rows = torch.linspace(int(T * LEAST_PAST), T - 1, min(QUERY_ROWS, T), device=q.device).long()
    with torch.no_grad():
        mass = _mass_by_gate(q, k, gates, call, rows, window)  # (B, H, R, C)
        length = k.float().norm(dim=-1).mean((0, 1))  # (G,)
    with torch.autocast(q.device.type, enabled=False):
        unit = F.normalize(prototypes, dim=-1).repeat_interleave(H // G, dim=0)  # (H, C, d)
        score = torch.einsum("brhd,hcd->bhrc", q[:, rows].float(), unit)
        score = score * (call.scale * length).repeat_interleave(H // G)[:, None, None]
        score = score.masked_fill(~gates.alive.repeat_interleave(H // G, dim=0)[:, None], -1e4).log_softmax(-1)
        each = -(mass * score).sum(-1)  # (B, H, R)
    if real is not None:
        mass, each = (x * real[:, rows][:, None].reshape(B, 1, -1, *(1,) * (x.dim() - 3)) for x in (mass, each))
    return each.sum() / mass.sum().clamp(min=1e-6)


def _mass_by_gate(q: Tensor, k: Tensor, gates: Gates, call: AttentionCall, rows: Tensor, window: int) -> Tensor:
    """Dense attention of query rows `(R,)` on the far keys of each gate: `(B, H, R, C)` float32."""
    B, T, H, d = q.shape
    each = H // k.shape[2]
    positions = call.positions.expand(B, T)
    turned = rotate(k, positions, call.inv_freq).float().repeat_interleave(each, dim=2)
    score = torch.einsum("brhd,bshd->bhrs", rotate(q[:, rows], positions[:, rows], call.inv_freq).float(), turned)
    key = torch.arange(T, device=q.device)
    hidden = key > rows[:, None]
    hidden = hidden[None] if call.keep is None else hidden[None] | ~call.keep[:, None]
    share = (score * call.scale).masked_fill(hidden[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    share = share * (key < rows[:, None] - window)
    gate = gates.lure(k)[0].transpose(1, 2).repeat_interleave(each, dim=1)  # (B, H, T)
    mass = share.new_zeros(*share.shape[:3], gates.gates_per_group)
    return mass.scatter_add_(-1, gate[:, :, None].expand_as(share), share)
