"""`proteus bench decode`: one more token after a short and after a long text, by the bank and by a dense KV cache.

Attention alone is timed, from un-rotated query, key and value to heads' outputs: rotation, storing and, in the bank,
luring and probing. A sample of the bank is a whole block of tokens, because keys leave the window once per block.
Samples of all contexts take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from ...attention import ENDLESS, AttentionConfig, Gates, KVBank, plan_budget, rope_frequencies, rotate
from ...common import options
from ...common.machine import environment, markdown
from ...common.options import DTYPES
from .measure import captured, clock, measured_on, publish, summary, wait

TOKENS_PER_DRAW = 1 << 16  # keys and values are generated so many tokens at a time
DENSE_STEPS = 4  # tokens per sample of the dense cache, in which every token costs the same


@dataclass(frozen=True)
class Decoder:
    """Attention over a context of tokens, ready for one more."""

    who: str  # bank or dense
    context: int  # tokens stored
    step: Callable[[], object]  # one token, always of the same cost
    steps: int  # tokens per sample
    nbytes: int
    fill_s: float


def tokens_of(context: int, cfg: AttentionConfig, device, dtype, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values `(1, n, G, d)` of `context` tokens, some at a time: noise, the same for both decoders."""
    gen = torch.Generator(device).manual_seed(seed)
    for start in range(0, context, TOKENS_PER_DRAW):
        shape = (2, 1, min(TOKENS_PER_DRAW, context - start), cfg.n_kv_heads, cfg.head_dim)
        yield torch.randn(shape, generator=gen, device=device).to(dtype).unbind(0)


def _query(cfg: AttentionConfig, device, dtype, seed: int) -> Tensor:
    gen = torch.Generator(device).manual_seed(seed + 1)
    return torch.randn(1, 1, cfg.n_heads, cfg.head_dim, generator=gen, device=device).to(dtype)


def bank_after(context: int, cfg: AttentionConfig, gates: Gates, device, dtype, seed: int) -> Decoder:
    """A bank filled by `extend`."""
    freq = rope_frequencies(cfg.head_dim, cfg.rope_theta, device)
    bank = KVBank.empty(plan_budget(cfg, ENDLESS), gates, inv_freq=freq, dtype=dtype, device=device, int8=cfg.int8)
    start = time.perf_counter()
    for k, v in tokens_of(context, cfg, device, dtype, seed):
        bank.extend(k, v)
    wait(device)
    q, one = _query(cfg, device, dtype, seed), (k[:, -1:].contiguous(), v[:, -1:].contiguous())
    seconds = time.perf_counter() - start
    return Decoder("bank", context, lambda: bank.step(q, *one), bank.budget.block, bank.nbytes, seconds)


def dense_after(context: int, cfg: AttentionConfig, device, dtype, seed: int) -> Decoder:
    """A KV cache of `context` tokens and one more, all of which `scaled_dot_product_attention` reads."""
    G, d, freq = cfg.n_kv_heads, cfg.head_dim, rope_frequencies(cfg.head_dim, cfg.rope_theta, device)
    keys, values = (torch.empty(1, G, context + 1, d, dtype=dtype, device=device) for _ in range(2))
    start, at = time.perf_counter(), 0
    for k, v in tokens_of(context, cfg, device, dtype, seed):
        here = slice(at, at + k.shape[1])
        keys[:, :, here] = rotate(k, torch.arange(here.start, here.stop, device=device), freq).transpose(1, 2)
        values[:, :, here] = v.transpose(1, 2)
        at = here.stop
    q, k, v = _query(cfg, device, dtype, seed), k[:, -1:], v[:, -1:]
    last = torch.tensor([context], device=device)

    def step() -> Tensor:
        turned = rotate(torch.cat((q, k), dim=2), last, freq).transpose(1, 2)  # (1, H + G, 1, d)
        keys[:, :, context:] = turned[:, -G:]
        values[:, :, context:] = v.transpose(1, 2)
        tile = turned[:, :-G].reshape(1, G, -1, d)  # a group's heads are rows, so its keys are read once
        return F.scaled_dot_product_attention(tile, keys, values)

    wait(device)
    return Decoder("dense", context, step, DENSE_STEPS, keys.nbytes + values.nbytes, time.perf_counter() - start)


