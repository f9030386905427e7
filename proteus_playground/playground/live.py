"""A model and the text that it reads: shelf-mini with a shelf, or random weights over bytes.

Axes: `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import AttentionConfig
from ..common.checks import whole_number
from ..common.texts import STORY, Text, load_text
from ..lm.model import ModelConfig, ProteusLM

SHELF = 7  # seed of the shelf
RANDOM = AttentionConfig(
    d_model=96, n_heads=6, n_kv_heads=2, shortlist=80, gates_per_group=16, n_anchors=2, head_top_p=0.8, init_scale=1.5
)


@dataclass(frozen=True)
class Live:
    """A model and the text that it reads, as `GateStory` needs them."""

    model: ProteusLM
    ids: Tensor  # (T,) int64
    tokens: list[str]  # T
    note: str  # one sentence: which model reads which text
    random: bool  # whether the weights are random


def random_bytes(text: Text, tokens: int = 1024, seed: int = 0) -> Live:
    """A model with random weights whose tokens are bytes; it reads the first `tokens` bytes of `text`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProteusLM(ModelConfig(vocab_size=256, n_layers=2, attention=RANDOM))
    data = text.body.encode()[:tokens]
    strings = [chr(byte) if byte < 128 else "·" for byte in data]
    note = f"Two layers read {len(data):,} bytes of “{text.name}”: nothing was learned, but keys gather all the same."
    return Live(model, torch.tensor(list(data)), strings, note, True)


def open_live(model: str = "shelf-mini", tokens: int = 1024) -> Live:
    """A model and its text: "shelf-mini", trained at every position of the slider, with a shelf, or "random".

    If shelf-mini cannot be loaded, the random model takes its place and `note` gives the reason. Raises `ValueError`
    for another name.
    """
    if model not in ("shelf-mini", "random"):
        raise ValueError(f"model={model!r}: allowed is 'shelf-mini' or 'random'")
    whole_number("tokens", tokens, 1)
    why = ""
    if model == "shelf-mini":
        try:
            return _shelf_reader(tokens)
        except FileNotFoundError:
            why = " shelf-mini is not in this installation."
        except ImportError as err:
            why = f" shelf-mini cannot be loaded: {err}."
    stand_in = random_bytes(load_text(STORY), tokens)
    return replace(stand_in, note=stand_in.note + why)


def _shelf_reader(tokens: int) -> Live:
    from ..lm.shelf import shelf
    from ..lm.shipped import load_shipped

    model, tokenizer = load_shipped("shelf-mini")
    # As many sentences as tokens are wanted: more than enough, since a sentence has several tokens.
    ids = tokenizer.encode(shelf(SHELF, tokens).text)[:tokens]
    note = f"shelf-mini ({len(model.blocks)} layers, trained with the slider) reads {len(ids):,} tokens of a shelf."
    return Live(model, torch.tensor(ids), tokenizer.strings(ids), note, False)
