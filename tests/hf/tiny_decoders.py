"""Small random decoders, and the attention that a test puts into their layers."""

import torch

from proteus_playground.attention import AttentionConfig, Gates
from proteus_playground.attention.adapter import ProteusLayer

T, VOCABULARY = 77, 101
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def make(kind, config, **extra):
    torch.manual_seed(0)
    return kind(config(**SIZES, **extra)).eval().requires_grad_(False)


def proteus(alpha, *, heads=6, groups=2, dim=8, **settings):
    torch.manual_seed(3)
    gates = Gates(groups, 6, dim, heads_per_group=heads // groups).fit(torch.randn(200, groups, dim))
    settings = dict(shortlist=24, gates_per_group=6, route_heads=False) | settings
    config = AttentionConfig(
        d_model=heads * dim, n_heads=heads, n_kv_heads=groups, head_dim=dim, flux_alpha=alpha, **settings
    )
    return ProteusLayer(gates, config)


def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def untouched(model):
    attentions = [block.self_attn for block in model.model.layers]
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    return model.model.config._attn_implementation == "sdpa" and not hooks and len(attentions) > 0


def compiled(model, how):
    if how == "model":
        return torch.compile(model, backend="eager")
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "decoder":
        model.model.forward = torch.compile(model.model.forward, backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    return model
