"""Four parts of Proteus, each measured in seconds, for the notebook 09 and its panels.

INT8 against its bound, what Top-A does to a text, a controller that holds a target, and the KV bank against a plain
cache while the model writes. Each function returns a `Found`: numbers, and one sentence that follows from them.

Axes: `T` tokens, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ..attention import AttentionConfig, ProteusAttention
from ..attention.controllers import Decision, SparseHeadController
from ..attention.int8 import error_bound, through_int8
from ..attention.rope import rotate
from ..common.progress import Progress, Stop, check_stop, tell
from ..lm.model import ProteusLM
from ..lm.sampling import TopA
from ..lm.shelf import shelf
from ..lm.shipped import load_shipped
from ..playground.shelf_source import ShelfSource
from .speed.top_a import measure_text

SHELF = 7  # seed of the text
TOP_A_PROMPT = 256  # tokens
WIDTH = 128  # of the controller's layer
CALLS = 60  # of a controller, at most
WARM_UP, TIMED = 4, 16  # tokens written


@dataclass(frozen=True)
class Found:
    """numbers: name -> value, for comparisons; sentence: what they say; text: more lines, such as what was written."""

    numbers: dict[str, float]
    sentence: str
    text: str = ""


@lru_cache(maxsize=1)
def _shipped() -> tuple:
    return load_shipped("shelf-mini")


def _model(alpha: float) -> ProteusLM:
    """A copy of shelf-mini at one position of the slider."""
    model = copy.deepcopy(_shipped()[0])
    model.set_flux_alpha(alpha)
    return model


def _ids(tokens: int) -> Tensor:
    """The first `tokens` tokens of a shelf, `(1, T)`."""
    tokenizer = _shipped()[1]
    return torch.tensor(tokenizer.encode(shelf(SHELF, tokens).text)[:tokens])[None]


# INT8


@lru_cache(maxsize=1)
def _captured() -> dict:
    """Queries, keys and values of each layer over 512 tokens."""
    return ShelfSource(*_shipped(), "shelf-mini").capture(_ids(512)[0])


@torch.no_grad()
def int8_error(layer: int, outlier: float, stop: Stop | None = None, progress: Progress | None = None) -> Found:
    """Dense attention of one layer with keys and values from int8, against the same in float32.

    outlier: factor >= 1 on one feature of every key, as in models whose keys have one large feature. The queries'
    feature is divided by it, so that the exact result stays the same.
    """
    seen = _captured()[layer]
    q, k, v = (part.float()[None] for part in (seen.q, seen.k, seen.v))  # (1, T, heads, d)
    at, scale, d = torch.arange(q.shape[1]), seen.scale, q.shape[-1]
    q, k = (rotate(part, at, seen.inv_freq) for part in (q, k))
    k[..., 0] *= outlier
    q[..., 0] /= outlier
    check_stop(stop)
    exact, stored = (_attend(q, *kv, scale) for kv in ((k, v), (through_int8(k), through_int8(v))))
    error, bound = float((exact - stored).abs().max()), error_bound(q, k, v, scale)
    largest = float(exact.abs().max())
    numbers = {"error": error, "bound": bound, "largest": largest, "bytes": d + 4, "bytes in float16": 2 * d}
    return Found(numbers, (
        f"The largest error of any output entry is {error:.2g}, the bound is {_size(bound)}; the largest entry is "
        f"{largest:.2g}. A key takes {d + 4} bytes in int8 with its scale, {2 * d} in float16."
    ))  # fmt: skip


def _size(bound: float) -> str:
    return f"{bound:.2g}" if bound < 1e6 else "so large that it says nothing"


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


# Top-A


def top_a(mode: str, share: float, strength: float, tokens: int = 48, stop: Stop | None = None,
          progress: Progress | None = None) -> Found:  # fmt: skip
    """What shelf-mini writes after the beginning of a shelf at alpha 1. mode: "off", "filter" or "reweigh"."""
    model, dense, tokenizer = _model(1.0), _model(0.0), _shipped()[1]
    prompt = _ids(TOP_A_PROMPT)
    chosen = None if mode == "off" else TopA(share=share, mode=mode, strength=strength)
    written = []
    for token in model.generate(prompt, tokens, top_p=0.95, seed=1, top_a=chosen):
        check_stop(stop)
        written.append(int(token))
        tell(progress, len(written) / tokens, f"token {len(written)} of {tokens}")
    ids = torch.cat((prompt[0], torch.tensor(written)))
    _, repetition, agreement, nll = measure_text(model, dense, ids, TOP_A_PROMPT)
    numbers = {"repetition": repetition, "agreement": agreement, "nll": nll}
    return Found(numbers, (
        f"With Top-A {'off' if chosen is None else f'as {mode}'}, the heads agree with the written tokens by "
        f"{agreement:+.3f} (a cosine), {repetition:.0%} of the groups of four tokens are repeated, and the dense model "
        f"gives the text {nll:.2f} nats per token."
    ), tokenizer.decode(written))  # fmt: skip


# Controller


@torch.no_grad()
def hold(
    target: str, share: float, tokens: int = 2048, stop: Stop | None = None, progress: Progress | None = None
) -> Found:
    """A controller holds a target of one layer of random weights, which reads `tokens` random vectors.

    target: "density" moves alpha from 0 until the layer does `share` of dense attention's reads; "latency" moves the
    shortlist L from 256 down until a call takes `share` of its time at 256.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cfg = AttentionConfig(d_model=WIDTH, n_heads=4, shortlist=64 if target == "density" else 256,
                              flux_alpha=0.0 if target == "density" else 1.0)  # fmt: skip
        layer = ProteusAttention(cfg).eval().calibrate(torch.randn(1, 1024, WIDTH))
        given = torch.randn(1, tokens, WIDTH)
    if target == "density":
        return _held(_settle(SparseHeadController(layer, density=share), given, stop, progress), share, "α", 0.0)
    before = median([_milliseconds(layer, given) for _ in range(4)][1:])
    controller = SparseHeadController(layer, latency_ms=share * before, knob="shortlist", low=24, high=256)
    return _held(_settle(controller, given, stop, progress), share, "L", before)


