"""What the tests of recorded passes share."""

import pytest
import torch
from tiny_decoders import proteus

from proteus_playground.hf.cache import ProteusCache
from proteus_playground.hf.patch import full_attention_layers, handed

GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")


def cache_of(model, alpha=1.0, graph=True, **settings):
    layer = proteus(alpha, **settings)
    gates = layer.gates.to(model.device)
    return ProteusCache(model, dict.fromkeys(full_attention_layers(model), gates), layer.config, cuda_graph=graph)


def one(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, **handed(model, cache)).logits
