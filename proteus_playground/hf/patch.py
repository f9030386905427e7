"""Swap the attention of chosen layers of a transformers decoder, or record what those layers see.

transformers hands an attention function queries and keys that RoPE has already turned. They are turned back
with the model's own frequencies and positions, because prototypes live in key space before RoPE. Supported: every
decoder whose layers call transformers' `AttentionInterface` for softmax attention over all earlier tokens, with RoPE
over a head or a part of it, or without. `hf.families` finds out which layers these are, and docs/model-families.md
lists them. Layers that are not chosen, sliding-window layers among them, run the model's own attention. Decoding with a
transformers KV cache is refused: `hf.cache.ProteusCache` keeps one that goes through the patch.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from inspect import Signature, signature
from threading import get_ident
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..attention.captured import CapturedLayer, half
from ..attention.settings import LayerShape
from ..attention.transforms import in_func
from .attention_call import (
    CACHE_NAMES,
    Attend,
    AttentionCall,
    Rotation,
    TurnedCall,
    arranged,
    real_tokens,
    table_matches,
    tables_in,
)
from .families import REFUSED, LayerFacts, Survey, survey
from .native import NAME, implementation, own_attention, register, set_implementation
from .passes import current_pass, not_compiled, only_this_thread, unwatch, watch

__all__ = ["CACHE_NAMES", "NAME", "Attend", "AttentionCall", "capture", "find_decoder", "patched"]


class _Turning:
    """How one attention's queries and keys are brought into a patched layer's order, and the layer's frequencies.

    It is kept from patch to patch, so that the frequencies are the same tensor as long as the model's own are.
    """

    def __init__(self, rotation: Rotation):
        self.rotation = rotation
        self.own, self.inv_freq, self.back, self.order = None, None, None, None

    def frequencies(self, decoder: nn.Module, device: torch.device) -> Tensor | None:
        """`(d / 2,)` radians per token; None where the layer turns nothing."""
        if self.rotation.source is None:
            return None
        fixed = isinstance(self.rotation.source[0], float) and self.own is not None
        own = self.own if fixed else self.rotation.own_frequencies(decoder)
        if own is not self.own or self.inv_freq.device != device:
            with torch.inference_mode(False):  # a later pass may need a gradient
                self.own, self.inv_freq = own, self.rotation.frequencies(own, device)
                self.back = -self.inv_freq
        return self.inv_freq

    def arrange(self, x: Tensor) -> Tensor:
        """Queries or keys `(B, heads, T, d)` as a patched layer is given them, `(B, T, heads, d)`."""
        x = arranged(x.transpose(1, 2), None, self.rotation.width)
        if self.rotation.order is None:
            return x
        if self.order is None or self.order.device != x.device:
            with torch.inference_mode(False):
                self.order = torch.tensor(self.rotation.order, device=x.device)
        return x.index_select(-1, self.order)


class _Slot:
    """One attention of a patched decoder, and what its next call was given besides queries, keys and values.

    attend: what to call in place of the attention, None where it stays native.
    """

    def __init__(
        self, decoder: nn.Module, module: nn.Module, layer: int, facts: LayerFacts, attend: Attend | None, original: str
    ):
        self.decoder, self.layer, self.facts = ref(decoder), layer, facts
        self.attend, self.original = attend, original
        self.arguments: dict[int, dict] = {}  # by thread
        own = vars(module).get("forward")
        self.signature = _forward_signature(type(module)) if own is None else signature(own)
        if attend is not None:
            self.turning = _TURNING.setdefault(module, _Turning(facts.rotation))


@lru_cache(maxsize=64)
def _forward_signature(kind: type[nn.Module]) -> Signature:
    """How the `forward` of a module of this class is called; to find out takes longer than many a kernel."""
    whole = signature(kind.forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])  # without self


_TURNING: WeakKeyDictionary[nn.Module, _Turning] = WeakKeyDictionary()
_SLOTS: WeakKeyDictionary[nn.Module, _Slot] = WeakKeyDictionary()
_BEFORE: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()  # by decoder layer
_ROTARY: WeakKeyDictionary[nn.Module, ref] = WeakKeyDictionary()  # the decoder of each rotary module
_PATCHED: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()  # by decoder, another one for each patch


@contextmanager
def patched(
    model, layers: Mapping[int, Attend], before_layer: Callable[[int], None] | None = None, *, one_thread: bool = False
) -> Iterator[None]:
    """Run `model` with `layers[i]` in place of layer i's attention; everything is undone on the way out.

    before_layer: called with each decoder layer's index before it runs; an exception from it ends the pass.
    one_thread: refuse passes of other threads with a `RuntimeError`; else they would go through the patch as well.
    One patch at a time per model. Passes run without `torch.compile`. A backward pass with gradient checkpointing must
    run within the block as well, since it computes layers again; outside it raises `RuntimeError`.
    Raises `TypeError` for a model of another build, `ValueError` for a layer that cannot be patched,
    `RuntimeError` when the model is patched already. The pass itself raises `ValueError` for what is refused.
    """
    decoder, known = surveyed(model)
    check_layers(layers, known)
    register(NAME, _dispatch)
    if decoder in _PATCHED:
        raise RuntimeError("this model is already patched: leave the first `patched` block before entering another")
    if decoder.config._attn_implementation == NAME:  # a deep copy of a patched model
        set_implementation(decoder, "sdpa")
    original = decoder.config._attn_implementation
    blocks = decoder.get_submodule(known.stack)
    with ExitStack() as undo:
        _add(undo, _PATCHED, decoder, object())
        undo.enter_context(implementation(decoder, NAME))
        watch(decoder)
        undo.callback(unwatch, decoder)
        undo.callback(decoder.register_forward_hook(_check_backward).remove)
        if one_thread:
            undo.enter_context(only_this_thread(decoder))
        for index, facts in enumerate(known.layers):
            if facts.name is not None:
                module = decoder.get_submodule(facts.name)
                _add(undo, _SLOTS, module, _Slot(decoder, module, index, facts, layers.get(index), original))
                undo.callback(module.register_forward_pre_hook(_remember, with_kwargs=True).remove)
            if before_layer is not None:
                _add(undo, _BEFORE, blocks[index], lambda at=index: before_layer(at))
                undo.callback(blocks[index].register_forward_pre_hook(_announce).remove)
        for name in known.rotary:
            module = decoder.get_submodule(name)
            _add(undo, _ROTARY, module, ref(decoder))
            undo.callback(module.register_forward_pre_hook(_remember_positions, with_kwargs=True).remove)
        yield


def is_patched(model) -> bool:
    """Whether a `patched` block is open for `model`."""
    return find_decoder(model) in _PATCHED


def _add(undo: ExitStack, table: WeakKeyDictionary, key: nn.Module, value) -> None:
    table[key] = value
    undo.callback(table.pop, key, None)


# Hooks are plain functions that look a module up, so that those which a deep copy of the model takes along do nothing.


@not_compiled
def _remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
    slot = _SLOTS.get(module)
    if slot is not None and slot.attend is not None:
        bound = slot.signature.bind_partial(*args, **kwargs).arguments
        slot.arguments[get_ident()] = bound | bound.pop("kwargs", {})


@not_compiled
def _announce(module: nn.Module, args: tuple) -> None:
    before = _BEFORE.get(module)
    if before is not None:
        before()


@not_compiled
def _remember_positions(module: nn.Module, args: tuple, kwargs: dict) -> None:
    decoder = _ROTARY.get(module)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point()]
    if decoder is not None and given:
        current_pass(decoder()).positions = given[0]


@not_compiled
def _check_backward(decoder: nn.Module, args: tuple, output) -> None:
    """Let a backward pass that computes layers again raise where the patch of this pass is gone."""
    patch, hidden, alive = _PATCHED.get(decoder), output[0], ref(decoder)

    def check(grad: Tensor) -> None:
        if _PATCHED.get(alive()) is not patch:
            raise RuntimeError(
                "gradient checkpointing computes patched layers again: call backward() within the `patched` block"
            )

    if patch is None or not hidden.requires_grad:
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        hidden.register_hook(check)


def capture(
    model, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
) -> dict[int, CapturedLayer]:
    """Run the decoder once on `ids` `(T,)` and record every layer that can be patched.

    keys_only: leave out q, v and the output, for calibration. Tensors come back as float16 on the CPU.
    """
    decoder, known = surveyed(model)
    found: dict[int, CapturedLayer] = {}

    def record(call: AttentionCall) -> None:
        q, v = (None, None) if keys_only else (half(call.q[0]), half(call.v[0]))
        inv_freq = None if call.inv_freq is None else call.inv_freq.cpu().clone()
        found[call.layer] = CapturedLayer(q, half(call.k[0]), v, None, inv_freq, call.scale)

    def keep_output(index: int):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            found[index] = found[index].with_dense(half(output[0]))

        return hook

    chosen = full_attention_layers(model)
    with ExitStack() as undo, torch.no_grad():
        if not keys_only:
            for index in chosen:
                module = decoder.get_submodule(known.layers[index].name)
                undo.callback(module.register_forward_hook(keep_output(index)).remove)
        undo.enter_context(patched(model, dict.fromkeys(chosen, record), before_layer))
        decoder(ids.reshape(1, -1).to(decoder.device), use_cache=False)
    return found


def find_decoder(model) -> nn.Module:
    """The stack of layers inside a causal LM. Raises `TypeError` when none of its layers can be patched."""
    return surveyed(model)[0]


def surveyed(model) -> tuple[nn.Module, Survey]:
    """The stack of layers inside a causal LM, and what is known of it. Raises as `find_decoder`."""
    found = (model.get_decoder() if hasattr(model, "get_decoder") else None, getattr(model, "base_model", None))
    decoder = next((x for x in found if isinstance(x, nn.Module) and hasattr(x, "config")), None)
    if decoder is None:
        raise TypeError(f"model={type(model).__name__}: expected a transformers causal language model")
    return decoder, survey(decoder, type(model).__name__)


def handed(model, cache) -> dict:
    """`cache` as the keyword that a pass of `model` takes it by; transformers 5.24 warns of the older name."""
    new, old = CACHE_NAMES
    return {new if new in signature(type(model).forward).parameters else old: cache}


def full_attention_layers(model) -> tuple[int, ...]:
    """Indices of the layers that read the whole past, and so can be patched.

    Raises `ValueError` where layers read the whole past, but none of them can be patched.
    """
    known = surveyed(model)[1]
    served = tuple(i for i, facts in enumerate(known.layers) if facts.served)
    refused = [facts.refusal for facts in known.layers if facts.name and facts.window is None and facts.refusal]
    if refused and not served:
        raise ValueError(f"model={known.model}: each layer that reads the whole past {refused[0]}: it stays native")
    return served


def reads_whole_past(model) -> tuple[int, ...]:
    """Indices of all layers that read the whole past, those that cannot be patched among them."""
    known = surveyed(model)[1]
    return tuple(i for i, facts in enumerate(known.layers) if facts.name is not None and facts.window is None)


def layer_shape(model, layer: int) -> LayerShape:
    """Sizes of a layer's attention, as an `AttentionCall` of it has them."""
    return surveyed(model)[1].layers[layer].shape


