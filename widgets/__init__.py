"""The playground's widgets: `display(playground())`."""

from .apps import playground
from .state import PRESETS, PlayState
from .workbench import Workbench

__all__ = ["PRESETS", "PlayState", "Workbench", "playground"]
