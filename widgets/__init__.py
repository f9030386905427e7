"""The playground's widgets: `display(playground())`."""

from .apps import Workbench, playground
from .state import PRESETS, PlayState

__all__ = ["PRESETS", "PlayState", "Workbench", "playground"]
