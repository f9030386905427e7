"""Ten thousand moves of the workbench's sliders in a real Jupyter kernel, and panels opened and closed again and again.

python tests/slider_endurance.py                                # ipywidgets as installed, then 7.7.1; prints a table
python tests/slider_endurance.py --page docs/reliability.md     # and puts it between the page's marks

The moves are the messages that a browser sends while a slider is dragged: each waits until the kernel has taken the
one before. Like a browser, this program also says which picture it has painted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from old_widgets import install
from reliability import put

from proteus_playground.common.machine import environment, markdown

HERE = Path(__file__).parent
WARM_UP = 500  # moves before the first count
FEW = 6  # times that a panel is opened and closed before its first count
DRAG = 100  # moves between two rests, at which the picture is checked
MOST_GROWTH = 50 << 20  # bytes of resident memory
MAIN = ("flux_alpha", "keep_ratio", "shortlist", "dna_fraction")
PAUSE = 0.004  # seconds between two moves
TIMEOUT = 180.0


class Kernel:
    """A kernel, and the part of a browser: what it says about widgets is read, and painted pictures are reported."""

    def __init__(self, client):
        self.client, self.painted = client, None  # the id of the widget that waits for `painted`

    def run(self, code: str, cell: str | None = None):
        """Runs `code`; the last line that it prints, from JSON. `cell`: the id of the notebook cell that it stands in.

        Raises `RuntimeError` with the kernel's own words where it fails.
        """
        session, said = self.client.session, []
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
        message = session.msg("execute_request", content, metadata={"cellId": cell} if cell else None)
        self.client.shell_channel.send(message)
        for kind, content in self._until_idle(message):
            if kind == "stream" and content["name"] == "stdout":
                said.append(content["text"])
            if kind == "error":
                raise RuntimeError("\n".join(content["traceback"]))
        lines = "".join(said).strip().splitlines()
        return json.loads(lines[-1]) if lines else None

    def write(self, widget: str, state: dict) -> dict:
        """Sends what a browser sends when a widget's `state` changes; returns the message."""
        data = {"method": "update", "state": state, "buffer_paths": []}
        message = self.client.session.msg("comm_msg", {"comm_id": widget, "data": data})
        self.client.shell_channel.send(message)
        return message

    def move(self, widget: str, value) -> None:
        """Moves a slider, and waits until the kernel has taken it."""
        for _ in self._until_idle(self.write(widget, {"value": value})):
            pass

    def _until_idle(self, sent: dict) -> Iterator[tuple[str, dict]]:
        """Every message that the kernel sends until it has worked off `sent`; those that belong to it are yielded."""
        end = time.monotonic() + TIMEOUT
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.0, end - time.monotonic()))
            content, ours = message["content"], message["parent_header"].get("msg_id") == sent["header"]["msg_id"]
            if message["msg_type"] == "comm_msg" and content["comm_id"] == self.painted:
                request = content["data"].get("state", {}).get("request")
                if request is not None and content["data"]["method"] == "update":
                    self.write(self.painted, {"painted": request})
            if ours:
                yield message["msg_type"], content
                if message["msg_type"] == "status" and content["execution_state"] == "idle":
                    return


@contextmanager
def kernel(path: str | None = None) -> Iterator[Kernel]:
    """A kernel of this Python, in which `path` (a PYTHONPATH) comes first."""
    from jupyter_client.manager import KernelManager

    with tempfile.TemporaryDirectory(prefix="proteus-kernel-") as home:
        env = {**os.environ, "IPYTHONDIR": home, **({"PYTHONPATH": path} if path else {})}
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(env=env, cwd=str(HERE))
        client = manager.client()
        try:
            client.start_channels()
            client.wait_for_ready(timeout=TIMEOUT)
            yield Kernel(client)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


PANELS = ("workbench", "stream", "bank", "prototypes", "duel", "evidence")


