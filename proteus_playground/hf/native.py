"""How transformers chooses attention functions: names of ours among them, and the model's own function again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NAME = "proteus_playground"  # of the attention function that a patched model runs


def register(name: str, attention: Callable) -> None:
    """Make `attention` known to transformers, with masks as `sdpa` takes them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)  # without it, masks (padding, sliding windows) are lost


@contextmanager
def implementation(decoder: nn.Module, name: str) -> Iterator[None]:
    """Run the attention called `name` in all layers of `decoder`."""
    before = [(config, config._attn_implementation) for config in _configs(decoder)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


def set_implementation(decoder: nn.Module, name: str) -> None:
    """Let the configs that `decoder` and its modules read name the attention called `name`."""
    for config in _configs(decoder):
        config._attn_implementation = name


def _configs(decoder: nn.Module) -> list:
    """Each config once, a whole before its parts."""
    found = {id(config): config for config in (getattr(module, "config", None) for module in decoder.modules())}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def own_attention(original: str, module, q, k, v, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The attention that `module` would run under the implementation `original`, with a mask of `sdpa`'s kind.

    `sdpa` and `eager` are run as they are, and `sdpa` in place of any other, since that takes other masks.
    """
    from transformers import AttentionInterface

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if original != "eager" or eager is None:
        return AttentionInterface()["sdpa"](module, q, k, v, mask, **kwargs)
    tokens, keys = q.shape[2], k.shape[2]
    if mask is None and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    kwargs.setdefault("dropout", 0.0)
    return eager(module, q, k, v, mask, **kwargs)