def check_layers(layers: Mapping[int, Attend], known: Survey) -> None:
    """Raise `TypeError` or `ValueError` naming the first of `layers` that cannot be patched."""
    for index, attend in layers.items():
        if not callable(attend):
            raise TypeError(f"layers[{index!r}]={attend!r}: expected a function of an AttentionCall")
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(known.layers):
            raise ValueError(f"layers has key {index!r}: must be a whole number in [0, {len(known.layers) - 1}]")
        facts = known.layers[index]
        if facts.window is not None:
            raise ValueError(
                f"layers has key {index}: that layer reads a sliding window of {facts.window} tokens and must "
                "stay native; choose from full_attention_layers(model)"
            )
        if facts.refusal is not None:
            raise ValueError(
                f"layers has key {index}: that layer of {known.model} {facts.refusal}, so it must stay native; "
                "docs/model-families.md says which models can be patched"
            )


@not_compiled
def _dispatch(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention function: q `(B, H, T, d)`, k and v `(B, G, T, d)`, rotated."""
    slot = _SLOTS.get(module)
    if slot is not None and slot.attend is not None:
        _refuse(slot, module, q, k, dropout, kwargs)
        out = slot.attend(_unrotated(slot, q, k, v, attention_mask, scaling))
        if out is not None:
            return out[..., : slot.facts.value_dim].to(q.dtype), None
    original = "sdpa" if slot is None else slot.original
    return own_attention(original, module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _refuse(slot: _Slot, module: nn.Module, q: Tensor, k: Tensor, dropout: float, kwargs: dict) -> None:
    current = current_pass(slot.decoder())
    if current.inside and slot.layer in current.called:
        raise ValueError(f"layer {slot.layer} calls its attention twice in one pass: such a pass cannot be patched")
    current.called.add(slot.layer)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"layer {slot.layer} got {q.shape[2]} queries for {k.shape[2]} keys: decoding with this KV cache "
            "does not run through the patch; use a ProteusCache, or pass the whole text with use_cache=False"
        )
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: must be 0 in a patched layer; call model.eval()")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"is_causal=False in layer {slot.layer}: only causal attention can be patched")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: a patched layer has no matrix of attention weights to return")
    for name in (*REFUSED, "sliding_window"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is used by layer {slot.layer}: attention of that kind cannot be patched")


def _unrotated(slot: _Slot, q: Tensor, k: Tensor, v: Tensor, mask, scaling: float | None) -> AttentionCall:
    batch, _, tokens, dim = q.shape
    inv_freq, rotation = slot.turning.frequencies(slot.decoder(), q.device), slot.facts.rotation
    positions = _positions(slot, batch, tokens, q.device)
    if current_pass(slot.decoder()).recorded:  # transformers makes a mask then even if it is given none
        mask = None
    dtype = torch.promote_types(q.dtype, v.dtype)  # under autocast, q and k leave a rotation in float32
    q, k, v = slot.turning.arrange(q).to(dtype), slot.turning.arrange(k).to(dtype), v.to(dtype)
    keep, past = real_tokens(mask, batch, tokens, slot.layer)
    fields = {"layer": slot.layer, "v": arranged(v.transpose(1, 2), None, rotation.width), "inv_freq": inv_freq}
    fields |= {"positions": positions, "scale": float(dim**-0.5 if scaling is None else scaling)}
    fields |= {"keep": keep, "past": past, "order": rotation.order}
    if inv_freq is None:
        return AttentionCall(q=q, k=k, **fields)
    turned = TurnedCall((q, k), slot.turning.back, **fields)
    return AttentionCall(q=turned.q, k=turned.k, **fields) if torch.is_grad_enabled() else turned


def _positions(slot: _Slot, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Positions `(B, T)` of a call's tokens, compared with the tables that the model turned them by."""
    arguments, current = slot.arguments.pop(get_ident(), {}), current_pass(slot.decoder())
    positions = arguments.get("position_ids")
    if positions is None:
        positions = current.positions
    if positions is None or slot.facts.rotation.source is None:
        positions = torch.arange(tokens, device=device)
    if positions.dim() == 3:  # one for each of time, height and width
        if not (positions == positions[:1]).all():
            raise ValueError(f"position_ids of layer {slot.layer} differ between their axes: must be those of a text")
        positions = positions[0]
    positions = positions.to(device).reshape(-1, tokens).expand(batch, tokens)
    layout = slot.facts.rotation.table
    if layout is None:
        return positions
    tables = tables_in(arguments)
    if tables is None:
        raise ValueError(f"layer {slot.layer} was given no position_embeddings: the patch needs RoPE to turn back")
    place = id(tables[0]) if in_func() else tables[0].data_ptr()  # tensors of torch.func have no memory of their own
    key = (place, id(slot.turning.own), layout)
    if key not in current.tables and not current.recorded:  # layers of one pass share their tables
        pair = tables[::-1] if slot.facts.rotation.sines_first else tables
        if not table_matches(pair, layout, positions, slot.turning.own):
            raise ValueError(
                f"layer {slot.layer}: position_embeddings are not half-split or interleaved RoPE of the model's own "
                "frequencies at position_ids, so they cannot be turned back"
            )
        current.tables[key] = tables  # they stay alive, so that no other table takes their place in memory
    return positions
