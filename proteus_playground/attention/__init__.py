"""The attention layer.

Read in this order: config, budget, gates, routing, decide, shortlist, backends/reference, heads, layer.
"""

from .backends import choose_backend
from .bank.bank import ENDLESS, KVBank
from .bank.view import BankContents, GateContents
from .budget import Budget, plan_budget
from .config import AttentionConfig
from .controllers import Decision, SparseHeadController
from .functional import AttentionResult, proteus_attention
from .gates import Gates
from .layer import ProteusAttention
from .multihead import CausalProteusMultiheadAttention
from .records import AttentionStats, AttentionTrace
from .rope import rope_frequencies, rotate
from .rows import RowReads, row_reads

__all__ = [
    "ENDLESS",
    "AttentionConfig",
    "AttentionResult",
    "AttentionStats",
    "AttentionTrace",
    "BankContents",
    "Budget",
    "CausalProteusMultiheadAttention",
    "Decision",
    "GateContents",
    "Gates",
    "KVBank",
    "ProteusAttention",
    "RowReads",
    "SparseHeadController",
    "choose_backend",
    "plan_budget",
    "proteus_attention",
    "rope_frequencies",
    "rotate",
    "row_reads",
]
