"""Swap the attention of chosen layers of a transformers decoder, or record what those layers see.

transformers hands an attention function queries and keys that RoPE has already turned. They are turned back
with the model's own frequencies and positions, because prototypes live in key space before RoPE. Supported:
decoders whose layers hold a causal `self_attn` with `q_proj`, `k_proj`, `v_proj`, `o_proj` and half-split
RoPE over the whole head (Llama, SmolLM2, Mistral, Qwen2, Qwen3 with its QK-norm, the full layers of Gemma 3).
Layers that are not chosen, sliding-window layers among them, run transformers' own `sdpa`. Decoding with a
transformers KV cache is refused: `hf.cache.ProteusCache` keeps one that goes through the patch.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from threading import get_ident
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention.captured import CapturedLayer, half
from ..attention.rope import rotate
from ..attention.settings import LayerShape

NAME = "proteus_playground"
CACHE_NAMES = ("cache", "past_key_values")  # what a pass calls its KV cache: since transformers 5.24, and before
REFUSED = ("softcap", "s_aux", "position_bias", "sliding_window", "cache")  # would change the scores unseen


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer is asked for: un-rotated q `(B, T, H, d)`, k and v `(B, T, G, d)`."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor  # (d / 2,) radians per token
    positions: Tensor  # (B, T) tokens
    scale: float
    keep: Tensor | None  # (B, T) bool, False at padding; None when nothing is padded


Attend = Callable[[AttentionCall], Tensor | None]  # (B, T, H, d), or None to let the model's own attention run


class _Slot:
    """One chosen layer while it is patched: what to call, and the pass's rotary tables.

    thread: the only one whose passes may come here, None for any. checked: what all slots know to be right.
    """

    def __init__(self, layer: int, attend: Attend, rotary: nn.Module, thread: int | None, checked: list):
        self.layer, self.attend, self.rotary, self.thread, self.checked = layer, attend, rotary, thread, checked
        self.tables, self.positions = None, None

    def remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.thread not in (None, get_ident()):
            raise RuntimeError("another thread is generating with this model: wait for it, or load the model again")
        self.tables, self.positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")


_SLOTS: WeakKeyDictionary[nn.Module, _Slot] = WeakKeyDictionary()


@contextmanager
def patched(
    model, layers: Mapping[int, Attend], before_layer: Callable[[int], None] | None = None, *, one_thread: bool = False
) -> Iterator[None]:
    """Run `model` with `layers[i]` in place of layer i's attention; everything is undone on the way out.

    before_layer: called with each decoder layer's index before it runs; an exception from it ends the pass.
    one_thread: refuse passes of other threads with a `RuntimeError`; else they would go through the patch as well.
    One patch at a time per model.
    Raises `TypeError` for a model of another build, `ValueError` for a layer that cannot be patched,
    `RuntimeError` when the model is patched already. The pass itself raises `ValueError` for what is refused.
    """
    decoder = find_decoder(model)
    attentions = [block.self_attn for block in decoder.layers]
    check_layers(layers, decoder)
    _register()
    config = decoder.config
    if config._attn_implementation == NAME:
        raise RuntimeError("this model is already patched: leave the first `patched` block before entering another")
    thread, checked = get_ident() if one_thread else None, []
    with ExitStack() as undo:
        undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = NAME
        for index, attend in layers.items():
            module = attentions[index]
            _SLOTS[module] = slot = _Slot(index, attend, decoder.rotary_emb, thread, checked)
            undo.callback(_SLOTS.pop, module, None)
            undo.callback(module.register_forward_pre_hook(slot.remember, with_kwargs=True).remove)
        if before_layer is not None:
            for index, block in enumerate(decoder.layers):
                hook = block.register_forward_pre_hook(lambda *_, at=index: before_layer(at))
                undo.callback(hook.remove)
        yield


def capture(
    model, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
) -> dict[int, CapturedLayer]:
    """Run the decoder once on `ids` `(T,)` and record every layer that can be patched.

    keys_only: leave out q, v and the output, for calibration. Tensors come back as float16 on the CPU.
    """
    decoder = find_decoder(model)
    found: dict[int, CapturedLayer] = {}

    def record(call: AttentionCall) -> None:
        q, v = (None, None) if keys_only else (half(call.q[0]), half(call.v[0]))
        found[call.layer] = CapturedLayer(q, half(call.k[0]), v, None, call.inv_freq.cpu().clone(), call.scale)

    def keep_output(index: int):
        def hook(module, args, output):
            found[index] = found[index].with_dense(half(output[0][0]))

        return hook

    chosen = full_attention_layers(model)
    with ExitStack() as undo, torch.no_grad():
        if not keys_only:
            for index in chosen:
                undo.callback(decoder.layers[index].self_attn.register_forward_hook(keep_output(index)).remove)
        undo.enter_context(patched(model, dict.fromkeys(chosen, record), before_layer))
        decoder(ids.reshape(1, -1).to(decoder.device), use_cache=False)
    return found


def find_decoder(model) -> nn.Module:
    """The stack of layers inside a causal LM. Raises `TypeError` when it is not of a build named above."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    blocks = getattr(decoder, "layers", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if (
        not blocks
        or not hasattr(decoder, "rotary_emb")
        or not all(hasattr(getattr(block, "self_attn", None), name) for block in blocks for name in names)
    ):
        raise TypeError(
            f"model={type(model).__name__}: expected a transformers decoder with rotary_emb and layers of "
            f"self_attn holding {', '.join(names)} (Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 3)"
        )
    return decoder


