"""The attention stack. Imports run one way: leaves, then backends, then the functional core, then the modules."""

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
from .rope import rope_frequencies, rotate
from .routing import prior_route
from .rows import RowReads, row_reads
from .stats import AttentionStats
from .trace import AttentionTrace

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
    "prior_route",
    "proteus_attention",
    "rope_frequencies",
    "rotate",
    "row_reads",
]
