"""Proteus Playground: adaptive sparse proto attention you can drag, look into and measure."""

from .attention import AttentionConfig, ProteusAttention

__version__ = "0.1.0"
__all__ = ["AttentionConfig", "ProteusAttention"]
