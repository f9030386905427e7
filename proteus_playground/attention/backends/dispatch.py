"""Chooses a backend, says why, and calls it. No other module imports `pytorch` or `fused`.

`dense` is fused `scaled_dot_product_attention`; `reference`, `torch` and `triton` compute the shortlist, all called by
`attend`. `rotate` has a kernel of its own in `torch` and `triton`; `route`, `in_pieces`, `bank_step` and `bank_fill`
only run in `triton`, which is imported when it is first needed.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..budget import Budget
from ..config import BACKENDS
from ..gates import Gates
from ..int8 import through_int8
from ..precision import at_least_float32
from ..shortlist import Shortlist, build_shortlist, everything
from ..transforms import in_forward_mode, is_transformed

SCORES_PER_STEP = 1 << 22  # scores held at a time while a dense log-sum-exp is computed


@torch.compiler.assume_constant_result
def choose_backend(
    device: torch.device | str, wanted: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.float16
) -> tuple[str, str]:
    """The backend for a device, head dim and precision, and one sentence saying why.

    A backend asked for by name is used or refused, never replaced by another. Raises `ValueError` for an unknown name,
    and for 'triton' where its kernels do not run or would be slow.
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


def without_triton(wanted: str) -> tuple[str, str]:
    """The backend for a GPU where Triton's kernels have no derivative, and why. Raises `ValueError` for 'triton'."""
    why = "torch.func and forward-mode derivatives reach no Triton kernel"
    if wanted == "triton":
        raise ValueError(f"backend='triton': {why}; must be 'auto', 'torch' or 'reference' here")
    return "torch", f"PyTorch tiles: {why}"


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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    budget: Budget,
    *,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    length: Tensor | None,
    awake: Tensor | None,
    scale: float,
    int8: bool,
    explain: bool,
    backend: str,
    return_index: bool = False,
) -> tuple[Tensor, Tensor, Shortlist | None, Any]:
    """Run `reference`, `torch` or `triton`, whose arguments have been checked.

    q `(B, T, H, d)`, k and v `(B, T, G, d)`, un-rotated, tokens that take part first. length: `(B,)`, how many of the T
    tokens those are; None for all. awake: `(B, T, H)` bool, heads whose rows count; None for all. Other arguments as in
    `proteus_attention`. Returns out like q, log-sum-exp `(B, T, H)` float32, the shortlist that was read, which may be
    None unless `explain`, and what `bank_fill` takes, None from other backends than Triton. Rows that do not count hold
    anything.
    """
    where = {"positions": positions, "inv_freq": inv_freq}
    if backend == "triton":
        from .fused.operators import attend as run

        how = {"scale": scale, "int8": int8, "explain": explain, "return_index": return_index}
        return run(q, k, v, gates, budget, **where, length=length, awake=awake, **how)
    if backend == "reference":
        from .reference import attend as run
    else:
        from .pytorch.tiles import attend as run
    with torch.no_grad():
        gate, heads = gates.lure(k)[0], q.shape[2]
        short = everything(gate, heads) if budget.dense else build_shortlist(gate, q, gates, budget, length)
    q, k = rotate(q, **where), rotate(k, **where)
    if int8 and not budget.dense:
        k, v = through_int8(k), through_int8(v)
    return *run(q, k, v, short, scale), short, None


def rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor | None) -> Tensor:
    """Rotary position embedding: turn each feature pair of `x` by position x frequency.

    x: `(B, T, N, d)`; positions: `(B, T)` or `(T,)`, in tokens, None for 0, 1, ...; inv_freq: `(d / 2,)`, radians per
    token, or None for no rotation. Angles are float64, reduced to one turn: off by up to 2.5e-16 x angle,
    which is 1e-6 at 2^31 radians. On MPS, which has no float64, they are float32, off by up to 6e-8 x angle.
    Cosine and sine are float32, or float64 for a float64 `x`. Negative positions undo a rotation.
    """
    if inv_freq is None:
        return x
    plain = not x.is_cuda or x.stride(-1) != 1 or is_transformed()
    if not plain and probe_triton(x.device, x.shape[-1], x.dtype)[0]:
        from .fused.operators import rotate as run
    else:
        from .pytorch.rotation import rotate as run
    return run(x, positions, inv_freq)


def route(
    q: Tensor, logits: Tensor, gates: Gates, balance: Tensor, budget: Budget, temperature: float, prior_max: float
) -> tuple[Tensor, Tensor]:
    """`routing` in one Triton kernel, without autograd: awake int8 and weight float32, both `(B, T, H)`.

    q: `(B, T, H, d)` un-rotated; logits: `(B, T, G C)`; balance: `(G, H / G)`; temperature and prior_max: those of the
    config's prior.
    """
    from .fused.operators import route as run

    return run(q, logits, gates, balance, budget, temperature, prior_max)


def in_pieces(gates: Gates, budget: Budget, **sizes):
    """A text a piece at a time, without autograd, in Triton: see `fused.pieces.Pieces` for the arguments."""
    from .fused.pieces import Pieces

    return Pieces(gates, budget, **sizes)


def bank_step(device: torch.device, head_dim: int, dtype: torch.dtype):
    """The kernels that take one token into a KV bank, see `fused.bank_step.step`; None where they do not run."""
    if device.type != "cuda" or is_transformed() or not probe_triton(device, head_dim, dtype)[0]:
        return None
    from .fused.bank_step import step

    return step


def bank_fill(bank, index, positions: Tensor | None) -> bool:
    """Fill an empty KV bank from the index that `attend` returned, if it can: see `fused.bank_fill.fill`."""
    from .fused.bank_fill import fill

    return fill(bank, index, positions)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Fused causal attention over everything, `(B, T, H, d)`; k and v `(B, T, G, d)`."""
    grouped = q.shape[2] != k.shape[2]
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    order = _fastest(q.device) if q.dtype in (torch.float16, torch.bfloat16) else None
    if grouped and q.device.type != "cpu" and order is None:  # not every GPU kernel takes groups
        kh, vh = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (kh, vh))
        grouped = False
    order = [SDPBackend.MATH] if in_forward_mode() else order  # the only kernel with such a derivative
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
    """Log-sum-exp of causal scores, `(B, T, H)` float32, some rows at a time; for display, no gradient."""
    B, T, H, _ = q.shape
    kh = at_least_float32(k).repeat_interleave(H // k.shape[2], dim=2).permute(0, 2, 3, 1)  # (B, H, d, T)
    step = max(1, SCORES_PER_STEP // (B * H * T))
    at = torch.arange(T, device=q.device)
    parts = []
    for i in range(0, T, step):
        score = at_least_float32(q[:, i : i + step]).transpose(1, 2) @ kh * scale
        parts.append(score.masked_fill(at > at[i : i + step, None], -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=2).transpose(1, 2)
