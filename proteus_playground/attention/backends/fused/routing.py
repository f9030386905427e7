"""Triton kernel that wakes heads and weighs them.

Axes and names as in `index`; `RP` is r rounded up to a power of two.
"""

import triton
import triton.language as tl

from .vectors import sharp_dot


@triton.jit
def softmax(x):
    """Softmax over the last axis of `(rows, columns)`; -inf becomes 0."""
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]


@triton.jit
def route_kernel(
    q, logits, prototypes, alive, confidence, log_share, head_of_gate, balance, awake, weight,
    rows, G, r, d, C, least, most, top_p, alpha, temperature, prior_max, q_batch, q_token, l_batch, l_token,
    HP: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Wake heads and weigh them, as `attention/routing.py` does: awake int8 and weight float32, both (B, rows, G r)."""
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    half, c, h = tl.arange(0, HP), tl.arange(0, CP), tl.arange(0, RP)
    here = at < rows
    fits = here[:, None] & (half < d // 2)[None, :]
    first, second = tl.zeros((BT, HP), tl.float32), tl.zeros((BT, HP), tl.float32)
    for i in range(r):
        q_at = q + b * q_batch + at.to(tl.int64)[:, None] * q_token + (g * r + i) * d + half[None, :]
        first += tl.load(q_at, mask=fits, other=0.0).to(tl.float32)
        second += tl.load(q_at + d // 2, mask=fits, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(first * first, 1) + tl.sum(second * second, 1))
    p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
    p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
    DTYPE: tl.constexpr = q.dtype.element_ty
    cosine = sharp_dot(first.to(DTYPE), tl.load(p_at, mask=p_fits, other=0.0), tl.zeros((BT, CP), tl.float32))
    cosine = sharp_dot(second.to(DTYPE), tl.load(p_at + d // 2, mask=p_fits, other=0.0), cosine)
    gate = g * C + c
    usable = (tl.load(alive + gate, mask=c < C, other=0) != 0)[None, :]
    share = tl.load(log_share + gate, mask=c < C, other=0.0)[None, :]
    cosine = tl.where(usable, cosine / tl.maximum(length, 1e-12)[:, None], -float("inf"))
    prior = softmax(cosine / temperature + share) * tl.load(confidence + gate, mask=c < C, other=0.0)[None, :]
    prior = prior / tl.maximum(tl.sum(prior, 1), 1e-9)[:, None]
    trust = prior_max * tl.minimum(tl.maximum(tl.max(cosine, 1), 0.0), 1.0)[:, None]
    l_at = logits + b * l_batch + at.to(tl.int64)[:, None] * l_token + gate[None, :]
    learned = tl.load(l_at, mask=here[:, None] & (c < C)[None, :], other=0.0).to(tl.float32) + share
    prob = (1 - trust) * softmax(tl.where(usable, learned, -float("inf"))) + trust * prior
    owner = tl.load(head_of_gate + gate, mask=c < C, other=-1)
    of_head = tl.zeros((BT, RP), tl.float32)
    for i in range(r):
        mass = tl.sum(tl.where((owner == i)[None, :], prob, 0.0), 1)
        of_head = tl.where((h == i)[None, :], mass[:, None], of_head)
    score = of_head + tl.load(balance + g * r + h, mask=h < r, other=0.0)[None, :]
    score = tl.where((h < r)[None, :], score, -float("inf"))
    chosen, reached, woken = tl.zeros((BT, RP), tl.int1), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for i in range(most):
        best = tl.argmax(score, 1)
        hot = best[:, None] == h[None, :]
        wake = (i < least) | (top_p >= 1) | (reached < top_p)
        chosen = chosen | (hot & wake[:, None])
        woken += wake.to(tl.float32)
        reached += tl.sum(tl.where(hot, of_head, 0.0), 1)
        score = tl.where(hot, -float("inf"), score)
    head_weight = tl.where(chosen, of_head, 0.0)
    head_weight = (1 - alpha) + alpha * woken[:, None] * head_weight / tl.maximum(tl.sum(head_weight, 1), 1e-9)[:, None]
    line = ((b * rows + at) * G + g)[:, None] * r + h[None, :]
    fits = here[:, None] & (h < r)[None, :]
    tl.store(awake + line, chosen.to(tl.int8), mask=fits)
    tl.store(weight + line, tl.where(chosen, head_weight, 0.0), mask=fits)
