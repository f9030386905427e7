"""Choose the next token of a text from a model's logits.

Axes: `B` batch, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.checks import real_number, whole_number

SEED_STRIDE = 1_000_003  # positions between two seeds, so that neighbouring seeds share no random numbers
MODES = ("filter", "reweigh")


@dataclass(frozen=True)
class TopA:
    """Top-A: candidates must agree with the awake heads. Raises `TypeError` or `ValueError` naming the field.

    Agreement of a token, in [-1, 1]: the weighted mean, over awake heads of the last layer, of the cosine between a
    head's contribution to the residual and the token's unembedding row (`ProteusLM.agreement`).
    """

    share: float = 0.5
    """For 'filter', in [0, 1]: candidates whose agreement is below this share of the best candidate's are dropped. If
    the best agreement is <= 0, none is dropped."""
    mode: str = "filter"
    """'filter', or 'reweigh', which adds strength x agreement to every candidate's logit."""
    strength: float = 5.0
    """For 'reweigh': nats per unit of agreement, >= 0, added after the temperature; 0 changes nothing."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(map(repr, MODES))}")
        real_number("share", self.share, 0, 1)
        real_number("strength", self.strength, 0)

    def __call__(self, prob: Tensor, agreement: Tensor) -> Tensor:
        """Probabilities `(B, V)`, 0 for tokens that are no candidates -> the same, filtered or reweighed.

        Each row keeps at least one candidate. Filtered rows do not sum to 1. agreement: `(B, V)`.
        """
        if self.mode == "reweigh":
            return (prob.log() + self.strength * agreement).softmax(-1)
        best = agreement.masked_fill(prob == 0, -torch.inf).amax(-1, keepdim=True)
        return prob.masked_fill((agreement < self.share * best) & (best > 0), 0)


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, then Top-A, then one draw; temperature 0 takes the likeliest token.

    The random number of a draw depends on the seed and the token's position only, so a text that is stopped and resumed
    continues as it would have. Top-p: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751. Raises `TypeError` or
    `ValueError` naming the field.
    """

    temperature: float = 1.0
    """Divides the logits, >= 0. 0 takes the likeliest token (with Top-A: of those it leaves at temperature 1)."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only, >= 1; None for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability, in (0, 1]."""
    seed: int = 0
    """Seed of the draws, >= 0."""
    top_a: TopA | None = None
    """The agreement filter; None for none."""

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

        agreement: `(B, V)`, of every token; needed with top_a. Raises `ValueError` if it is missing.
        """
        if self.top_a and agreement is None:
            raise ValueError("agreement=None: must be every token's agreement (B, V) when top_a is used")
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
            # On the CPU, so that all devices draw the same.
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + position)
            drawn = torch.multinomial(prob, 1, generator=generator)
        return token.gather(-1, drawn)[..., 0].to(logits.device)