def _settle(
    controller: SparseHeadController, given: Tensor, stop: Stop | None, progress: Progress | None
) -> list[Decision]:
    path: list[Decision] = []
    for call in range(CALLS):
        check_stop(stop)
        tell(progress, call / CALLS, f"call {call + 1}, {controller.knob} {controller.value:g}")
        path.append(controller(given)[1])
        if path[-1].settled:
            break
    return path


def _milliseconds(layer: torch.nn.Module, given: Tensor) -> float:
    start = perf_counter()
    layer(given)
    return (perf_counter() - start) * 1e3


def _held(path: list[Decision], share: float, knob: str, dear_ms: float) -> Found:
    last = path[-1]
    got = last.measured / dear_ms if dear_ms else last.measured
    values = [path[0].before, *(step.after for step in path if step.after != step.before)]
    of = f"of the {dear_ms:,.0f} ms that a call takes at L 256" if dear_ms else "of the reads of dense attention"
    end = f"settled ({last.reason})" if last.settled else "had not settled"
    numbers = {"goal": share, "measured": got, "value": last.after, "calls": len(path)}
    return Found(numbers, (
        f"The goal is {share:.0%} {of}. After {len(path)} calls the controller {end} at {knob} {last.after:.4g}, with "
        f"{got:.1%}."
    ), f"{knob} " + " → ".join(f"{value:.3g}" for value in values))  # fmt: skip


# KV bank


@torch.no_grad()
def write_on(tokens: int, shortlist: int, stop: Stop | None = None, progress: Progress | None = None) -> Found:
    """Writes after `tokens` tokens, with a KV bank of `shortlist` reads (alpha 1) and with a plain cache (alpha 0)."""
    ids, found = _ids(tokens), {}
    for name, alpha in (("bank", 1.0), ("cache", 0.0)):
        tell(progress, 0.5 * (name == "cache"), f"reading {tokens:,} tokens, {name}")
        model = _model(alpha)
        with model.settings(shortlist=shortlist):
            found[name] = _written(model, ids, stop)
    (bank, bank_ms, ours), (cache, cache_ms, dense) = found["bank"], found["cache"]
    length = tokens + len(ours)
    same = sum(a == b for a, b in zip(ours, dense, strict=True))
    equal = bank / (cache / length)
    numbers = {"bank": bank, "cache": cache, "bank ms": bank_ms, "cache ms": cache_ms, "equal at": equal}
    return Found(numbers, (
        f"After {length:,} tokens the bank holds {bank / 1e6:.2f} MB and the plain cache {cache / 1e6:.2f} MB. The "
        f"bank keeps its size, so from {equal:,.0f} tokens on it is the smaller one. A token takes {bank_ms:.1f} ms "
        f"with the bank and {cache_ms:.1f} ms with the cache; {same} of {len(ours)} tokens are the same."
    ))  # fmt: skip


def _written(model: ProteusLM, ids: Tensor, stop: Stop | None) -> tuple[int, float, list[int]]:
    """Bytes of the state, the median milliseconds of a token, and the likeliest tokens."""
    state = model.new_state(1, ids.shape[1] + WARM_UP + TIMED)
    writer, times, words = model.generate(ids, WARM_UP + TIMED, temperature=0.0, state=state), [], []
    for _ in range(WARM_UP + TIMED):
        check_stop(stop)
        start = perf_counter()
        words.append(int(next(writer)))
        times.append((perf_counter() - start) * 1e3)
    return state.nbytes, median(times[WARM_UP:]), words
