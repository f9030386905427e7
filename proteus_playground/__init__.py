"""Proteus Playground: adaptive sparse proto attention you can drag, look into and measure."""

from importlib import import_module

from .common import __version__ as __version__

__all__ = ["AttentionConfig", "KVBank", "ProteusAttention"]


def __getattr__(name: str):
    # On first use, so that `proteus --help` does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".attention", __name__), name)
