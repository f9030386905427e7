"""Which layers of a transformers decoder can be patched, and how each turns its queries and keys.

Names and structure prove little: two models with the same modules may turn features in different ways. So the decoder
reads eight tokens once. Each attention is then called a second time with the same input and a rotation by nothing,
which gives queries and keys before RoPE by the model's own code. Those after RoPE show how the layer turns them. Last,
dense attention over what a patched layer would be given has to equal what the layer computed. A layer that fails is
refused with a sentence that gives the reason.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention.rope import rotate
from ..attention.settings import LayerShape
from .attention_call import CACHE_NAMES, TABLES, Rotation, arranged, orders, table_matches, tables_in
from .native import implementation, own_attention, register
from .passes import eager

NAME = "proteus_playground_survey"
TOKENS = 8
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "linear_proj")  # names of an output projection
REFUSED = {  # arguments of an attention function that change what it computes
    "softcap": "caps its scores (softcap)",
    "s_aux": "has attention sinks (s_aux)",
    "position_bias": "adds a bias to its scores (position_bias)",
    "alibi": "adds a bias to its scores (alibi)",
    "cu_seq_lens_q": "reads packed sequences (cu_seq_lens_q)",
    "cache": "reads a paged cache (cache)",
}


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer. name: of its attention within the decoder, None where it has none.

    refusal: why it cannot be patched, None where it can. window: tokens, where it reads a sliding window. shape: heads,
    groups and features as a patched layer is given them. value_dim: features of a value. output: name of the output
    projection within the attention, None where something else follows the heads as well.
    """

    name: str | None
    refusal: str | None = None
    window: int | None = None
    shape: LayerShape | None = None
    value_dim: int = 0
    rotation: Rotation | None = None
    output: str | None = None

    @property
    def served(self) -> bool:
        return self.name is not None and self.refusal is None and self.window is None


@dataclass(frozen=True)
class Survey:
    """What is known of a decoder. stack: name of the list of its layers. rotary: modules that are given positions."""

    model: str
    stack: str
    layers: tuple[LayerFacts, ...]
    rotary: tuple[str, ...]


@dataclass
class _Entry:
    """What one attention module was called with during the survey."""

    calls: int = 0
    arguments: dict = field(default_factory=dict)  # of its `forward`, by name
    still: tuple[Tensor, Tensor] | None = None  # q `(1, H, T, d)` and k `(1, G, T, d)` when nothing is turned
    problem: str | None = None  # why that is not known
    turned: tuple[Tensor, Tensor] | None = None
    v: Tensor | None = None
    kwargs: dict = field(default_factory=dict)  # of the attention function
    heads: Tensor | None = None  # (1, T, H, d), what the function returned
    exact: Tensor | None = None  # the same, computed in float32
    output: Tensor | None = None  # (1, T, D), what the module returned


@dataclass
class _Recorder:
    original: str
    entries: dict[nn.Module, _Entry] = field(default_factory=dict)
    replayed: nn.Module | None = None


class _Enough(Exception):
    """The attention function has been reached: the rest of the call is not needed."""


_RECORDER: ContextVar[_Recorder] = ContextVar("recorder")
_SURVEYS: WeakKeyDictionary[nn.Module, tuple[tuple, Survey]] = WeakKeyDictionary()  # with the modules at that time


def survey(decoder: nn.Module, model: str | None = None) -> Survey:
    """What is known of `decoder`, of a model of the class named `model`; found out again when its modules change.

    Raises `TypeError` where no layer goes through transformers' `AttentionInterface`.
    """
    modules = tuple((name, id(module)) for name, module in decoder.named_modules())
    before, known = _SURVEYS.get(decoder, (None, None))
    if before != modules:
        with _in_own_precision(decoder):
            known = _find_out(decoder, model or (known.model if known else type(decoder).__name__))
        _SURVEYS[decoder] = modules, known
    return known


def _in_own_precision(decoder: nn.Module):
    """A block without autocast, whose rounding would hide what a layer computes."""
    device = next(decoder.parameters()).device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@torch.no_grad()
