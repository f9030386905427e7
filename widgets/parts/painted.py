"""A widget nobody sees: it tells plotly that the room for its figure has changed, since plotly hears the window only,
and it tells the kernel which picture the browser has painted."""

from __future__ import annotations

import time

import anywidget
from traitlets import Int

WATCH = """
export default { render({ model, el }) {
  el.style.cssText = "height: 0; width: 100%";
  let width = 0;
  const room = new ResizeObserver(() => {
    if (el.clientWidth === width) return;
    width = el.clientWidth;
    window.dispatchEvent(new Event("resize"));
  });
  room.observe(el);
  model.on("change:asked", () => requestAnimationFrame(() => setTimeout(() => {
    model.set("painted", model.get("asked"));
    model.save_changes();
  })));
  return () => room.disconnect();
} };
"""
PATIENCE = 2.0  # seconds; a browser that was closed answers no more


class Room(anywidget.AnyWidget):
    """To be put into the same box as the figure. `painted` follows `asked` once that picture is on the screen."""

    _esm = WATCH
    asked = Int(0).tag(sync=True)
    painted = Int(0).tag(sync=True)

    def __init__(self, **traits):
        self._since = 0.0
        super().__init__(**traits)

    def ask(self, picture: int) -> None:
        """Picture number `picture` is on its way."""
        self._since = time.monotonic()
        self.asked = picture

    @property
    def free(self) -> bool:
        """Whether another picture may be sent: the last one is painted, or nobody looks."""
        return not self.painted or self.painted >= self.asked or time.monotonic() - self._since > PATIENCE
