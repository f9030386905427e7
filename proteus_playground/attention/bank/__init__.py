"""The KV bank: keys and values of one layer in memory of fixed size."""

from .bank import ENDLESS, KVBank, fingerprint
from .view import BankContents, GateContents

__all__ = ["ENDLESS", "BankContents", "GateContents", "KVBank", "fingerprint"]
