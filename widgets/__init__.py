"""The playground's widgets: `display(playground())`."""

from .apps import (
    bank_panel,
    duel_panel,
    evidence_panel,
    healing_panel,
    needle_panel,
    playground,
    prototype_panel,
    stream_panel,
    touch_panel,
    wall_panel,
)  # fmt: skip
from .parts.state import PRESETS, PlayState
from .workbench.workbench import Workbench

__all__ = [
    "PRESETS", "PlayState", "Workbench", "bank_panel", "duel_panel", "evidence_panel", "healing_panel", "needle_panel",
    "playground", "prototype_panel", "stream_panel", "touch_panel", "wall_panel",
]  # fmt: skip
