"""An invisible widget that passes on two events: that its box was resized, and which picture the browser has painted.

Plotly reacts only to a resized window, so the first goes to plotly as such; the second goes to the kernel.
"""

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
PATIENCE = 2.0  # seconds after which a browser that has not painted is taken for closed


class Room(anywidget.AnyWidget):
    """Lies in the same box as the figure. `painted` becomes `asked` once that picture is on the screen."""

    _esm = WATCH
    asked = Int(0).tag(sync=True)
    painted = Int(0).tag(sync=True)

    def __init__(self, **traits):
        self._since = 0.0
        super().__init__(**traits)

    def ask(self, picture: int) -> None:
        """Says that picture number `picture` has been sent."""
        self._since = time.monotonic()
        self.asked = picture

    @property
    def free(self) -> bool:
        """Whether another picture may be sent: the last one is painted, or no browser shows the panel."""
        return not self.painted or self.painted >= self.asked or time.monotonic() - self._since > PATIENCE
