"""`proteus bench stream`: both passes of the chunked shortlist over embeddings, each case in a process of its own.

The default sizes are those of the original's demonstration with a million tokens, whose pass 1 took 134 s on Colab's
CPU.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from ...attention import AttentionConfig, ProteusAttention
from ...common import options
from ...common.machine import environment, markdown
from ...common.outputs import output_folder
from ...streaming.buffer import StreamPlan
from ...streaming.layer_scorer import LayerScorer
from ...streaming.run import run
from ...streaming.second_pass import attend_over
from ...streaming.sources import open_document
from ...streaming.stores import generated
from .measure import in_own_process, measured_on, peak_mb, publish, summary, wait

ORIGINAL_SPEED = 7_813  # tokens/s of the original's pass 1
STORAGE = ("ram", "disk", "generated", "device")
BY = ("prompt", "salience")
FITTED = 8192  # rows that prototypes are fitted to


@dataclass(frozen=True)
class StreamCase:
    """One row of the table."""

    tokens: int
    storage: str
    by: str
    plan: StreamPlan
    width: int
    heads: int
    prompt_rows: int
    device: str
    seed: int
    repeats: int
    file: str = ""  # holds the embeddings where `storage` is ram or disk


@dataclass(frozen=True)
class OnDevice:
    """Embeddings that are made on the device, block by block, when they are read, and so are never copied to it."""

    tokens: int
    width: int
    block: int
    seed: int
    device: torch.device
    fingerprint: str = "device"

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> torch.Tensor:
        first = start // self.block
        made = [self._make(block) for block in range(first, max(first + 1, -(-stop // self.block)))]
        rows = made[0] if len(made) == 1 else torch.cat(made)
        return rows[start - first * self.block : stop - first * self.block]

    def _make(self, block: int) -> torch.Tensor:
        draw = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + block)
        return torch.randn(self.block, self.width, generator=draw, device=self.device)


class TimedStore:
    """A store that measures how long reading takes."""

    def __init__(self, store):
        self.store, self.fingerprint, self.seconds = store, store.fingerprint, 0.0

    def __len__(self) -> int:
        return len(self.store)

    def read(self, start: int, stop: int):
        begun = perf_counter()
        rows = self.store.read(start, stop)
        self.seconds += perf_counter() - begun
        return rows


def measure_stream(case: StreamCase) -> dict:
    """One row of the table: pass 1 and then pass 2, each `repeats` times, in this process."""
    device = options.pick_device(case.device)
    store, why = open_case(case, device)
    torch.manual_seed(case.seed)
    attn = ProteusAttention(AttentionConfig(d_model=case.width, n_heads=case.heads)).to(device).eval()
    attn.calibrate(torch.as_tensor(store.read(0, min(FITTED, len(store)))).to(device)[None])
    prompt = torch.randn(case.prompt_rows, case.width).to(device)
    scorer = LayerScorer(attn, prompt if case.by == "prompt" else None)
    scorer.score(store.read(0, min(case.plan.chunk_tokens, len(store))))  # warm-up
    first, reading, second = [], [], []
    for _ in range(case.repeats):
        timed = TimedStore(store)
        begun = perf_counter()
        for step in run(timed, scorer, case.plan):
            kept = step.buffer  # only the last step is kept in memory: every step holds a buffer
        first.append((perf_counter() - begun) * 1e3)
        reading.append(timed.seconds * 1e3 / first[-1])
    held = peak_mb()
    for _ in range(case.repeats):
        begun = perf_counter()
        attend_over(attn, store, kept, prompt)
        wait(device)
        second.append((perf_counter() - begun) * 1e3)
    row = {
        "tokens": case.tokens, "storage": case.storage, "why": why, "by": case.by, "kept": len(kept),
        "pass_1": summary(first), "tokens_per_s": case.tokens / summary(first)["median_ms"] * 1e3,
        "reading_share": float(np.median(reading)), "pass_1_peak_mb": held, "pass_2": summary(second),
        "peak_mb": peak_mb(),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_device_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return row | environment(device)


def open_case(case: StreamCase, device: torch.device):
    """The store, and a sentence that says where its rows are kept and why."""
    if case.storage == "device":
        rows = OnDevice(case.tokens, case.width, case.plan.chunk_tokens, case.seed, device)
        return rows, f"made on {device.type} when read"
    if case.storage == "generated":
        store = generated(case.tokens, seed=case.seed, width=case.width)
    else:
        store = open_document(case.file, ram_limit=0 if case.storage == "disk" else sys.maxsize)
    if store.mode != case.storage:
        raise ValueError(f"--storage {case.storage}: {store.why}")
    return store, store.why


def write_embeddings(path: Path, tokens: int, width: int, seed: int, step: int = 1 << 16) -> None:
    """Write a .npy file of `generated` embeddings, `step` rows at a time."""
    store = generated(tokens, seed=seed, width=width)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (tokens, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, tokens, step):
            store.read(start, min(start + step, tokens)).tofile(file)


def stream_command(
    lengths: options.Lengths = "1m",
    storage: Annotated[str, typer.Option(help=f"Of {', '.join(STORAGE)}.")] = "ram,disk",
    by: Annotated[str, typer.Option(help=f"What scores: of {', '.join(BY)}.")] = "prompt,salience",
    chunk_tokens: Annotated[str, typer.Option(help="Tokens read at a time.")] = "64k",
    buffer_tokens: Annotated[str, typer.Option(help="Tokens kept of the whole document.")] = "32k",
    per_chunk_budget: Annotated[str, typer.Option(help="Tokens one chunk may promote.")] = "4k",
    nucleus: Annotated[float, typer.Option(help="Share of softmax(scores) that a chunk's champions hold.")] = 0.9,
    prompt_rows: Annotated[int, typer.Option(help="Rows of the prompt.", min=1)] = 16,
    width: options.Width = 512,
    heads: options.Heads = 8,
    device: options.Device = "cpu",
    repeats: Annotated[int, typer.Option(help="Runs of each pass.", min=1)] = 5,
    seed: options.Seed = 0,
    folder: Annotated[str, typer.Option(help="Folder for the embeddings meanwhile.", callback=output_folder)] = "",
    out: options.Out = "",
) -> None:
    """Both passes of the chunked shortlist over embeddings, and the memory they take."""
    sizes = {"chunk_tokens": chunk_tokens, "buffer_tokens": buffer_tokens, "per_chunk_budget": per_chunk_budget}
    sizes = {name: options.parse_size(text, f"--{name.replace('_', '-')}") for name, text in sizes.items()}
    plan = StreamPlan(**sizes, nucleus=nucleus)
    options.pick_device(device)
    places, ways = options.choose_some("--storage", storage, STORAGE), options.choose_some("--by", by, BY)
    for option, chosen in (("--storage", places), ("--by", ways)):
        if not chosen:
            raise typer.BadParameter("'': must have at least one entry", param_hint=option)
    rows = []
    for tokens in tqdm(options.parse_lengths(lengths), desc="lengths", disable=None):
        with tempfile.TemporaryDirectory(dir=folder or None) as place:
            file = Path(place) / "embeddings.npy"
            if {"ram", "disk"} & set(places):
                write_embeddings(file, tokens, width, seed)
            case = StreamCase(tokens, "", "", plan, width, heads, prompt_rows, device, seed, repeats, str(file))
            for where, way in product(places, ways):
                rows.append(in_own_process(measure_stream, replace(case, storage=where, by=way)))
    shared = {name: rows[-1].pop(name) for name in environment(torch.device(device))} if rows else {}
    about = {"dtype": "float32", "seed": seed, "plan": asdict(plan), "width": width, "heads": heads,
             "prompt_rows": prompt_rows}  # fmt: skip
    rows = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    report = {"benchmark": "stream", **shared, **about, "rows": rows}
    publish(report, stream_table(report), out)


def stream_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    plan = report["plan"]
    rows = [
        [
            f"{r['tokens']:,}", r["storage"], r["by"], f"{r['tokens_per_s']:,.0f} ({r['pass_1']['runs']} runs)",
            f"{r['tokens_per_s'] / ORIGINAL_SPEED:.0f}x", f"{r['reading_share']:.0%}", f"{r['kept']:,}",
            f"{r['pass_1_peak_mb']:,.0f}", f"{r['pass_2']['median_ms'] / 1e3:.2f}", f"{r['peak_mb']:,.0f}",
        ]
        for r in report["rows"]
    ]  # fmt: skip
    head = ["tokens", "document", "score", "pass 1, tokens/s", "vs original", "reading", "kept", "peak MB, pass 1",
            "pass 2, s", "peak MB"]  # fmt: skip
    return (
        f"{measured_on(report)}; embeddings of width {report['width']}, {report['heads']} heads, prompt of "
        f"{report['prompt_rows']} rows; chunk {plan['chunk_tokens']:,}, buffer {plan['buffer_tokens']:,}, budget "
        f"{plan['per_chunk_budget']:,}, nucleus {plan['nucleus']:g}\n\n{markdown(head, rows)}"
    )
