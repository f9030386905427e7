"""The text as a widget: tokens are sent to the browser once, and later pictures take a few bytes per token."""

from __future__ import annotations

from importlib.resources import files

import anywidget
import numpy as np
from traitlets import Bytes, Dict, Int, List, Unicode

from proteus_playground.playground.glossary import sentence

TAUGHT = ("salience", "gate", "window", "anchor", "ring", "note")  # words of a token's tooltip


class TextPanel(anywidget.AnyWidget):
    """Tokens shaded by salience. Dropped tokens are struck through; the chosen row and the keys it reads are marked.

    `clicked` is (token, count of clicks): the count changes even when the same token is clicked twice.
    The browser sets `painted` to the `request` that it has drawn.
    """

    terms = Dict({word: sentence(word) for word in TAUGHT}).tag(sync=True)  # shown in a token's tooltip
    _esm = (files(__package__) / "text_panel.js").read_text(encoding="utf-8")
    tokens = List(Unicode()).tag(sync=True)
    marked = List([0, 0]).tag(sync=True)  # first and last + 1 of the tokens that hold the fact asked for
    look = List([-1, 0]).tag(sync=True)  # (token to scroll to, count of scrolls)
    salience = Bytes(b"").tag(sync=True)  # (T,) uint8
    kept = Bytes(b"").tag(sync=True)  # (T,) uint8, 1 where the token took part
    kind = Bytes(b"").tag(sync=True)  # (T,) uint8, the codes of `views`
    other = Bytes(b"").tag(sync=True)  # (T,) uint8, as `kind`, of the settings that are pinned; empty for none
    gate = Bytes(b"").tag(sync=True)  # (T,) int16, -1 for none
    raw = Bytes(b"").tag(sync=True)  # (T,) float32, the salience itself
    chosen = Int(-1).tag(sync=True)
    request = Int(0).tag(sync=True)
    painted = Int(0).tag(sync=True)
    clicked = List([-1, 0]).tag(sync=True)

    def draw(self, request: int, salience: np.ndarray, kept: np.ndarray, kind: np.ndarray, gate: np.ndarray,
             chosen: int, other: np.ndarray | None = None) -> None:  # fmt: skip
        """Sends one message. All arrays are `(T,)`. Shades grow with the square of salience."""
        low, high = np.quantile(salience, [0.02, 0.98]) if salience.size else (0.0, 1.0)
        shade = np.clip((salience - low) / max(float(high - low), 1e-9), 0, 1)
        with self.hold_sync():
            self.salience = (shade**2 * 255).astype(np.uint8).tobytes()
            self.raw = salience.astype("<f4").tobytes()
            self.kept = kept.astype(np.uint8).tobytes()
            self.kind = kind.astype(np.uint8).tobytes()
            self.other = b"" if other is None else other.astype(np.uint8).tobytes()
            self.gate = gate.astype("<i2").tobytes()
            self.chosen = int(chosen)
            self.request = request
