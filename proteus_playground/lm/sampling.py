"""Choose the next token of a text from a model's logits.

Axes: `B` batch, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.checks import real_number, whole_number

STRIDE = 1_000_003  # a prime: streams of neighbouring seeds do not meet
MODES = ("filter", "reweigh")


@dataclass(frozen=True)
class TopA:
    """Candidates must agree with the active heads' own direction. Raises `TypeError` or `ValueError` naming the field.

    Agreement of a token, in [-1, 1]: the mean over awake heads of the last layer, by weight, of the cosine between what
    a head adds to the residual and the token's unembedding row (`ProteusLM.agreement`).
    """

    share: float = 0.5
    """For 'filter', in [0, 1]: candidates that agree less than this share of the best one's agreement are dropped.
    Where even the best does not agree (<= 0), the heads speak for no candidate, and none is dropped."""
    mode: str = "filter"
    """'filter', or 'reweigh': every candidate's logit rises by strength x agreement."""
    strength: float = 5.0
    """For 'reweigh', nats per unit of agreement, >= 0, after temperature; 0 changes nothing."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(map(repr, MODES))}")
        real_number("share", self.share, 0, 1)
        real_number("strength", self.strength, 0)

    def __call__(self, prob: Tensor, agreement: Tensor) -> Tensor:
        """Probabilities `(B, V)`, 0 for what is no candidate -> the same after the choice; each row keeps a candidate.

        Filtered rows do not sum to 1. agreement: `(B, V)`.
        """
        if self.mode == "reweigh":
            return (prob.log() + self.strength * agreement).softmax(-1)
        best = agreement.masked_fill(prob == 0, -torch.inf).amax(-1, keepdim=True)
        return prob.masked_fill((agreement < self.share * best) & (best > 0), 0)


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, then Top-A, then one draw; temperature 0 takes the likeliest token.

    A draw depends on the seed and on the token's position in the text, not on what was drawn before: a text that is
    stopped and resumed goes on as it would have. Top-p is Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    Raises `TypeError` or `ValueError` naming the field.
    """

    temperature: float = 1.0
    """>= 0. Divides the logits; 0 is greedy (with Top-A: among what it leaves of temperature 1's candidates)."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only, >= 1; None for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability, in (0, 1]."""
    seed: int = 0
    """>= 0."""
    top_a: TopA | None = None
    """Which candidates the active heads speak for; None does not ask."""

    def __post_init__(self) -> None:
        if self.top_a is not None and not isinstance(self.top_a, TopA):
            raise TypeError(f"top_a={self.top_a!r}: expected TopA or None")
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 1)
        whole_number("seed", self.seed, 0)
        real_number("temperature", self.temperature, 0)
        real_number("top_p", self.top_p, 0, 1, above=True)

    def __call__(self, logits: Tensor, position: int, agreement: Tensor | None = None) -> Tensor:
        """The token at `position` (counted from the text's start) of each text: `(B, V)` -> `(B,)` int64.

        agreement: `(B, V)`, of every token, where top_a asks for it. Raises `ValueError` where it is missing.
        """
        if self.top_a and agreement is None:
            raise ValueError("agreement=None: top_a must be given every token's agreement, (B, V)")
        if self.temperature == 0 and self.top_a is None:
            return logits.argmax(-1)
        logits = logits.float() / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        prob, token = logits.softmax(-1).cpu().sort(dim=-1, descending=True, stable=True)
        prob = prob.masked_fill(prob.cumsum(-1) - prob >= self.top_p, 0)  # the likeliest always stays
        if self.top_a:
            prob = self.top_a(prob, agreement.float().cpu().gather(-1, token))
        if self.temperature == 0:
            drawn = prob.argmax(-1, keepdim=True)
        else:
            generator = torch.Generator().manual_seed(self.seed * STRIDE + position)  # CPU: any device draws alike
            drawn = torch.multinomial(prob, 1, generator=generator)
        return token.gather(-1, drawn)[..., 0].to(logits.device)
