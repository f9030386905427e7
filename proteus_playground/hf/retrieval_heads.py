"""Finds the attention heads of a language model that match a question with a fact in other words.

Calibration plants facts in English prose and asks for each in other words. A head is good if few tokens of the text
score as high as the fact. Heads are added one at a time, always the one that helps most. The pairs of fact and question
were written for this project and differ from those of `proteus verify`.

Axes: `R` rows of a prompt, `n` tokens, `N` windows, `L` layers, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from os.path import commonprefix
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import cache_dir, write_json
from ..common.progress import Progress, Stop, check_stop, tell
from .key_reader import Head, first_layers
from .patch import full_attention_layers
from .plain_text import framed_ids, text_ids

RADIUS = 8  # tokens on either side over which a prompt row looks for its best match
WINDOW, WINDOWS = 256, 32  # the calibration text: tokens per window, and windows
CANDIDATES = 20  # the set is chosen from so many heads, the best ones alone
FLOOR = 1e-3  # added to each share, so that an easy fact does not outweigh a hard one in the mean logarithm
DATA = files(__package__) / "data"
KEPT = "retrieval_heads.json"  # in the package for known models, in the cache for others


@dataclass(frozen=True)
class Calibrated:
    """The heads chosen so far, and how well they do on the calibration pairs."""

    heads: tuple[Head, ...]
    median: float  # over facts: share of the text that scores at least as high as the fact
    mean: float  # of the same share
    within: float  # share of the facts with less than 3% of the text above them


def known_heads(name: str) -> tuple[Head, ...] | None:
    """Heads that an earlier calibration found in the model called `name`, or None."""
    for file in (DATA / KEPT, cache_dir() / KEPT):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return tuple(Head(*pair) for pair in json.loads(file.read_text(encoding="utf-8"))[name]["heads"])
    return None


def keep_heads(name: str, heads: Sequence[Head]) -> Path:
    """Write the heads found in the model called `name` into the cache, for `known_heads`; returns the file."""
    file, found = cache_dir() / KEPT, {}
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, found | {name: {"heads": [[head.layer, head.head] for head in heads]}})
    return file


def calibration_pairs() -> list[dict]:
    """The pairs of `fact` and `question` on which heads are chosen."""
    return json.loads((DATA / "calibration_pairs.json").read_text(encoding="utf-8"))


def prompt_ids(tokenizer, prompt: str) -> tuple[Tensor, int, int]:
    """Token ids `(R,)` of a prompt in its chat frame, and where in them the prompt's own words begin and end."""
    if getattr(tokenizer, "chat_template", None) is None:
        ids = text_ids(tokenizer, prompt)
        return torch.tensor(ids, dtype=torch.long), 0, len(ids)
    ids, other = (_rendered(tokenizer, text) for text in (prompt, "?" if prompt.strip() != "?" else "!"))
    begin = len(commonprefix([ids, other]))
    return torch.tensor(ids), begin, len(ids) - len(commonprefix([ids[begin:][::-1], other[begin:][::-1]]))


def _rendered(tokenizer, text: str) -> list[int]:
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    chat, marked = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for content in (text, mark)
    )
    return framed_ids(tokenizer, chat, marked.index(mark), text)


def prompt_queries(model, tokenizer, prompt: str, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor]:
    """Un-rotated queries, layer -> `(R, H, d)` float32, from the prompt's first word to the end of the chat frame, and
    the ids of the first rows, which are the prompt's own words.

    The rows of the chat frame are included because the model is about to answer there. Raises `ValueError` for a prompt
    without words.
    """
    ids, begin, end = prompt_ids(tokenizer, prompt)
    if not prompt.strip() or not len(ids):
        raise ValueError(f"prompt={prompt!r}: must have at least one word")
    found = first_layers(model, ids[None], layers)
    begin = min(begin, len(ids) - 1) or (1 if len(ids) > 1 else 0)  # the first row of all is a sink
    return {layer: found[layer][0][0, begin:].float().cpu() for layer in layers}, ids[begin : max(end, begin + 1)]


def calibration_queries(model, tokenizer, layers: tuple[int, ...], stop: Stop | None = None) -> list[dict[int, Tensor]]:
    """`prompt_queries` of every calibration question."""
    asked = []
    for pair in calibration_pairs():
        check_stop(stop)
        asked.append(prompt_queries(model, tokenizer, pair["question"], layers)[0])
    return asked


