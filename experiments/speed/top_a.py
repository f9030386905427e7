"""`proteus bench top-a`: repetition, agreement and likelihood of a small model's text with and without Top-A.

Axes: `T` tokens of a prompt, `n` tokens written, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...common.checks import whole_number
from ...common.machine import environment, markdown
from ...common.options import Alpha, Device, Out, Seed, pick_device
from ...lm.model import ProteusLM
from ...lm.sampling import TopA
from ...lm.shelf import ShelfTokenizer, shelf
from ...lm.shelf.exam import HELD_OUT
from ...lm.shipped import load_shipped
from ..intervals import standard_error
from .measure import publish

MEASURED = {"repetition": "repeated 4-grams", "agreement": "agreement", "nll": "nats per token under dense"}
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
    model: ProteusLM, prompts: Sequence[Tensor], dense: ProteusLM | None = None, *,
    arms: dict[str, TopA | None] = ARMS, new_tokens: int = 128, seeds: Sequence[int] = (0, 1, 2),
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 0.95,
) -> Iterator[Continuation]:  # fmt: skip
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


def top_a_command(
    model: Annotated[str, typer.Option(help="A file of ProteusLM.save; the shipped shelf-mini if left out.")] = "",
    prompts: Annotated[int, typer.Option(help="Shelves to write on.", min=1)] = 8,
    seeds: Annotated[int, typer.Option(help="Continuations of each, by every arm.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens written.", min=4)] = 128,
    alpha: Alpha = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 1.0,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = "",
) -> None:
    """Text written with and without Top-A: repetition, agreement of the heads, likelihood under dense attention."""
    dev, tokenizer = pick_device(device), ShelfTokenizer()
    lm = ProteusLM.load(model, str(dev)).eval() if model else load_shipped("shelf-mini", str(dev))[0]
    lm.set_flux_alpha(alpha)
    begun = [shelf(HELD_OUT + seed * 1000 + i, 60).text for i in range(prompts)]
    ids = [torch.tensor(tokenizer.encode(text), device=dev) for text in begun]
    written = continuations(lm, ids, new_tokens=tokens, seeds=range(seeds), temperature=temperature)
    found: dict[str, list[Continuation]] = defaultdict(list)
    for one in tqdm(written, total=prompts * seeds * len(ARMS), unit="text"):
        found[one.arm].append(one)
    rows = [{"arm": arm} | {name: _mean(some, name) for name in MEASURED} for arm, some in found.items()]
    report = {"benchmark": "top-a", **environment(dev), "dtype": "float32", "seed": seed, "alpha": alpha, "rows": rows}
    report |= {"temperature": temperature, "tokens": tokens, "texts": prompts * seeds}
    publish(report, top_a_table(report), out)


def top_a_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    about = (
        f"{report['device']}, torch {report['torch']}, float32, seed {report['seed']}; {report['texts']} texts, "
        f"{report['tokens']} tokens, per arm; alpha {report['alpha']:g}, temperature {report['temperature']:g}, "
        "Top-P 0.95; mean ± standard error"
    )
    return f"{about}\n\n{markdown(['Top-A', *MEASURED.values()], [_cells(row) for row in report['rows']])}"


def _mean(some: list[Continuation], name: str) -> dict:
    values = [getattr(one, name) for one in some]
    return {"mean": fmean(values), "error": standard_error(values)}


def _cells(row: dict) -> list[str]:
    errors = {name: row[name]["error"] for name in MEASURED}
    tail = {name: "" if error is None else f" ± {error:.3f}" for name, error in errors.items()}
    return [row["arm"], *(f"{row[name]['mean']:.3f}{tail[name]}" for name in MEASURED)]
