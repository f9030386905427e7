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
  const tell = () => {
    model.set("painted", model.get("asked"));
    model.save_changes();
  };
  model.on("change:asked", () => requestAnimationFrame(() => setTimeout(tell)));
  tell();  // a browser shows the panel: the kernel knows it before the first click
  return () => room.disconnect();
} };
"""
NOBODY = -1  # `painted` before a browser shows the panel
PATIENCE, LONGEST = 2.0, 32.0  # seconds until a browser that has not painted is taken for closed: at first, at most


class Room(anywidget.AnyWidget):
    """Lies in the same box as the figure. `painted` becomes `asked` once that picture is on the screen.

    A picture that is sent before the last one is painted doubles the wait for the next, up to LONGEST. Otherwise a slow
    browser would get more pictures than it can paint, and clicks would have to wait for them.
    """

    _esm = WATCH
    asked = Int(0).tag(sync=True)
    painted = Int(NOBODY).tag(sync=True)

    def __init__(self, **traits):
        self._since, self._patience = 0.0, PATIENCE
        super().__init__(**traits)

    def ask(self, picture: int) -> None:
        """Says that picture number `picture` has been sent."""
        behind = NOBODY < self.painted < self.asked
        self._patience = min(2 * self._patience, LONGEST) if behind else PATIENCE
        self._since, self.asked = time.monotonic(), picture

    @property
    def free(self) -> bool:
        """Whether another picture may be sent: the last one is painted, or no browser shows the panel."""
        late = time.monotonic() - self._since > self._patience
        return self.painted == NOBODY or self.painted >= self.asked or late