def handed(model, cache) -> dict:
    """`cache` as the keyword that a pass of `model` takes it by; transformers 5.24 warns of the older name."""
    new, old = CACHE_NAMES
    return {new if new in signature(type(model).forward).parameters else old: cache}


def full_attention_layers(model) -> tuple[int, ...]:
    """Indices of the layers that read the whole past, and so can be patched."""
    attentions = (block.self_attn for block in find_decoder(model).layers)
    return tuple(i for i, module in enumerate(attentions) if getattr(module, "sliding_window", None) is None)


def layer_shape(attention: nn.Module) -> LayerShape:
    """Sizes of a `self_attn`."""
    heads, groups = (proj.weight.shape[0] // attention.head_dim for proj in (attention.q_proj, attention.k_proj))
    return LayerShape(heads, groups, attention.head_dim)


def check_layers(layers: Mapping[int, Attend], decoder: nn.Module) -> None:
    """Raise `TypeError` or `ValueError` naming the first of `layers` that cannot be patched."""
    attentions = [block.self_attn for block in decoder.layers]
    for index, attend in layers.items():
        if not callable(attend):
            raise TypeError(f"layers[{index!r}]={attend!r}: expected a function of an AttentionCall")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(attentions):
            raise ValueError(f"layers has key {index!r}: must be a whole number in [0, {len(attentions) - 1}]")
        window = getattr(attentions[index], "sliding_window", None)
        if window is not None:
            raise ValueError(
                f"layers has key {index}: that layer reads a sliding window of {window} tokens and must "
                "stay native; choose from full_attention_layers(model)"
            )


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, masks (padding, sliding windows) are lost


def _dispatch(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention function: q `(B, H, T, d)`, k and v `(B, G, T, d)`, rotated."""
    from transformers import AttentionInterface

    slot = _SLOTS.get(module)
    out = None
    if slot is not None:
        _refuse(slot, q, k, dropout, kwargs)
        out = slot.attend(_unrotated(slot, module, q, k, v, attention_mask, scaling))
    if out is None:
        native = AttentionInterface()["sdpa"]
        return native(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return out.to(q.dtype), None


def _refuse(slot: _Slot, q: Tensor, k: Tensor, dropout: float, kwargs: dict) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"layer {slot.layer} got {q.shape[2]} queries for {k.shape[2]} keys: decoding with this KV cache "
            "does not run through the patch; use a ProteusCache, or pass the whole text with use_cache=False"
        )
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: must be 0 in a patched layer; call model.eval()")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"is_causal=False in layer {slot.layer}: only causal attention can be patched")
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is used by layer {slot.layer}: attention of that kind cannot be patched")


def _unrotated(slot: _Slot, module, q, k, v, mask, scaling) -> AttentionCall:
    batch, _, tokens, dim = q.shape
    inv_freq = _frequencies(slot.rotary, module, dim)
    positions = slot.positions
    if positions is None:
        positions = torch.arange(tokens, device=q.device)
    positions = positions.reshape(-1, tokens).expand(batch, tokens)
    _check_tables(slot, positions, inv_freq)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, d)
    scale = dim**-0.5 if scaling is None else scaling
    return AttentionCall(
        slot.layer,
        rotate(q, -positions, inv_freq),
        rotate(k, -positions, inv_freq),
        v,
        inv_freq,
        positions,
        float(scale),
        _padding(mask, tokens),
    )


def _frequencies(rotary: nn.Module, module: nn.Module, dim: int) -> Tensor:
    """This layer's frequencies; Gemma 3 keeps a set for each kind of layer."""
    kind = getattr(module, "layer_type", None)
    inv_freq = getattr(rotary, "inv_freq", None)
    if inv_freq is None:
        inv_freq = getattr(rotary, f"{kind}_inv_freq", None)
    if inv_freq is None or len(inv_freq) * 2 != dim:
        found = "none" if inv_freq is None else f"{len(inv_freq) * 2} features"
        raise ValueError(f"rotary_emb turns {found} of head_dim={dim}: only RoPE over the whole head can be patched")
    return inv_freq.float()


def _check_tables(slot: _Slot, positions: Tensor, inv_freq: Tensor) -> None:
    """Turning back is right only if the model's cosines are half-split ones of these positions."""
    if slot.tables is None:
        raise ValueError(f"layer {slot.layer} was given no position_embeddings: the patch needs RoPE to turn back")
    if slot.checked and slot.checked[0] is slot.tables[0]:  # layers of one pass share their tables
        return
    cos, sin = (table.float() for table in slot.tables)
    angle = positions.float()[..., None] * inv_freq
    size = (cos.square() + sin.square()).sqrt()  # scaled RoPE (YaRN) stretches both alike
    if not torch.allclose(cos / size, torch.cat((angle, angle), -1).cos(), atol=0.02):
        raise ValueError(
            f"layer {slot.layer}: position_embeddings are not half-split RoPE of the model's own "
            "frequencies, so they cannot be turned back"
        )
    slot.checked[:] = [slot.tables[0]]


def _padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which tokens are real, `(B, T)`, from a causal mask with padding; any other mask is refused.

    A mask that also covers earlier tokens ends with the new ones.
    """
    if mask is None:
        return None
    mask = mask[..., -tokens:]
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    keep = seen[:, -1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    if not (seen == (causal & keep[:, None, :]))[keep].all():
        raise ValueError("attention_mask is neither causal nor causal with padding: such a pass cannot be patched")
    return keep
