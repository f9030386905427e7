"""The floor: the least time that a case could take on this device.

It is the longer of two times: that of the case's arithmetic at the measured rate of a matmul, and that of its bytes at
the measured rate of a copy. Arithmetic: the projections, and four operations per feature, row and key read. A training
pass counts the projections three times and the attention three and a half times, because its backward pass computes
the scores again. Bytes: every input, weight and incoming gradient is read once, every output and gradient written once.
"""

from __future__ import annotations

from functools import partial

import torch

from .measure import clock
from .rivals import BenchCase

TRIES = 10


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict:
    """Best of ten: FLOP/s of a square matmul on random data, bytes/s (read and written) of a large copy."""
    side, size = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    gen = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=gen, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)
    matmul, copy = (
        min(clock(run, device)[0] for _ in range(TRIES))
        for run in (partial(torch.mm, a, b, out=product), partial(target.copy_, source))
    )
    return {"matmul_flops_per_s": 2 * side**3 / matmul * 1e3, "matmul_side": side,
            "copy_bytes_per_s": 2 * size / copy * 1e3, "copy_bytes": size}  # fmt: skip


def work(case: BenchCase, keys: float, heads_awake: float, tokens_kept: float) -> tuple[float, float]:
    """FLOPs and bytes that a case needs at least, if each row of the awake heads and kept tokens reads `keys` keys."""
    cfg, T, size = case.cfg, case.tokens, case.dtype.itemsize
    D, H, d = cfg.d_model, cfg.n_heads, cfg.head_dim
    G = H if case.who == "mha" else cfg.n_kv_heads
    rows = heads_awake * tokens_kept
    attend, project, numbers = 4 * d * rows * keys, 0.0, T * d * 2 * (H + G)
    if case.scope == "layer":
        project = 4 * D * d * rows + 4 * D * d * G * T
        numbers = 2 * T * D + 2 * D * d * (H + G)
    if case.passes == "training":
        return 3.5 * attend + 3 * project, 2.0 * numbers * size
    return attend + project, float(numbers * size)


def floor(case: BenchCase, facts: dict, rates: dict) -> dict:
    """FLOPs, bytes and the milliseconds they take at `rates`; `ms` is the longer of the two."""
    flops, moved = work(case, facts["keys_per_query"], facts["heads_awake"], facts["tokens_kept"])
    compute, memory = (flops / rates["matmul_flops_per_s"] * 1e3, moved / rates["copy_bytes_per_s"] * 1e3)
    return {"flops": flops, "bytes": moved, "compute_ms": compute, "memory_ms": memory, "ms": max(compute, memory)}
