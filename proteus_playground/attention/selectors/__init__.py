"""Ways to choose the keys of a row, ours among them, under one small protocol."""

from . import known
from .attend import SelectedRows, SelectorLayer, attend_all, attend_rows, choose
from .check import check_selector, load_selector
from .protocol import SELECTORS, Choice, Selector, Sight, StandIns, register, top
from .way import OURS, Way, Without, offered

__all__ = [
    "OURS", "SELECTORS", "Choice", "SelectedRows", "Selector", "SelectorLayer", "Sight", "StandIns", "Way", "Without",
    "attend_all", "attend_rows", "check_selector", "choose", "known", "load_selector", "offered", "register", "top",
]  # fmt: skip
