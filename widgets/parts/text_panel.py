"""The text as a panel: tokens go to the browser once, every later picture is a few bytes per token."""

from __future__ import annotations

from importlib.resources import files

import anywidget
import numpy as np
from traitlets import Bytes, Int, List, Unicode


class TextPanel(anywidget.AnyWidget):
    """Tokens shaded by salience, dropped ones struck, the chosen row and what it reads marked.

    `clicked` is (token, count of clicks): the count makes a second click on the same token a change.
    `painted` comes back from the browser with the `request` it has drawn.
    """

    _esm = (files(__package__) / "text_panel.js").read_text(encoding="utf-8")
    tokens = List(Unicode()).tag(sync=True)
    marked = List([0, 0]).tag(sync=True)  # tokens from .. to that stand out: the fact that was asked for
    look = List([-1, 0]).tag(sync=True)  # (token to scroll to, count of times)
    salience = Bytes(b"").tag(sync=True)  # (T,) uint8
    kept = Bytes(b"").tag(sync=True)  # (T,) uint8, 1 where the token took part
    kind = Bytes(b"").tag(sync=True)  # (T,) uint8, the codes of `views`
    gate = Bytes(b"").tag(sync=True)  # (T,) int16, -1 for none
    raw = Bytes(b"").tag(sync=True)  # (T,) float32, the salience itself
    chosen = Int(-1).tag(sync=True)
    request = Int(0).tag(sync=True)
    painted = Int(0).tag(sync=True)
    clicked = List([-1, 0]).tag(sync=True)

    def draw(self, request: int, salience: np.ndarray, kept: np.ndarray, kind: np.ndarray, gate: np.ndarray,
             chosen: int) -> None:  # fmt: skip
        """One message; all arrays are `(T,)`. Shading favours the top of the text's own range."""
        low, high = np.quantile(salience, [0.02, 0.98]) if salience.size else (0.0, 1.0)
        shade = np.clip((salience - low) / max(float(high - low), 1e-9), 0, 1)
        with self.hold_sync():
            self.salience = (shade**2 * 255).astype(np.uint8).tobytes()
            self.raw = salience.astype("<f4").tobytes()
            self.kept = kept.astype(np.uint8).tobytes()
            self.kind = kind.astype(np.uint8).tobytes()
            self.gate = gate.astype("<i2").tobytes()
            self.chosen = int(chosen)
            self.request = request