def measure_decoders(decoders: list[Decoder], device: torch.device, repeats: int) -> list[dict]:
    """A row of times per token for each decoder, sampled in turn; on CUDA also with CUDA graphs."""
    with ExitStack() as stack:
        runs = [(decoder, "eager", decoder.step) for decoder in decoders]
        for decoder in decoders:
            decoder.step()
            if device.type == "cuda":
                runs.append((decoder, "graph", stack.enter_context(captured(decoder.step, device))))
        times: list[list[float]] = [[] for _ in runs]
        for turn in tqdm(range(repeats + 1), desc="turns", disable=None):
            for (decoder, _, step), samples in zip(runs, times, strict=True):
                one = clock(lambda step=step, n=decoder.steps: [step() for _ in range(n)], device)[0] / decoder.steps
                if turn:  # the first warms up
                    samples.append(one)
    rows: dict[tuple[str, int], dict] = {}
    for (decoder, mode, _), samples in zip(runs, times, strict=True):
        about = {"who": decoder.who, "context": decoder.context, "bytes": decoder.nbytes, "fill_s": decoder.fill_s}
        rows.setdefault((decoder.who, decoder.context), about)[mode] = summary(samples)
    return list(rows.values())


def decode_command(
    lengths: options.Lengths = "4k..1m/4",
    heads: options.Heads = 9,
    groups: Annotated[int, typer.Option(help="KV groups; divides heads.")] = 3,
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 128,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    config: options.Config = "{}",
    repeats: Annotated[int, typer.Option(help="Timed samples of each.", min=1)] = 15,
    dense_gb: Annotated[float, typer.Option(help="Largest dense cache to try, GB; 0 for none.")] = 4.0,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """One more token after texts of several lengths: time and memory, the bank beside a dense KV cache."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, DTYPES)
    fields = {"d_model": heads * head_dim, "n_heads": heads, "n_kv_heads": groups, "head_dim": head_dim}
    fields |= {"shortlist": shortlist, "flux_alpha": 1.0, "rope_theta": 100_000.0, "route_heads": False}
    with options.fields_of("--config"):
        cfg = AttentionConfig(**fields | options.parse_config(config))
    contexts = options.parse_lengths(lengths)
    with torch.inference_mode():
        gates = Gates(cfg.n_kv_heads, cfg.gates_per_group, cfg.head_dim).to(dev)
        gates.fit(next(tokens_of(8192, cfg, dev, kind, seed + 2))[0])
        decoders = []
        for context in tqdm(contexts, desc="contexts filled", disable=None):
            decoders.append(bank_after(context, cfg, gates, dev, kind, seed))
            if 2 * context * groups * head_dim * kind.itemsize <= dense_gb * 1e9:
                decoders.append(dense_after(context, cfg, dev, kind, seed))
        rows = measure_decoders(decoders, dev, repeats)
    about = {"dtype": dtype, "seed": seed, "config": cfg.to_dict(), "budget": plan_budget(cfg, ENDLESS).to_dict()}
    report = {"benchmark": "decode", **environment(dev), **about, "rows": rows}
    publish(report, decode_table(report), out)


def decode_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    cfg, by = report["config"], {(r["who"], r["context"]): r for r in report["rows"]}
    contexts = list(dict.fromkeys(r["context"] for r in report["rows"]))
    modes = [m for m in ("eager", "graph") if m in report["rows"][0]]
    columns = [(who, mode) for mode in modes for who in ("bank", "dense")]

    def cell(who: str, context: int, mode: str) -> str:
        one = by.get((who, context), {}).get(mode)
        return f"{one['median_ms']:.3f} ({one['q1_ms']:.3f}–{one['q3_ms']:.3f})" if one else "–"

    def size(who: str, context: int) -> str:
        return f"{by[who, context]['bytes'] / 1e6:,.2f}" if (who, context) in by else "–"

    head = ["context", *(f"{who}, {mode}, ms per token" for who, mode in columns), "bank, MB", "dense cache, MB"]
    body = [
        [f"{c:,}", *(cell(who, c, mode) for who, mode in columns), size("bank", c), size("dense", c)] for c in contexts
    ]
    first, last = by["bank", min(contexts)], by["bank", max(contexts)]
    ratios = ", ".join(f"{m} {last[m]['median_ms'] / first[m]['median_ms']:.2f}x" for m in modes)
    return (
        f"{measured_on(report)}; {cfg['n_heads']} heads over {cfg['n_kv_heads']} KV groups of {cfg['head_dim']}, "
        f"L = {cfg['shortlist']}; median (quartiles) of {first['eager']['runs']} samples\n\n{markdown(head, body)}\n\n"
        f"Bank, {max(contexts):,} beside {min(contexts):,} tokens: time {ratios}, memory "
        f"{last['bytes'] / first['bytes']:.2f}x"
    )