def _find_out(decoder: nn.Module, title: str) -> Survey:
    recorder = _observe(decoder, title)
    names = {module: name for name, module in decoder.named_modules()}
    found = {names[module]: (module, entry) for module, entry in recorder.entries.items()}
    stacks = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    count = {stack: sum(name.startswith(f"{stack}.") for name in found) for stack in stacks}
    stack = max(count, key=count.get, default=None)  # the first of equals, which is the outermost
    if not found or not count[stack]:
        raise TypeError(
            f"model={title}: none of its layers goes through transformers' AttentionInterface (it has attention of "
            "its own code, or none), so nothing can take its place"
        )
    by_layer: dict[int, list] = {}
    for name, pair in found.items():
        if name.startswith(f"{stack}."):
            by_layer.setdefault(int(name.removeprefix(f"{stack}.").split(".")[0]), []).append((name, *pair))
    layers = []
    for index in range(len(decoder.get_submodule(stack))):
        mine = by_layer.get(index, [])
        if not mine:
            layers.append(LayerFacts(None, "has no softmax attention of its own"))
        elif len(mine) > 1:
            layers.append(LayerFacts(mine[0][0], f"holds {len(mine)} attentions"))
        else:
            layers.append(_examine(decoder, index, *mine[0]))
    return Survey(title, stack, tuple(layers), tuple({owner for owner, _ in _buffers(decoder)}))


# -- two passes that are observed --------------------------------------------------------------------------------


def _observe(decoder: nn.Module, title: str) -> _Recorder:
    if any(weight.is_meta for weight in decoder.parameters()):
        raise TypeError(f"model={title}: has weights on the meta device; load them first")
    register(NAME, _attention)
    recorder, hooks = _Recorder(decoder.config._attn_implementation), []
    token = _RECORDER.set(recorder)
    try:
        with _evaluating(decoder), implementation(decoder, NAME), torch.random.fork_rng(devices=[]), eager():
            _read(decoder)
            for module in recorder.entries:
                hooks += [
                    module.register_forward_pre_hook(_call_unturned, with_kwargs=True),
                    module.register_forward_hook(_keep_output),
                ]
            _read(decoder)
    except Exception as problem:
        raise TypeError(f"model={title}: its decoder does not read plain token ids ({problem})") from problem
    finally:
        _RECORDER.reset(token)
        for hook in hooks:
            hook.remove()
    return recorder


