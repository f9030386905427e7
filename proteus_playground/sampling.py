"""Choose the next token of a text from a model's logits.

Axes: `B` batch, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import whole_number

STRIDE = 1_000_003  # a prime: streams of neighbouring seeds do not meet


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, then one draw; temperature 0 takes the likeliest token.

    A draw depends on the seed and on the token's position in the text, not on what was drawn before: a text that is
    stopped and resumed goes on as it would have. Top-p is Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    Raises `TypeError` or `ValueError` naming the field.
    """

    temperature: float = 1.0
    """>= 0. Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only, >= 1; None for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability, in (0, 1]."""
    seed: int = 0
    """>= 0."""

    def __post_init__(self) -> None:
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 1)
        whole_number("seed", self.seed, 0)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: expected a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}: must be >= 0 and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be in (0, 1]")

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        """The token at `position` (counted from the text's start) of each text: `(B, V)` -> `(B,)` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        prob, token = logits.softmax(-1).cpu().sort(dim=-1, descending=True, stable=True)
        prob = prob.masked_fill(prob.cumsum(-1) - prob >= self.top_p, 0)  # the likeliest always stays
        generator = torch.Generator().manual_seed(self.seed * STRIDE + position)  # on the CPU: any device draws alike
        return token.gather(-1, torch.multinomial(prob, 1, generator=generator))[..., 0].to(logits.device)
