"""One tile of attention: softmax over its keys, and the log-sum-exp by which tiles are merged.

Axes: `N` and `h` any two batch axes, `M` rows, `K` keys, `d` head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...precision import at_least_float32

_FUSED_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_CUDA = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
HALVES = (torch.float16, torch.bfloat16)


def attend_tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `(N, h, M, d)` over `(N, h, K, d)`: out like q, log-sum-exp `(N, h, M)` float32.

    bias: `(N, h, M, K)` in q's dtype, added to the scaled scores, -inf where a row may not read; on a GPU its rows
    start at multiples of 8 elements (a slice of a wider tensor). None is the causal mask of M = K. Every row must
    read at least one key: for an empty row the result of the fused kernels differs between versions.
    Without autograd this is one fused kernel, on the matrix units of any NVIDIA GPU from sm_75 on. These kernels
    are not public API; the last lines compute the same, and run where a kernel is missing.
    """
    if not torch.is_grad_enabled():
        if fuses_on_cuda(q):
            out, lse = _FUSED_CUDA(q, k, v, bias, True, 0.0, bias is None, scale=scale)[:2]
            return out, lse[..., : q.shape[2]]
        if _FUSED_CPU and q.device.type == "cpu" and q.dtype == torch.float32:
            return _FUSED_CPU(q, k, v, is_causal=bias is None, attn_mask=bias, scale=scale)
    score = at_least_float32(q @ k.transpose(-1, -2)) * scale
    if bias is None:
        bias = score.new_full(score.shape[2:], -torch.inf).triu(1)
    score = score + bias
    lse = score.logsumexp(-1, keepdim=True)
    return (score - lse).exp().to(v.dtype) @ v, lse[..., 0]


def fuses_on_cuda(q: Tensor) -> bool:
    """Whether PyTorch's memory-efficient kernel takes this head dim, dtype and device."""
    known = q.dtype in HALVES or q.dtype == torch.float32
    return bool(_FUSED_CUDA and q.is_cuda and torch.version.cuda and known and q.shape[-1] % 8 == 0)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a contiguous `x` (R, D) at `index` (any shape): `(*index.shape, D)`."""
    if torch.is_grad_enabled() or x.shape[1] * x.element_size() % 16:
        rows = x.index_select(0, index.flatten())
    elif x.is_cuda:  # element by element, 8 bytes each: PyTorch's kernel for whole rows takes nine times as long
        wide = x.view(torch.float64)
        parts = torch.arange(wide.shape[1], device=x.device, dtype=index.dtype if wide.numel() < 1 << 31 else None)
        rows = wide.flatten().index_select(0, (index.flatten()[:, None] * len(parts) + parts).flatten()).view(x.dtype)
    else:  # 16 bytes at a time
        rows = x.view(torch.complex128).index_select(0, index.flatten()).view(x.dtype)
    return rows.view(*index.shape, x.shape[1])
