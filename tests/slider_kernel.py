"""What `slider_endurance.py` runs inside a Jupyter kernel: a workbench, a watch over its pictures, and counts."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import weakref
from importlib.metadata import version

import ipywidgets
import numpy as np
import psutil
from plotly.graph_objects import FigureWidget
from proteus_playground.widgets import bank_panel, duel_panel, evidence_panel, playground, prototype_panel, stream_panel
from proteus_playground.widgets.parts.controls import Knob
from proteus_playground.widgets.parts.panel import STALE_SECONDS, Panel, held
from proteus_playground.widgets.parts.worker import QUIET_SECONDS
from proteus_playground.widgets.workbench.figure import heat_cells

LATE = 0.05  # seconds that a mark may come after STALE_SECONDS, on the kernel's own clock
OPEN = {
    "workbench": lambda: playground(length=256),
    "stream": lambda: stream_panel(model="random", page=3),
    "bank": lambda: bank_panel(model="random"),
    "prototypes": lambda: prototype_panel(model="random"),
    "duel": duel_panel,
    "evidence": evidence_panel,
}
ALIVE: weakref.WeakSet[Panel] = weakref.WeakSet()  # every panel that Python has not freed


def _noted(init):
    def noted(self, *given, **named) -> None:
        ALIVE.add(self)
        init(self, *given, **named)

    return noted


Panel.__init__ = _noted(Panel.__init__)


class Watch:
    """Looks whether the picture on show is marked in time, whenever it is not the one that the controls ask for."""

    def __init__(self, panel):
        self.panel, self.pictures, self.unmarked, self.marked = panel, 0, 0, 0
        self._loop, self._since = asyncio.get_running_loop(), None
        draw = panel._draw

        def drawn(number, frame) -> None:
            draw(number, frame)
            self.pictures += 1
            self._since = None
            self._follow()

        panel._draw = drawn
        panel.state.observe(lambda _: self._follow())

    def stale(self) -> bool:
        return self.panel.drawn.wanted != self.panel.wanted()

    def _follow(self) -> None:
        if not self.stale():
            self._since = None
        elif self._since is None:
            self._since = since = object()
            self._loop.call_later(STALE_SECONDS + LATE, self._look, since)

    def _look(self, since: object) -> None:
        if since is self._since:  # the same picture has been old all the time
            fresh = "pp-fresh" in self.panel.status.value
            self.unmarked, self.marked = self.unmarked + fresh, self.marked + (not fresh)


def sliders(panel) -> dict[str, tuple[str, list]]:
    """Name of each control with a slider -> the id that a browser writes to, and the values that it can take."""
    found = {}
    for knob in held(panel):
        if isinstance(knob, Knob):
            slider = knob.slider
            values = np.linspace(slider.min, slider.max, 60)
            if isinstance(slider, ipywidgets.FloatLogSlider):  # its ends are exponents, its value is not
                values = slider.base**values
            values = sorted({int(value) for value in values}) if isinstance(slider.max, int) else values.tolist()
            found[knob._control.name] = (slider.model_id, values)
    return found


async def rested(panel, seconds: float = 60.0) -> None:
    """Until the picture is the one that the controls ask for, and says so. TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while panel.drawn is None or panel.drawn.wanted != panel.wanted() or "pp-fresh" not in panel.status.value:
        if panel.problem or time.monotonic() > end:
            raise TimeoutError(f"still stale: {panel.status.value} {panel.problem}")
        await asyncio.sleep(0.01)


def right(panel) -> bool:
    """Whether figure, text and readout show what the layer gives when it runs again at the settings of the controls."""
    wanted = panel.wanted()
    view = panel.probe.view(wanted.layer, wanted.settings)
    figure, request = panel.pictures.widget, str(panel.number)
    return (
        np.array_equal(figure.data[0].z, heat_cells(view)[0])
        and np.frombuffer(panel.text.kept, np.uint8).astype(bool).tolist() == view.kept.tolist()
        and panel.text.request == panel.pictures._here.meta == panel.number
        and f'data-request="{request}"' in panel.numbers.value
    )


def registry() -> dict:
    """All open widgets, as ipywidgets 7 and 8 keep them."""
    from ipywidgets.widgets import widget

    return widget._instances if hasattr(widget, "_instances") else ipywidgets.Widget.widgets


def living() -> int:
    """Panels that Python has not freed.

    They are not looked for in a list of all of Python's objects, which would itself raise resident memory by 11 to
    21 MB, and by another amount at each count.
    """
    gc.collect()
    return len(ALIVE)


async def at_rest(seconds: float = 60.0) -> None:
    """Until no panel has worked for so long that freed memory is handed back. TimeoutError after `seconds`."""
    begun = worked = time.monotonic()
    while (now := time.monotonic()) - worked < QUIET_SECONDS + 0.5:
        if now - begun > seconds:
            raise TimeoutError(f"a panel was still at work after {seconds:g} s")
        if any(panel.worker.busy for panel in ALIVE):
            worked = now
        await asyncio.sleep(0.02)


async def counts(panels: int = 0, quiet: bool = True, seconds: float = 30.0) -> dict:
    """What could grow: resident bytes, widgets, figures, panels and threads.

    Waits until no more than `panels` panels live, because the thread of one that was closed ends when its work stops,
    and, if `quiet`, until the open panel has rested and handed back memory.
    """
    end = time.monotonic() + seconds
    while (alive := living()) > panels and time.monotonic() < end:
        await asyncio.sleep(0.1)
    if panels and quiet:
        await at_rest()
    open_widgets = list(registry().values())
    return {
        "rss": psutil.Process().memory_info().rss,
        "widgets": len(open_widgets),
        "figures": sum(isinstance(widget, FigureWidget) for widget in open_widgets),
        "panels": alive,
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


async def open_and_close(name: str, number: int) -> None:
    """Opens a panel and closes it: after its first picture if `number` is odd, else at once, while it loads."""
    panel = OPEN[name]()
    while number % 2 and panel.worker.busy is not None:
        await asyncio.sleep(0.01)
    panel.close()
    await asyncio.sleep(0.05)


def versions() -> dict:
    return {name: version(name) for name in ("ipywidgets", "ipykernel", "anywidget", "plotly")}


def tell(what) -> None:
    print(json.dumps(what))
