"""The frame of every panel: title, banner, tiles, captions, status and a worker; and how a panel is closed.

A subclass makes its widgets between `super().__init__` and `place`, which puts them below the title.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable, Iterable

import ipywidgets as w
from traitlets import HasTraits

from .boxes import column, row
from .html import caption_html, status_html, styles, title_html
from .keys import Keys
from .worker import Worker

STALE_SECONDS = 0.12  # a picture that is replaced sooner is not marked as old: the mark would only flash


class Panel(w.VBox):
    """A frame with a `worker`. `number` grows with every picture, `problem` is the last error as text, "" for none.

    legends: name of a caption -> its legend in HTML; the caption `name` has the CSS class `pp-at-name`.
    """

    cancel: w.Button | None = None  # disabled by `say` while nothing runs
    state: HasTraits | None = None  # what the panel's controls set; its observers are removed by `close`

    def __init__(self, title: str, legends: dict[str, str]):
        self.number, self.problem, self._legends = 0, "", legends
        self.title, self.banner, self.numbers, self.status = w.HTML(title_html(title)), w.HTML(), w.HTML(), w.HTML()
        self.captions = {name: w.HTML() for name in legends}
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        self.worker = Worker(pace=self._pace)

    def place(self, css_class: str, *below: w.Widget) -> None:
        """Puts title and status above the widgets `below`, and the panel into its notebook cell."""
        super().__init__([styles(), Keys(), row("pp-head", self.title, self.status), *below])
        self.add_class("pp-app")
        self.add_class(css_class)
        _close_those_of_an_earlier_run(self)

    def beside(self, figure: Iterable[w.Widget], side: Iterable[w.Widget]) -> w.HBox:
        """A figure with the captions that lie over it, and a column at its right, below it on a narrow screen."""
        return row("pp-panels", column("pp-figure", *figure), column("pp-side", *side))

    def caption(self, name: str, title: str, sentence: str, legend: str | None = None) -> None:
        """Writes one caption; `legend` replaces the usual one."""
        self.captions[name].value = caption_html(title, self._legends[name] if legend is None else legend, sentence)

    def say(self, state: str, share: float | None = None, what: str = "") -> None:
        """Shows a status, as `status_html` describes it."""
        self.status.value = status_html(state, share, what)
        if self.cancel is not None:
            self.cancel.disabled = state not in ("busy", "stale")

    def say_soon(self, say: Callable[[], None]) -> None:
        """Calls `say` after STALE_SECONDS, or at once where no event loop runs."""
        try:
            asyncio.get_running_loop().call_later(STALE_SECONDS, say)
        except RuntimeError:
            say()

    def halt(self) -> None:
        """Stops the work; what was made so far stays on show."""
        self.worker.cancel()
        self.say("stopped")

    def close(self) -> None:
        """Stops the work and releases everything: a closed panel cannot be used or displayed again."""
        if self.comm is None:  # closed already, or never finished
            return
        self.worker.close()
        self._end()
        if self.state is not None:
            self.state.unobserve_all()
        release(self)
        super().close()

    def _end(self) -> None:
        """Called once by `close`, for what a subclass has to end besides its `worker`."""

    def _progress(self, _: int, share: float, what: str) -> None:
        self.say("busy", share, what)

    def _failed(self, _: int, err: BaseException) -> None:
        self.problem = str(err) or type(err).__name__
        self.say("error", what=self.problem)

    def _pace(self) -> None:
        """Called on the worker after each picture, to wait for a slow browser."""


# Closing


def held(root: w.Widget) -> list[w.Widget]:
    """Every open widget that `root` leads to by an attribute, placed or not, or by a synchronised trait of any of them.

    Such traits are children, layouts and styles.
    """
    found, waiting = {root.model_id: root}, [root]
    while waiting:
        widget = waiting.pop()
        values = [getattr(widget, name, None) for name in widget.keys]
        values += vars(root).values() if widget is root else ()
        for value in values:
            parts = value.values() if isinstance(value, dict) else value
            for part in parts if isinstance(value, (dict, list, tuple)) else (value,):
                if isinstance(part, w.Widget) and part.comm is not None and part.model_id not in found:
                    found[part.model_id] = part
                    waiting.append(part)
    return [widget for widget in found.values() if widget is not root]


def release(root: w.Widget) -> None:
    """Closes every widget that `root` holds, so that Python can free them; `root` itself is left to the caller.

    ipywidgets keeps each open widget in a registry, with everything its observers refer to; closing a box does not
    close what lies in it. Moreover an anywidget whose JavaScript is a file (plotly's FigureWidget) is kept by that
    file: `AnyWidget.__init__` connects a function that refers to the widget to the file's `changed` signal, and nothing
    disconnects it (https://github.com/manzt/anywidget/issues/929). That signal reloads JavaScript under development
    and plotly's file does not change, so all its functions are disconnected here.
    """
    for widget in held(root):
        for made in type(widget).__mro__:
            changed = getattr(vars(made).get("_esm"), "changed", None)
            if changed is not None:
                changed.disconnect()
        widget.close()


# A cell that is run again

_MADE_IN: dict[str, tuple[str, weakref.WeakSet[Panel]]] = {}  # notebook cell -> one run of it, and its panels


def running_cell() -> tuple[str, str] | None:
    """(the notebook cell, this run of it) while a cell runs; None elsewhere, or where the front end names no cell."""
    ipython = sys.modules.get("IPython")  # loaded wherever a notebook runs
    kernel = getattr(ipython and ipython.get_ipython(), "kernel", None)
    if not hasattr(kernel, "get_parent"):
        return None
    message = kernel.get_parent("shell") or {}
    cell = message.get("metadata", {}).get("cellId")
    return (cell, message["header"]["msg_id"]) if cell else None


def _close_those_of_an_earlier_run(panel: Panel) -> None:
    """A cell that is run again shows its new panels only, so the panels of its last run are closed."""
    place = running_cell()
    if place is None:
        return
    cell, run = place
    last_run, made = _MADE_IN.get(cell, (None, ()))
    if last_run != run:
        for old in list(made):
            old.close()
        made = weakref.WeakSet()
        _MADE_IN[cell] = run, made
    made.add(panel)
