"""A `ProteusLM` of random weights with fitted gates, saved and loaded again, that reads shelves: stands in for
shelf-mini."""

from __future__ import annotations

from pathlib import Path

import torch

from proteus_playground import AttentionConfig
from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.shelf import ShelfTokenizer, shelf


def build(folder: Path, *, d_model: int = 48, n_layers: int = 2, gates: int = 8, **attention):
    """(model in evaluation mode, tokenizer): 4 heads over 2 KV groups; its gates know a shelf's keys."""
    torch.manual_seed(0)
    tokenizer = ShelfTokenizer()
    sizes = {"d_model": d_model, "n_heads": 4, "n_kv_heads": 2, "shortlist": 48, "gates_per_group": gates}
    cfg = AttentionConfig(**{"route_heads": False, "init_scale": 2.0, **sizes, **attention})
    model = ProteusLM(ModelConfig(tokenizer.vocab_size, n_layers, cfg))
    x = model.embed(torch.tensor([tokenizer.encode(shelf(999, 60).text)]))
    for block in model.blocks:
        block.attn.calibrate(block.attn_norm(x))
        x = block(x)
    return ProteusLM.load(model.save(folder / "tiny.safetensors")).eval(), tokenizer
