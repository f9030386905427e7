"""The one public door to the backends: it chooses, says why, and dispatches to bare kernels.

`dense` is fused `scaled_dot_product_attention`; `reference`, `torch` and `triton` compute the shortlist.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import BACKENDS
from ..shortlist import Shortlist

LSE_ROWS = 1 << 22  # scores per piece while a dense log-sum-exp is worked out


@torch.compiler.assume_constant_result
def choose_backend(
    device: torch.device | str, wanted: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.float16
) -> tuple[str, str]:
    """The backend for a device, head dim and precision, and one sentence saying why. A name is never replaced.

    Raises `ValueError` for an unknown name, and for 'triton' where its kernels cannot run as they should.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"backend={wanted!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    if wanted in ("reference", "torch"):
        return wanted, "asked for by name"
    device = torch.device(device)
    fits, why = probe_triton(device, head_dim, dtype)
    if wanted == "triton":
        if not fits:
            raise ValueError(f"backend='triton': {why}; must be 'auto', 'torch' or 'reference' here")
        return wanted, "asked for by name"
    if fits and device.type == "cuda":
        return "triton", why
    if device.type == "cuda":
        return "torch", f"PyTorch tiles. {why}"
    return "torch", {"mps": "Apple GPU: PyTorch tiles"}.get(device.type, "CPU: PyTorch tiles, no GPU is in use")


@torch.compiler.assume_constant_result
@cache
def probe_triton(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether Triton's kernels can be used, and one sentence saying why."""
    if find_spec("triton") is None:
        return False, "Triton is not installed"
    most = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}.get(dtype, 0)
    if head_dim > most:
        return False, f"head_dim={head_dim} is more than the {most} that the Triton kernels hold in {dtype}"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        needs = f"Triton needs an NVIDIA or AMD GPU, this is {device.type}"
        return interpreted, "interpreted" if interpreted else needs
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        fits = arch.startswith(("gfx11", "gfx12", "gfx90a", "gfx94", "gfx95"))
        return fits, f"{name} ({arch}): {'fused Triton kernels' if fits else 'no matrix units that Triton reaches'}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return False, f"{name} (sm_{major}{minor}): below sm_80 Triton multiplies matrices without tensor cores"
    return True, f"{name} (sm_{major}{minor}): fused Triton kernels"


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Run `reference` or `torch`: rotated q `(B, T, H, d)`, k and v `(B, T, G, d)` -> out, log-sum-exp `(B, T, H)`."""
    if backend == "reference":
        from .reference import attend as run
    else:
        from .pytorch.tiles import attend as run
    return run(q, k, v, short, scale)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused causal attention over everything, `(B, T, H, d)`; k and v `(B, T, G, d)`."""
    grouped = q.shape[2] != k.shape[2]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    order = _fastest(q.device) if q.dtype in (torch.float16, torch.bfloat16) else None
    if grouped and q.device.type != "cpu" and order is None:  # not every GPU kernel takes groups
        kh, vh = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (kh, vh))
        grouped = False
    with sdpa_kernel(order, set_priority=True) if order else nullcontext():
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


@torch.compiler.assume_constant_result
@cache
def _fastest(device: torch.device) -> list[SDPBackend] | None:
    """SDPA's kernels, fastest first, where PyTorch's own order is not: cuDNN leads on Hopper and later."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9:
        return None
    return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
