"""The one public door to the backends: it chooses, says why, and dispatches to bare kernels.

`dense` is fused `scaled_dot_product_attention`; `reference` and `torch` compute the shortlist.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import BACKENDS
from ..shortlist import Shortlist

LSE_ROWS = 1 << 22  # scores per piece while a dense log-sum-exp is worked out


def choose_backend(device: torch.device | str, wanted: str = "auto") -> tuple[str, str]:
    """The backend for a device and one sentence saying why. An explicit name is never replaced.

    Raises `ValueError` for an unknown name.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"backend={wanted!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    if wanted != "auto":
        return wanted, "asked for by name"
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return ("torch", f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}): PyTorch tiles on its matrix units")
    if device.type == "mps":
        return "torch", "Apple GPU: PyTorch tiles"
    return "torch", "CPU: PyTorch tiles, no GPU is in use"


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Run a chosen backend: rotated q `(B, T, H, d)`, k and v `(B, T, G, d)` -> out, log-sum-exp `(B, T, H)`."""
    if backend == "reference":
        from .reference import attend as run
    else:
        from .torch import attend as run
    return run(q, k, v, short, scale)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused causal attention over everything, `(B, T, H, d)`; k and v `(B, T, G, d)`."""
    grouped = q.shape[2] != k.shape[2]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    if grouped and q.device.type != "cpu":  # not every GPU kernel takes groups; a fused one is worth the copy
        kh, vh = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (kh, vh))
        grouped = False
    return F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


@torch.no_grad()
def dense_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of causal scores, `(B, T, H)` float32, in pieces of rows; for display, no gradient."""
    B, T, H, _ = q.shape
    kh = k.repeat_interleave(H // k.shape[2], dim=2).permute(0, 2, 3, 1).float()  # (B, H, d, T)
    step = max(1, LSE_ROWS // (B * H * T))
    at = torch.arange(T, device=q.device)
    pieces = []
    for i in range(0, T, step):
        score = q[:, i : i + step].float().transpose(1, 2) @ kh * scale
        pieces.append(score.masked_fill(at > at[i : i + step, None], -torch.inf).logsumexp(-1))
    return torch.cat(pieces, dim=2).transpose(1, 2)


def everything(gate: Tensor, heads: int) -> Shortlist:
    """A shortlist that holds every key, for the oracle when the budget is dense; gate `(B, T, G)`."""
    B, T, G = gate.shape
    return Shortlist(
        window=T,
        block=1,
        anchors=0,
        ring=0,
        notes=False,
        gate=torch.full_like(gate, -1),
        left=gate.new_zeros(B, G, T, 1),
        probes=gate.new_full((B, T, heads, 0), -1),
    )