def mean_queries(asked: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Mean query over questions: layer -> `(H, d)` float32."""
    return {layer: torch.stack([q[layer].mean(0) for q in asked]).mean(0) for layer in asked[0]}


def match(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Best match of each prompt row within RADIUS tokens of each token: q `(R, d)`, k `(n, d)` -> `(R, n)`."""
    return near_max(scale * (q.float() @ k.float().T), RADIUS)


def near_max(x: Tensor, radius: int) -> Tensor:
    """Largest of `x` `(R, n)` within `radius` columns, by doubling: log2(radius) passes."""
    width, n = 2 * radius + 1, x.shape[1]
    wide = torch.nn.functional.pad(x, (radius, radius), value=-torch.inf)
    best, reach = wide, 1
    while 2 * reach <= width:
        best = torch.maximum(best[:, :-reach], best[:, reach:])
        reach *= 2
    return torch.maximum(best[:, :n], best[:, width - reach : width - reach + n])


@torch.no_grad()
def find_heads(
    model, tokenizer, text: str, *, most: int = 4, last_layer: int | None = None, progress: Progress | None = None,
    stop: Stop | None = None
) -> Iterator[Calibrated]:  # fmt: skip
    """Choose heads and yield the set after each one. text: prose in which facts are hidden, at least 8,192 tokens.

    most: heads to choose; last_layer: the last layer to try, since each layer costs time. Raises `ValueError` for a
    text that is too short.
    """
    layers = tuple(i for i in full_attention_layers(model) if last_layer is None or i <= last_layer)
    hay = torch.tensor(text_ids(tokenizer, text[: WINDOW * WINDOWS * 20])[: WINDOW * WINDOWS])
    if len(hay) < WINDOW * WINDOWS:
        raise ValueError(f"text has {len(hay):,} tokens: calibration needs {WINDOW * WINDOWS:,}")
    hay, pairs = hay.view(WINDOWS, WINDOW), calibration_pairs()
    tell(progress, 0.0, "reading the calibration text")
    keys = [first_layers(model, hay[i : i + 4], layers) for i in range(0, WINDOWS, 4)]
    keys = {layer: torch.cat([part[layer][1] for part in keys]).half().cpu() for layer in layers}  # (N, W, G, d)
    tell(progress, 1 / 3, "asking the calibration questions")
    asked = calibration_queries(model, tokenizer, layers, stop)
    centre, scores = mean_queries(asked), []
    for i, (q, planted) in enumerate(zip(asked, _planted(model, tokenizer, hay, pairs, layers), strict=True)):
        check_stop(stop)
        tell(progress, (2 + i / len(pairs)) / 3, f"looking for: {pairs[i]['fact']}")
        scores.append(_every_head(q, centre, keys, planted, layers))
    yield from _greedy(scores, [Head(layer, h) for layer in layers for h in range(q[layers[0]].shape[1])], most)


def _planted(model, tokenizer, hay: Tensor, pairs: list[dict], layers) -> Iterator[tuple[int, int, dict[int, Tensor]]]:
    """Each fact in the middle of a window of prose: its first token, its end, and the window's keys."""
    for i, pair in enumerate(pairs):
        window, fact = hay[7 * i % len(hay)].clone(), tokenizer(" " + pair["fact"], verbose=False)["input_ids"]
        at = 40 + 37 * i % (WINDOW - 80 - len(fact))
        window[at : at + len(fact)] = torch.tensor(fact)
        found = first_layers(model, window[None], layers)
        yield at, at + len(fact), {layer: found[layer][1][0].cpu() for layer in layers}


def _every_head(q, centre, keys, planted, layers) -> tuple[Tensor, Tensor]:
    """Scores of a prompt by every head: of every fourth token of the haystack `(L H, n)`, of the fact `(L H,)`."""
    at, end, window = planted
    hay, fact = [], []
    for layer in layers:
        G, d = keys[layer].shape[2:]
        H = q[layer].shape[1]
        for head in range(H):
            rows, group = q[layer][:, head] - centre[layer][head], head // (H // G)
            k = torch.cat((keys[layer][:, :, group], window[layer][None, :, group].half())).float()  # (N + 1, W, d)
            best = near_max(torch.einsum("rd,nwd->rnw", rows, k).flatten(0, 1), RADIUS)
            best = best.view(len(rows), len(k), WINDOW).mean(0) * d**-0.5
            hay.append(best[:-1, 1::4].flatten())
            fact.append(best[-1, at:end].mean())
    return torch.stack(hay), torch.stack(fact)


def _greedy(scores, heads: list[Head], most: int) -> Iterator[Calibrated]:
    def shares(chosen: list[int]) -> Tensor:
        return torch.stack([(hay[chosen].sum(0) >= fact[chosen].sum()).float().mean() for hay, fact in scores])

    def cost(chosen: list[int]) -> float:
        return float((shares(chosen) + FLOOR).log().mean())

    alone = sorted(range(len(heads)), key=lambda i: cost([i]))[:CANDIDATES]
    chosen: list[int] = []
    for _ in range(most):
        chosen.append(min((i for i in alone if i not in chosen), key=lambda i: cost([*chosen, i])))
        found = shares(chosen)
        yield Calibrated(
            tuple(heads[i] for i in chosen),
            float(found.median()),
            float(found.mean()),
            float((found < 0.03).float().mean()),
        )