def _read(decoder: nn.Module) -> None:
    vocabulary = getattr(decoder.get_input_embeddings(), "num_embeddings", None) or decoder.config.vocab_size
    ids = (3 + 5 * torch.arange(TOKENS, device=next(decoder.parameters()).device)) % vocabulary
    for entry in _RECORDER.get().entries.values():
        entry.calls = 0
    decoder(input_ids=ids[None], use_cache=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attention(module, q, k, v, attention_mask, **kwargs):
    """transformers' attention function during a survey."""
    recorder = _RECORDER.get()
    entry = recorder.entries.setdefault(module, _Entry())
    if recorder.replayed is module:
        entry.still = q.clone(), k.clone()
        raise _Enough
    entry.calls += 1
    entry.turned, entry.v, entry.kwargs = (q.clone(), k.clone()), v.clone(), kwargs
    out = own_attention(recorder.original, module, q, k, v, attention_mask, **kwargs)
    entry.heads = out[0].clone()
    entry.exact = _in_float32(recorder.original, module, (q, k, v), attention_mask, kwargs)
    return out


def _in_float32(original: str, module, qkv: tuple[Tensor, ...], mask: Tensor | None, kwargs: dict) -> Tensor | None:
    """What `module`'s attention computes without the rounding of its dtype; None where it takes no float32."""
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    try:
        return own_attention(original, module, *(x.float() for x in qkv), mask, **kwargs)[0]
    except (RuntimeError, TypeError):
        return None


def _call_unturned(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Call an attention once more, with its own input and a rotation by nothing."""
    recorder = _RECORDER.get()
    entry = recorder.entries[module]
    try:
        bound = signature(module.forward).bind(*args, **kwargs)
        extra = bound.arguments.pop("kwargs", {})
        entry.arguments = bound.arguments | extra
        for name, value in bound.arguments.items():
            bound.arguments[name] = _still(name, value)
        bound.arguments["kwargs"] = {name: _still(name, value) for name, value in extra.items()}
        recorder.replayed = module
        module.forward(*bound.args, **bound.kwargs)
    except _Enough:
        pass
    except Exception as problem:
        entry.problem = str(problem)
    finally:
        recorder.replayed = None


def _still(name: str, value):
    """An attention's argument, changed so that it turns nothing; scaled RoPE keeps its scale."""
    if name in CACHE_NAMES or name == "layer_past":
        return None
    if name == "position_ids" and isinstance(value, Tensor):
        return torch.zeros_like(value)
    tables = tables_in({name: value})
    if tables is not None:
        size = (tables[0].square() + tables[1].square()).sqrt()
        still = size, torch.zeros_like(size)
        if isinstance(value, Tensor):
            return torch.complex(*still).to(value.dtype).view(value.shape)
        still = still[::-1] if _sines_first(tables) else still
        return tuple(x.view(old.shape) for x, old in zip(still, value, strict=True))
    if name in ("cos", "sin") and isinstance(value, Tensor):
        return torch.ones_like(value) if name == "cos" else torch.zeros_like(value)
    return value


def _sines_first(tables: tuple[Tensor, Tensor]) -> bool:
    """Whether the first table holds the sines: at the first token, position 0, all of these are 0."""
    return not tables[0][:, 0].any()


def _keep_output(module: nn.Module, args: tuple, output) -> None:
    output = output[0] if isinstance(output, tuple) else output
    _RECORDER.get().entries[module].output = output.clone()


# -- what follows from them -------------------------------------------------------------------------------------


def _examine(decoder: nn.Module, index: int, name: str, module: nn.Module, entry: _Entry) -> LayerFacts:
    q, k = entry.turned
    width = max(q.shape[-1], entry.v.shape[-1])
    width += width % 2
    window, refusal = _window(decoder, index, module, entry), _refusal(module, entry)
    if refusal is None and window is None:
        rotation = _fit(decoder, module, entry, width)
        if isinstance(rotation, str):
            refusal = rotation
        elif not _computes_attention(decoder, entry, rotation, width):
            refusal = "computes something else than softmax attention over all earlier tokens"
    else:
        rotation = None
    return LayerFacts(
        name, refusal, window, LayerShape(q.shape[1], k.shape[1], width), entry.v.shape[-1],
        None if isinstance(rotation, str) else rotation,
        next((output for output in OUTPUTS if _projects(module, output, entry)), None),
    )  # fmt: skip


def _refusal(module: nn.Module, entry: _Entry) -> str | None:
    q, k = entry.turned
    if entry.calls > 1:
        return f"calls its attention {entry.calls} times in one pass"
    causal = entry.kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attends to later tokens as well (is_causal=False)"
    for argument, reason in REFUSED.items():
        if entry.kwargs.get(argument) is not None:
            return reason
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or entry.v.shape[:3] != k.shape[:3]:
        return f"has {tuple(q.shape)} queries, {tuple(k.shape)} keys and {tuple(entry.v.shape)} values"
    if entry.still is None:
        return f"takes its positions in a way that the patch cannot follow ({entry.problem or 'no second call'})"
    return None


def _window(decoder: nn.Module, index: int, module: nn.Module, entry: _Entry) -> int | None:
    """Tokens of the layer's sliding window or chunk, None where it reads the whole past."""
    window = entry.kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if window is not None:
        return int(window)
    kinds = getattr(decoder.config, "layer_types", None) or ()
    told = bool(kinds) or "sliding_window" in entry.kwargs
    if not told and getattr(decoder.config, "use_sliding_window", True):
        window = getattr(decoder.config, "sliding_window", None)
        if window is not None:
            return int(window)
    kind = kinds[index] if index < len(kinds) else ""
    for word, size in (("sliding", "sliding_window"), ("chunked", "attention_chunk_size"), ("local", "local_window")):
        if word in str(kind):
            return int(getattr(decoder.config, size, None) or 0)
    return None


def _fit(decoder: nn.Module, module: nn.Module, entry: _Entry, width: int) -> Rotation | str:
    """How the layer turns what it had before into what it gave to the attention function, or why that is not known."""
    before, after = (torch.cat(pair, 1)[0].float() for pair in (entry.still, entry.turned))  # (H + G, T, d)
    close, positions = _close_to(entry.turned[0].dtype), torch.arange(TOKENS, device=before.device)
    head = before.shape[-1]
    if close(before, after):
        return Rotation(None, 1, None, width, None)
    tables = tables_in(entry.arguments)
    sines_first = tables is not None and _sines_first(tables)
    tables = tables[::-1] if sines_first else tables
    for source, own in _frequencies(decoder, head, getattr(module, "layer_type", None)):
        own = own.to(before.device, torch.float32)
        layout = None
        if tables is not None:
            layout = next((name for name in TABLES if table_matches(tables, name, positions, own)), None)
            if layout is None:
                continue
        for order in orders(2 * len(own), head, width).values():
            for sign in (1, -1):
                rotation = Rotation(source, sign, order, width, layout)
                freq = rotation.frequencies(own, before.device)
                mine, wanted = (arranged(x.transpose(0, 1)[None], order, width) for x in (before, after))
                if close(rotate(mine, positions, freq), wanted):
                    in_place = order == tuple(range(width))
                    return Rotation(source, sign, None if in_place else order, width, layout, sines_first)
    return (
        "gives queries and keys to its attention that are not RoPE of those before it: neither half-split nor "
        "interleaved over the whole head or a part of it, or something follows the rotation"
    )


def _close_to(dtype: torch.dtype):
    """Whether two tensors are equal up to rounding of `dtype`."""
    error = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3
    return lambda found, wanted: bool((found - wanted).norm() <= error * wanted.norm())


def _buffers(decoder: nn.Module) -> list[tuple[str, str]]:
    """Names of modules and of their buffers that hold rotary frequencies."""
    return [
        (owner, name)
        for owner, module in decoder.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and buffer.dim() == 1
    ]


def _frequencies(decoder: nn.Module, head: int, kind: str | None) -> Iterator[tuple[tuple, Tensor]]:
    """Frequencies that a layer may use, with their source: the model's buffers, then powers of its theta."""
    names = sorted(_buffers(decoder), key=lambda name: ("original" in name[1], str(kind) not in name[1]))
    for owner, buffer in names:
        own = getattr(decoder.get_submodule(owner), buffer)
        if 0 < 2 * len(own) <= head:
            yield (owner, buffer), own
    if names:
        return
    theta = (getattr(decoder.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    for turned in range(head - head % 2, 0, -2):
        own = theta ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
        yield tuple(own.tolist()), own


def _computes_attention(decoder: nn.Module, entry: _Entry, rotation: Rotation, width: int) -> bool:
    """Whether dense attention over un-rotated queries and keys gives what the layer's own function gave."""
    q, k = (arranged(x.transpose(1, 2).float(), rotation.order, width) for x in entry.turned)
    v, groups = entry.v.float(), entry.turned[1].shape[1]
    scale = entry.kwargs.get("scaling") or entry.turned[0].shape[-1] ** -0.5
    score = torch.einsum("btgrd,bsgd->bgrts", q.unflatten(2, (groups, -1)), k) * scale
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1)
    heads = torch.einsum("bgrts,bgsd->btgrd", score.masked_fill(later, -torch.inf).softmax(-1), v).flatten(2, 3)
    wanted = entry.heads.float() if entry.exact is None else entry.exact
    close = _close_to(entry.heads.dtype if entry.exact is None else torch.float32)
    return wanted.shape == heads.shape and close(heads, wanted)


def _projects(module: nn.Module, output: str, entry: _Entry) -> bool:
    """Whether the module called `output` turns the heads into what the layer returned."""
    projection = getattr(module, output, None)
    if projection is None or entry.output is None:
        return False
    try:
        mine = projection(entry.heads.flatten(2))
    except (RuntimeError, TypeError):
        return False
    return mine.shape == entry.output.shape and _close_to(mine.dtype)(mine.float(), entry.output.float())
