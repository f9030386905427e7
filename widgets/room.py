"""A widget nobody sees, which tells plotly that the room for its figure has changed: plotly hears the window only."""

from __future__ import annotations

import anywidget

WATCH = """
export default { render({ el }) {
  el.style.cssText = "height: 0; width: 100%";
  let width = 0;
  const room = new ResizeObserver(() => {
    if (el.clientWidth === width) return;
    width = el.clientWidth;
    window.dispatchEvent(new Event("resize"));
  });
  room.observe(el);
  return () => room.disconnect();
} };
"""


class Room(anywidget.AnyWidget):
    """To be put into the same box as the figure."""

    _esm = WATCH