def endure(
    there: Kernel,
    moves: int,
    cycles: int,
    panels: tuple[str, ...] = PANELS,
    quiet: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Drags, opens and closes; what came of it. Raises `RuntimeError` for a picture that is not the one asked for.

    quiet: leave the panel alone before memory is measured, until it has handed back what it can.
    """
    there.run("import slider_kernel as here")
    found = {"versions": there.run("here.tell(here.versions())"), "moves": moves, "cycles": cycles, "quiet": quiet}
    found |= _drag(there, moves, quiet, say)
    found["opened"] = {}
    for name in panels:
        found["opened"][name] = _twice(there, f"await here.open_and_close({name!r}, {{}})", cycles)
        say(name)
    again = "panel = here.playground(length=256); await here.rested(panel)"
    found["opened"]["workbench, its cell run again"] = _twice(there, again, cycles, f"1, {quiet}", "a cell")
    return found


def _drag(there: Kernel, moves: int, quiet: bool, say: Callable[[str], None]) -> dict:
    there.run("panel = here.playground(); await here.rested(panel)")
    there.run("watch = here.Watch(panel)")
    there.painted = there.run("here.tell(panel.text.model_id)")
    knobs, draw, counts = there.run("here.tell(here.sliders(panel))"), random.Random(0), []
    others = sorted(set(knobs) - set(MAIN))
    warm_up, began = min(WARM_UP, moves // 2), time.monotonic()
    for move in range(1, moves + 1):
        name = draw.choice(MAIN) if draw.random() < 0.95 else draw.choice(others)
        widget, values = knobs[name]
        there.move(widget, draw.choice(values))
        time.sleep(PAUSE)
        if move % DRAG == 0 or move == moves:
            there.run("await here.rested(panel)")
            if not there.run("here.tell(here.right(panel))"):
                raise RuntimeError(f"move {move}: the picture is not the one that the controls ask for")
        if move in (warm_up, moves) or move % 1000 == 0:
            counts.append(there.run(f"here.tell(await here.counts(1, {quiet}))"))
            say(f"{move:,} moves, {counts[-1]['rss'] / 1e6:,.0f} MB")
    seconds = time.monotonic() - began
    watched = there.run("here.tell({name: getattr(watch, name) for name in ('pictures', 'marked', 'unmarked')})")
    there.painted = None
    there.run("panel.close(); del panel, watch")
    return {"warm_up": warm_up, "seconds": seconds, "counts": counts, **watched}


def _twice(there: Kernel, code: str, times: int, counted: str = "", cell: str | None = None) -> tuple[dict, dict]:
    """Counts after `code` has run a few times, and `times` more; `code` may hold the number of the run."""
    counts = []
    for runs in (min(FEW, times), times):
        for number in range(runs):
            there.run(code.format(number), cell)
        counts.append(there.run(f"here.tell(await here.counts({counted}))"))
    return tuple(counts)


def faults(found: dict) -> list[str]:
    """What is not as docs/reliability.md promises. Memory that is measured at once is not judged."""
    said = [f"{found['unmarked']} pictures were old and not marked"] if found["unmarked"] else []
    for name, (first, last) in {"the moves": (found["counts"][0], found["counts"][-1]), **found["opened"]}.items():
        for what in ("widgets", "figures", "panels"):
            if last[what] > first[what]:
                said.append(f"{name}: {last[what]} {what}, {first[what]} before")
        workers = last["threads"].count("proteus-worker")
        others = len(last["threads"]) - workers - len([one for one in first["threads"] if one != "proteus-worker"])
        if workers > last["panels"] or others > 0:
            said.append(f"{name}: threads {last['threads']}, before {first['threads']}")
        if found["quiet"] and last["rss"] - first["rss"] > MOST_GROWTH:
            said.append(f"{name}: {(last['rss'] - first['rss']) / 1e6:.0f} MB more")
    return said


def table(reports: list[dict]) -> str:
    """A column per generation of widgets."""

    def line(what: str, of: Callable[[dict], object]) -> list[str]:
        return [what, *(str(of(found)) for found in reports)]

    def grown(pair) -> str:
        first, last = pair
        return (
            f"{first['rss'] / 1e6:,.0f} → {last['rss'] / 1e6:,.0f} MB, {first['widgets']} → {last['widgets']} widgets"
        )

    moves, warm_up, cycles = reports[0]["moves"], reports[0]["warm_up"], reports[0]["cycles"]
    rows = [
        line("moves", lambda found: f"{found['moves']:,} in {found['seconds']:,.0f} s"),
        line("pictures drawn", lambda found: f"{found['pictures']:,}"),
        line("old for longer than 0.12 s: marked, not marked", lambda found: f"{found['marked']}, {found['unmarked']}"),
        line(f"after {warm_up:,} → {moves:,} moves", lambda found: grown((found["counts"][0], found["counts"][-1]))),
        line("figures, panels, threads at the end", lambda found: f"{found['counts'][-1]['figures']}, "
             f"{found['counts'][-1]['panels']}, {len(found['counts'][-1]['threads'])}"),
        *(line(f"{name}, {cycles} times", lambda found, name=name: grown(found["opened"][name]))
          for name in reports[0]["opened"]),
    ]  # fmt: skip
    heads = [
        f"ipywidgets {found['versions']['ipywidgets']}, ipykernel {found['versions']['ipykernel']}" for found in reports
    ]
    return markdown(["", *heads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for path in (None, install(Path(folder))):
            with kernel(path) as there:
                reports.append(endure(there, given.moves, given.cycles, say=lambda text: print(text, file=sys.stderr)))
    on, plotly = environment(torch.device("cpu")), reports[0]["versions"]["plotly"]
    text = f"{table(reports)}\n\nshelf-mini, float32, seed 0 of the moves. {on['device']}, threads: {on['threads']}, "
    text += f"torch {on['torch']}, plotly {plotly}, Python {on['python']}, {on['date']}."
    print(text)
    if given.page:
        put(given.page, "endurance", text)
    wrong = [fault for found in reports for fault in faults(found)]
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
