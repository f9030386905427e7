"""A vocabulary of ninety words, and a calibrated model of random weights over it."""

from __future__ import annotations

import torch
from proteus_playground.experiments.evidence.arms import calibrate

from proteus_playground.attention import AttentionConfig
from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.recall.task import Words

WORDS = Words(keys=40, values=40, noise=10)


def small_model(seed: int = 0, **changes) -> ProteusLM:
    torch.manual_seed(seed)
    shape = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "gates_per_group": 4, "shortlist": 24, "dna_fraction": 0.75}
    cfg = AttentionConfig(**{**shape, "route_heads": False, "flux_alpha": 1.0, **changes})
    model = ProteusLM(ModelConfig(WORDS.size, 2, cfg, taps=3)).eval()
    return calibrate(model, torch.randint(WORDS.size, (4, 160)))
