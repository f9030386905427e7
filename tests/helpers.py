"""Small builders that several attention tests share, and the text of HTML."""

import dataclasses
import re
from html import unescape

import pytest
import torch

from proteus_playground import AttentionConfig, ProteusAttention
from proteus_playground.attention import Gates, plan_budget, proteus_attention, rope_frequencies

SENTENCE = " the cat of the house sat on a warm wall and looked at the garden all day."


def config(**changes) -> AttentionConfig:
    base = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "shortlist": 24, "gates_per_group": 6}
    return AttentionConfig(**{**base, "flux_alpha": 1.0, **changes})


def layer(seed: int = 0, tokens: int = 200, device: str = "cpu", **changes) -> ProteusAttention:
    """A calibrated layer in eval mode."""
    torch.manual_seed(seed)
    attn = ProteusAttention(config(**changes)).to(device)
    return attn.calibrate(torch.randn(2, tokens, attn.cfg.d_model, device=device)).eval()


def qkv(tokens, heads=4, groups=2, dim=8, batch=2, seed=0, device="cpu", dtype=torch.float32, grad=False):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((heads,), (groups,), (groups,))
    return tuple(
        torch.randn(batch, tokens, n, dim, generator=gen).to(device, dtype).requires_grad_(grad) for (n,) in shapes
    )


def attend(q, k, v, cfg, backend="torch", gates=None, keep=None, tokens=None, **kwargs):
    """The functional core with a config's budget; gates fitted to k unless given."""
    gates = gates or Gates(k.shape[2], cfg.gates_per_group, k.shape[3]).to(k.device).fit(k.detach())
    freq = None if cfg.rope_theta is None else rope_frequencies(cfg.head_dim, cfg.rope_theta, q.device)
    return proteus_attention(
        q, k, v, gates, plan_budget(cfg, tokens or q.shape[1]), inv_freq=freq, keep=keep, backend=backend, **kwargs
    )


def off_by(a, b) -> float:
    """Relative Frobenius distance of a from b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def check_overflow(monkeypatch, on: bool) -> None:
    """Whether the interpreter looks for overflow after each operation on whole numbers, a third of its time."""
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=on))


def run_command(capture, *words: str) -> tuple[int, str, str]:
    """Run `proteus` in this process: exit code, stdout, stderr. capture: pytest's capfd or capsys."""
    from proteus_playground.cli import app

    with pytest.raises(SystemExit) as end:
        app.main(list(words))
    said = capture.readouterr()
    return end.value.code or 0, said.out, said.err


def text_of(html: str) -> str:
    """`html` without its tags."""
    return unescape(re.sub("<[^>]*>", "", html))
