"""`proteus bench model`: a language model reads a prompt and writes on, by `ProteusCache` and by a dense KV cache.

Both read the same tokens in one pass and write as many, always the most likely one. Their samples take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from ...attention.settings import Settings
from ...common import options
from ...common.files import write_json
from ...common.machine import environment, markdown
from ...common.options import DTYPES
from ...common.progress import resumable
from ...common.texts import load_text
from ...hf.cache import ProteusCache
from ...hf.models import DEFAULT
from ...hf.opening import load_source, title
from ...hf.patch import handed
from .measure import clock, measured_on, release, summary

WHO = ("dense", "proteus", "graph")  # the last: by recorded CUDA graphs
TEXT = "commonplace book"


def prompt(source, tokens: int, device: torch.device) -> Tensor:
    """The first `tokens` tokens of an English text, which is repeated where it is too short: `(1, tokens)`."""
    ids = torch.as_tensor(source.encode(load_text(TEXT).body), device=device).flatten()
    return ids.repeat(-(-tokens // len(ids)))[None, :tokens]


def new_cache(source, who: str, tokens: int, settings: Settings):
    """An empty cache for a text of `tokens` tokens."""
    if who != "dense":
        how = {"tokens": tokens, "name": source.name, "cuda_graph": who == "graph"}
        return ProteusCache.for_model(source.model, source.tokenizer, settings, **how)
    from transformers import DynamicCache

    return DynamicCache(config=source.model.config)


def sample(source, who: str, ids: Tensor, new: int, settings: Settings) -> dict:
    """Read the prompt and write `new` tokens: milliseconds of the prompt and of each token, bytes of the cache."""
    device = ids.device
    cache = new_cache(source, who, ids.shape[1] + new, settings)
    kept, last = handed(source.model, cache), [ids]

    def step() -> None:
        logits = source.model(last[0], **kept, logits_to_keep=1).logits
        last[0] = logits[:, -1].argmax(-1, keepdim=True)

    prefill, peak = clock(step, device)
    tokens = [clock(step, device)[0] for _ in range(new)]
    if who != "dense":
        nbytes = cache.nbytes
        cache.close()
    else:
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"prefill_ms": prefill, "token_ms": tokens, "cache_bytes": nbytes, "peak_bytes": peak}


def measure_length(source, tokens: int, new: int, repeats: int, settings: Settings, device) -> Iterator[dict]:
    """A row for each way at one length; the first sample of each warms up."""
    ids = prompt(source, tokens, device)
    samples: dict[str, list[dict]] = {who: [] for who in (WHO if device.type == "cuda" else WHO[:2])}
    for _ in tqdm(range(repeats + 1), f"{tokens:,} tokens", leave=False, disable=None):
        for who in samples:
            samples[who].append(sample(source, who, ids, new, settings))
            release(device)
    for who, (_, *timed) in samples.items():
        yield {
            "who": who, "tokens": tokens, "prefill": summary([one["prefill_ms"] for one in timed]),
            "token": summary([ms for one in timed for ms in one["token_ms"]]),
            "cache_bytes": timed[-1]["cache_bytes"], "peak_bytes": timed[-1]["peak_bytes"],
        }  # fmt: skip


def model_command(
    model: Annotated[str, typer.Option(help="A model or a converted folder.")] = DEFAULT,
    lengths: options.Lengths = "512,2k",
    new: Annotated[int, typer.Option(help="Tokens written after the prompt.", min=1)] = 16,
    shortlist: options.Shortlist = 128,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    repeats: Annotated[int, typer.Option(help="Timed samples of each.", min=1)] = 3,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """Prefill, decode and memory of a language model: ProteusCache beside a dense KV cache."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, DTYPES)
    at = options.parse_lengths(lengths)
    torch.manual_seed(seed)
    source, settings = load_source(model, str(dev), kind), Settings(flux_alpha=1.0, shortlist=shortlist)
    about = {"model": title(model), "dtype": dtype, "seed": seed, "shortlist": shortlist, "new": new}
    report = {"benchmark": "model", **environment(dev), **about, "rows": []}
    with resumable("Nothing is lost: the rows so far are in --out."), torch.inference_mode():
        for tokens in at:
            report["rows"] += measure_length(source, tokens, new, repeats, settings, dev)
            if out:
                write_json(Path(out), report)
    typer.echo(model_table(report))


def model_table(report: dict) -> str:
    """The report as Markdown."""
    by: dict[int, dict[str, dict]] = {}
    for row in report["rows"]:
        by.setdefault(row["tokens"], {})[row["who"]] = row

    def figures(rows: dict, value: Callable[[dict], float], form: str, ways: Sequence[str]) -> list[str]:
        dense, *ours = (value(rows[who]) for who in ways)
        return [form.format(dense), *(cell for one in ours for cell in (form.format(one), f"{dense / one:.2f}x"))]

    graph = any(row["who"] == "graph" for row in report["rows"])
    ways = WHO if graph else WHO[:2]
    body = [
        [
            f"{tokens:,}",
            *figures(rows, lambda row: row["prefill"]["median_ms"], "{:,.1f}", ways),
            *figures(rows, lambda row: row["token"]["median_ms"], "{:,.2f}", ways),
            *figures(rows, lambda row: row["cache_bytes"] / 1e6, "{:,.1f}", WHO[:2]),
        ]
        for tokens, rows in by.items()
    ]
    parts = ("dense", "Proteus", "ratio")
    timed = (*parts, *(("Proteus, CUDA graph", "ratio") if graph else ()))
    head = ["tokens", *(f"{what}, ms: {part}" for what in ("prompt", "one more token") for part in timed)]
    head += [f"cache, MB: {part}" for part in parts]
    where = f"{measured_on(report)}; {report['model']}, L = {report['shortlist']}, medians"
    return f"{where}\n\n{markdown(head, body)}"


if __name__ == "__main__":
    typer.run(model_command)
