"""`proteus duel`: train a dense and a Proteus model side by side, or go on with it, and print the comparison."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.machine import markdown
from ...common.options import Device, Folder, Precision, choose, pick_device
from ...common.processes import together
from ...common.progress import resumable
from ...lm.shelf.tokenizer import ShelfTokenizer
from ...lm.training.data import Bytes, Codec
from .duel import PRESETS, DuelSettings, duel
from .files import REPORT, ROWS, write_report


def duel_command(
    preset: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}; other options override its values.")] = "small",
    text: Annotated[
        str, typer.Option(help="auto (Shakespeare; offline: Python's manual), a file, or hub:...")
    ] = "auto",
    seeds: Annotated[str, typer.Option(help="Comma-separated; several seeds are duels in OUT/seed-N.")] = "0",
    steps: Annotated[int | None, typer.Option(help="Most steps of each arm.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="For both arms; fewer steps if need be. 0: no limit.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per text.", min=2)] = None,
    shortlist: Annotated[int | None, typer.Option(help="L at alpha 1; length / 16 if left out.", min=1)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizers JSON file; bytes if left out.")] = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    out: Folder = Path("proteus-duel"),
) -> None:
    """Train a dense and a Proteus model on the same text and compare them; under torchrun on several devices."""
    base = choose("--preset", preset, PRESETS)
    length, steps, minutes = length or base.length, steps or base.steps, base.minutes if minutes is None else minutes
    wanted = {"text": text, "length": length, "steps": steps, "minutes": minutes or None}
    wanted["shortlist"] = shortlist or max(1, length // 16)
    where, codec, numbers = pick_device(device), _codec(tokenizer), _numbers(seeds)
    with together(where) as (rank, _):
        for seed in numbers:
            folder = out / f"seed-{seed}" if len(numbers) > 1 else out
            _run(replace(base, seed=seed, **wanted), folder, where, precision, codec, quiet=rank > 0)


def _run(settings: DuelSettings, out: Path, device, precision: str, codec: Codec, quiet: bool) -> None:
    turns = duel(settings, out, device=device, precision=precision, codec=codec)
    with resumable(), closing(turns), tqdm(disable=quiet, unit="step", mininterval=1) as bar:
        for turn in turns:
            bar.total = 2 * turn.steps
            bar.update()
            for score in turn.scores if not quiet else ():
                found = f"alpha {score.alpha:g}  perplexity {score.perplexity:.3f}"
                bar.write(f"{turn.arm:<8} step {score.step:>5}  {found}")
    if not quiet:
        typer.echo("\n".join((*report_lines(write_report(out, device)), f"Figures: {out / ROWS}, {out / REPORT}")))


def report_lines(report: dict) -> list[str]:
    """A report as a Markdown table, a sentence with the perplexities, and samples side by side."""
    last = {(score["arm"], score["alpha"]): score for score in report["scores"]}  # the latest of each
    header = ["arm", "alpha", "loss", "perplexity", "tokens/s", "memory MB", "heads awake", "density", "gate entropy",
              "dead gates"]  # fmt: skip
    rows = [
        [arm, f"{alpha:g}", f"{score['loss']:.4f}", f"{score['perplexity']:.3f}",
         f"{report['arms'][arm]['tokens_per_second']:,.0f}", f"{report['arms'][arm]['memory_bytes'] / 1e6:.0f}",
         f"{score['heads_awake']:.2f}", f"{score['density']:.3f}",
         *((f"{score['gate_entropy']:.2f}", score["dead_gates"]) if arm == "proteus" else ("-", "-"))]
        for (arm, alpha), score in last.items()
    ]  # fmt: skip
    lines = [markdown(header, rows)]
    dense, ours = last.get(("dense", 0.0)), last.get(("proteus", 1.0))
    if dense and ours:
        change = ours["perplexity"] / dense["perplexity"] - 1
        lines.append(f"Proteus at alpha 1, L = {report['asked']['shortlist']} of {report['asked']['length']} tokens: "
                    f"perplexity {change:+.1%} against dense.")  # fmt: skip
        lines += side_by_side("dense, alpha 0\n\n" + dense["sample"], "Proteus, alpha 1\n\n" + ours["sample"])
    return lines


def side_by_side(left: str, right: str, width: int = 56) -> list[str]:
    """Two texts in two columns of `width` characters."""
    columns = [[part for line in text.splitlines() for part in wrap(line, width) or [""]] for text in (left, right)]
    return [f"{a:<{width}} | {b}" for a, b in zip_longest(*columns, fillvalue="")]


def _codec(path: Path | None) -> Codec:
    if path is None:
        return Bytes()
    if not path.is_file():
        raise typer.BadParameter(f"{str(path)!r}: must be a tokenizers JSON file", param_hint="--tokenizer")
    return ShelfTokenizer(path)


def _numbers(seeds: str) -> list[int]:
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{seeds!r}: must be whole numbers >= 0, such as 0,1,2", param_hint="--seeds")
    return list(dict.fromkeys(map(int, parts)))
