"""The attention stack. Imports run one way: leaves, then backends, then the functional core, then the modules."""

from .backends import choose_backend
from .budget import Budget, plan_budget
from .config import AttentionConfig
from .functional import AttentionResult, proteus_attention
from .gates import Gates
from .rope import rope_frequencies, rotate
from .rows import RowReads, row_reads

__all__ = ["AttentionConfig", "AttentionResult", "Budget", "Gates", "RowReads", "choose_backend", "plan_budget",
           "proteus_attention", "rope_frequencies", "rotate", "row_reads"]
