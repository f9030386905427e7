"""The wall panel: dense attention, unfused and fused, and Proteus are measured at growing lengths on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

import ipywidgets as w
import torch
from proteus_playground.experiments.speed.rivals import OURS
from proteus_playground.experiments.speed.wall import WHO, crossing, line, stand_in
from traitlets import Float, HasTraits, Int

from proteus_playground.common.machine import environment

from ..parts.boxes import button, column, row
from ..parts.controls import Knob, grid
from ..parts.html import cell, key, no_tiles_html, note_html, tiles_html
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.state import BY_NAME
from .figure import COLOURS, WallPictures

LEGEND = (
    '<div class="pp-legend">' + "".join(key(COLOURS[who], label, line=True) for who, label in WHO.items())
    + '<span style="color:#a3330a">✖ stops here</span><span>grey: Proteus at earlier settings</span></div>'
)  # fmt: skip

LONGEST_TIP = "Tokens of the longest text that was measured, and what one call takes there."
READS_TIP = "Keys and notes that a query of Proteus reads there, on average."


class WallState(HasTraits):
    flux_alpha = Float(1.0)
    shortlist = Int(256)


class WallPanel(Panel):
    """What `wall_panel` returns. `rows` holds what was measured so far, as `climb` gives it."""

    def __init__(self, run: Callable[..., Iterator[dict]], device: torch.device, lengths: list[int], limit_s: float):
        super().__init__("The wall", {})
        self.rows: list[dict] = []
        self.device, self.lengths, self.limit_s, self._run = device, lengths, limit_s, run
        self.state, self.pictures = WallState(), WallPictures(lengths)
        self.said, self.beside_it = w.HTML(), w.HTML(stand_in_html())
        self.start = button("Start", "Measure all three at growing lengths", self.begin, button_style="info")
        self.cancel = button("Stop", "Stop after this call; Start continues from there", self.halt, disabled=True)
        again = button("measure anew", "Forget everything that was measured", self._forget)
        knobs = [Knob(self.state, BY_NAME[name], live=False) for name in ("flux_alpha", "shortlist")]
        controls = column("pp-top", grid(knobs, 210), row("pp-actions", self.start, self.cancel, again))
        self.place("pp-wall", self.banner, controls, self.numbers, w.HTML(LEGEND), self.pictures.widget, self.said,
                   self.beside_it, Room())  # fmt: skip
        self.state.observe(lambda _: self._moved(), ["flux_alpha", "shortlist"])
        self.banner.value = note_html(banner(device, limit_s))
        self._draw()
        self.say("ready", what="press Start")

    @property
    def setting(self) -> tuple[float, int]:
        return self.state.flux_alpha, self.state.shortlist

    def _moved(self) -> None:
        """For another α or L: keeps the rows of dense attention, and measures Proteus again if there are any rows."""
        self._draw()
        if self.rows:
            self.begin()

    def begin(self) -> None:
        """Measures what is missing at the sliders' settings."""
        alpha, shortlist = self.setting
        rows, self.problem = list(self.rows), ""
        self.say("busy", 0.0, f"{self.lengths[0]:,} tokens")

        def work(stop, progress) -> None:
            for new in self._run(rows, alpha, shortlist, self.device, self.lengths, self.limit_s, stop):
                rows.append(new)
                self._new = list(rows)
                progress((1 + self.lengths.index(new["tokens"])) / len(self.lengths), f"{new['tokens']:,} tokens")

        self.worker.cancel()
        self.worker.submit("model", work, self._over, self._failed, self._going)

    def _going(self, _: int, share: float, what: str) -> None:
        self.rows = self._new
        self._draw()
        self.say("busy", share, what)

    def _over(self, *_) -> None:
        self._draw()
        self.say("done", what="measured")

    def _forget(self) -> None:
        self.worker.cancel()
        self.rows = []
        self._draw()
        self.say("ready", what="press Start")

    def _draw(self) -> None:
        self.number += 1
        self.pictures.draw(self.rows, *self.setting, self.number)
        self.numbers.value = numbers_html(self.number, self.rows, *self.setting)
        said = crossing(self.rows, *self.setting)
        self.said.value = "".join(f'<p class="pp-said">{escape(sentence)}</p>' for sentence in said)


def banner(device: torch.device, limit_s: float) -> str:
    """What is measured, and on what."""
    here = environment(device)
    kind = "float16" if device.type == "cuda" else "float32"
    return (
        f"One attention layer of 8 heads reads random vectors on this machine: {here['device']}, "
        f"torch {here['torch']}, {kind}. “Unfused” keeps the whole table of scores in memory; "
        f"“fused” is PyTorch's own attention, which never "
        f"stores it. A line stops when a call takes longer than {limit_s:g} s or would not fit into memory."
    )


def numbers_html(number: int, rows: list[dict], alpha: float, shortlist: int) -> str:
    """The longest text of each kind of attention, with time and memory there, and the keys that ours reads."""
    cells = []
    for who, label in WHO.items():
        good = [row for row in line(rows, who, alpha, shortlist) if not row["why"]]
        if good:
            last = good[-1]
            below = f"{last['ms']:,.0f} ms" + (f", {last['mb']:,.0f} MB" if last["mb"] else "")
            cells.append(cell(f"{label}: longest", f"{last['tokens']:,}", below,
                              LONGEST_TIP))  # fmt: skip
            if who == OURS and last["keys"]:
                cells.append(cell("keys per query", f"{last['keys']:,.0f}", f"of up to {last['tokens']:,}",
                                  READS_TIP))  # fmt: skip
    return tiles_html(number, cells) if cells else no_tiles_html(number, "Nothing is measured yet: press Start.")


def stand_in_html() -> str:
    """What a free T4 would show, from a stored measurement, as a table."""
    note, rows = stand_in()
    lengths = sorted({row["tokens"] for row in rows})
    names = {"efficient": "dense, fused (memory-efficient)", OURS: "Proteus, α 1"}
    head = "".join(f"<th>{n:,}</th>" for n in lengths)
    body = ""
    for who, label in names.items():
        at = {
            row["tokens"]: f"{row['ms']:,.1f} ms<br>{row['peak_mb'] / 1e3:.1f} GB" for row in rows if row["who"] == who
        }
        body += f"<tr><th>{label}</th>" + "".join(f"<td>{at.get(n, '–')}</td>" for n in lengths) + "</tr>"
    return (
        f'<details class="pp-stand-in" open><summary><b>For comparison: what a free T4 would show</b></summary>'
        f"<table><tr><th>tokens</th>{head}</tr>{body}</table>{note_html(note)}</details>"
    )
