"""An invisible widget that keeps a panel's keys from the notebook around it.

In command mode a notebook takes plain keys for itself: an arrow folds headings, and "d", pressed twice, deletes the
cell. Notebook 7 does so before a slider sees the key, JupyterLab after it.
"""

from __future__ import annotations

import anywidget

# Lumino, which both are built on, looks for no shortcut where this attribute is set. The window's capturing listener
# gets a key before Lumino's.
WATCH = """
const MARK = "data-lm-suppress-shortcuts";
const keep = (event) => {
  if (!event.target.closest?.(".pp-app")) return;
  const plain = !(event.ctrlKey || event.altKey || event.metaKey || event.shiftKey);
  event.target.toggleAttribute(MARK, plain);
};
export default { render() {
  window.addEventListener("keydown", keep, true);
  return () => window.removeEventListener("keydown", keep, true);
} };
"""


class Keys(anywidget.AnyWidget):
    """Lies in a panel. Keys with Control, Alt, Meta or Shift remain the notebook's."""

    _esm = WATCH
