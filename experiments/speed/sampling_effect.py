"""The effect of Top-A on sampled text: repetition, agreement of the heads, likelihood under dense attention.

Axes: `T` tokens of a prompt, `n` tokens written, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...common.checks import whole_number
from ...lm.model import ProteusLM
from ...lm.sampling import TopA

ARMS = {"none": None, "filter": TopA(mode="filter"), "reweigh": TopA(mode="reweigh")}
GRAM = 4


@dataclass(frozen=True)
class Continuation:
    """One continuation and its measurements. The three arms of a prompt and seed use the same random numbers."""

    arm: str
    prompt: int  # its index
    seed: int
    tokens: tuple[int, ...]
    repetition: float  # share of its 4-grams that occur in it before
    agreement: float  # mean over its tokens, as `ProteusLM.agreement`
    nll: float  # nats per token under the dense model


def continuations(
    model: ProteusLM,
    prompts: Sequence[Tensor],
    dense: ProteusLM | None = None,
    *,
    arms: dict[str, TopA | None] = ARMS,
    new_tokens: int = 128,
    seeds: Sequence[int] = (0, 1, 2),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 0.95,
) -> Iterator[Continuation]:
    """Continue every prompt, `(T,)` int64 on the model's device, by every arm and seed.

    dense: the model that computes likelihoods; by default the same weights at alpha 0. The model writes at its own
    alpha. Both models must be in evaluation mode. Raises `ValueError` naming the argument.
    """
    whole_number("new_tokens", new_tokens, GRAM)
    if dense is None:
        dense = copy.deepcopy(model)
        dense.set_flux_alpha(0.0)
    for name, lm in (("model", model), ("dense", dense)):
        if lm.training:
            raise ValueError(f"{name}.training=True: must be in evaluation mode; call eval()")
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for index, prompt in enumerate(prompts):
        for seed in seeds:
            for arm, top_a in arms.items():
                ids = _continued(model, prompt, new_tokens, seed=seed, top_a=top_a, **settings)
                yield Continuation(arm, index, seed, *measure_text(model, dense, ids, len(prompt)))


@torch.no_grad()
def measure_text(
    model: ProteusLM, dense: ProteusLM, ids: Tensor, start: int
) -> tuple[tuple[int, ...], float, float, float]:
    """Tokens of the text `(T + n,)` from `start` on, their repetition, mean agreement and mean NLL."""
    new, before = ids[start:], slice(start - 1, len(ids) - 1)
    trace = model(ids[None], return_trace=True)[1][-1]
    agreement = model.agreement(trace, ids.roll(-1)[None])[0, before].mean()
    nll = cross_entropy(dense(ids[None])[0, before].float(), new)
    return tuple(new.tolist()), repetition(new.tolist()), float(agreement), float(nll)


def repetition(tokens: Sequence[int]) -> float:
    """Share of a text's 4-grams that occur in it before; 0 for a text of fewer than 4 tokens."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _continued(model: ProteusLM, prompt: Tensor, new_tokens: int, **settings) -> Tensor:
    state = model.new_state(1, tokens=len(prompt) + new_tokens)  # budgets of the whole text, as in `measure_text`
    new = torch.cat(list(model.generate(prompt[None], new_tokens, state=state, **settings)))
    return torch.cat((prompt, new))
