"""Held-out loss of a duel's trained Proteus model at several alphas, from dense to the constant shortlist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.progress import Stop, check_stop
from ...lm.model import ProteusLM
from ...lm.training.data import Bytes, Codec, windows
from ...lm.training.look import look
from .files import run_folder
from .settings import DuelSettings, pick_text, split

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Point:
    """Loss and statistics of the model at one alpha."""

    alpha: float
    loss: float  # nats per held-out token
    density: float  # keys read per row, as a share of the keys before it
    heads_awake: float  # per token


@torch.no_grad()
def held_out_loss(model: ProteusLM, texts: Tensor, tokens: int) -> float:
    """Mean loss per next token, in nats, of `texts (B, T + 1)` int64; about `tokens` tokens are read at a time."""
    losses = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum")
        for part in texts.split(max(1, tokens // (texts.shape[1] - 1)))
    ]
    return float(torch.stack(losses).sum()) / texts[:, 1:].numel()


def held_out_curve(
    out: str | Path, *, codec: Codec | None = None, device: str = "cpu", stop: Stop | None = None
) -> Iterator[Point]:
    """A `Point` at each of ALPHAS for the finished duel in the folder `out`. codec: as given to `duel`.

    Raises `FileNotFoundError` if the duel is not finished, `Stopped`.
    """
    out, codec = Path(out), codec or Bytes()
    model = ProteusLM.load(out / "proteus.safetensors", device).eval()
    asked = run_folder(out).settings()["asked"]
    settings = DuelSettings(**{field.name: asked[field.name] for field in fields(DuelSettings)})
    held_out = split(torch.tensor(codec.encode(pick_text(settings.text).body), dtype=torch.int32))[1]
    texts = windows(held_out, settings.length, settings.held_out).to(device)
    for alpha in ALPHAS:
        check_stop(stop)
        model.set_flux_alpha(alpha)
        seen = look(model, texts[:1, :-1])
        yield Point(alpha, held_out_loss(model, texts, settings.tokens), seen.density, seen.heads_awake)
