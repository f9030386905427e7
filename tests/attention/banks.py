"""Queries, keys, values and a bank for them; single steps, and the parallel pass that they must match."""

import torch
from helpers import config, qkv

from proteus_playground.attention import Gates, KVBank, plan_budget, proteus_attention, rope_frequencies


def world(tokens, device="cpu", heads=4, batch=2, drop=0.0, seed=0, int8=False, **changes):
    """Queries, keys, values, tokens that stay, and an empty bank planned for them."""
    cfg = config(**{"shortlist": 30, "gates_per_group": 3, "dense_below": 40, "shortlist_from": 150, **changes})
    q, k, v = qkv(tokens, heads=heads, batch=batch, seed=seed, device=device)
    gates = Gates(2, cfg.gates_per_group, 8).to(device).fit(qkv(100, seed=7, device=device)[1])
    keep = None
    if drop:
        keep = (torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) >= drop).to(device)
    bank = KVBank.empty(plan_budget(cfg, tokens), gates, batch, inv_freq=rope_frequencies(8, 1e4, device), int8=int8)
    return q, k, v, keep, bank


def part(x, a, b):
    return None if x is None else x[:, a:b]


def take_in(bank, k, v, keep, start, stop):
    if stop > start:
        bank.extend(k[:, start:stop], v[:, start:stop], keep=part(keep, start, stop))


def walk(bank, q, k, v, keep, start, stop):
    """Rows start..stop, one step each."""
    rows = [bank.step(*(x[:, t : t + 1] for x in (q, k, v)), keep=part(keep, t, t + 1)) for t in range(start, stop)]
    return torch.cat([q[:, :0], *rows], dim=1)


def parallel(bank, q, k, v, keep, **kwargs):
    return proteus_attention(
        q, k, v, bank.gates, bank.budget, inv_freq=bank.inv_freq, keep=keep, backend="reference", **kwargs
    )
