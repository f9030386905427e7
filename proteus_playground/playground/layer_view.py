"""Runs one recorded layer and turns the result into the plain arrays that the widgets draw.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Gates
from ..attention.adapter import LayerRun, ProteusLayer, dense_attention, predicted_cost
from ..attention.backends.dispatch import dense_lse
from ..attention.captured import CapturedLayer
from ..attention.rope import rotate
from ..attention.selectors.seen import Seeing, SeenRun, see_layer
from ..attention.selectors.way import PLAIN, Way
from ..attention.settings import Settings
from ..common.timing import RUNS, Stopwatch
from .source import Source
from .views import GateMap, LayerView

MAX_GAP = 0.05  # relative error allowed between our dense output and the model's: rounding gives 0.001, bfloat16 0.005


@dataclass(frozen=True)
class LoadedLayer:
    """A captured layer on its device, in the precision it runs in, with its dense attention output."""

    index: int
    q: Tensor  # (1, T, H, d), before RoPE
    k: Tensor  # (1, T, G, d), before RoPE
    v: Tensor  # (1, T, G, d)
    q_rotated: Tensor  # (T, H, d)
    k_rotated: Tensor  # (T, G, d)
    inv_freq: Tensor | None
    scale: float
    dense: Tensor  # (T, D) float32, after o_proj
    dense_norm: float  # Frobenius
    dense_lse: Tensor  # (T, H) float32
    logits: Tensor | None = None  # (1, T, G, C), of a trained router

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


def load_layer(index: int, captured: CapturedLayer, source: Source, watch: Stopwatch) -> LoadedLayer:
    """Copy a captured layer to its device. `RuntimeError` if it does not reproduce the model's own output."""
    device, dtype = source.device, source.dtype
    q, k, v = (x.to(device, dtype)[None] for x in (captured.q, captured.k, captured.v))
    inv_freq = None if captured.inv_freq is None else captured.inv_freq.to(device)
    at = torch.arange(q.shape[1], device=device)
    out, _ = watch.run("dense", None, lambda: dense_attention(q, k, v, inv_freq, at[None], captured.scale))
    dense = source.project(index, out[0].flatten(1)).float()
    native = captured.dense.to(device).float()
    gap = float((dense - native).norm() / native.norm().clamp(min=1e-9))
    if not gap < MAX_GAP:
        raise RuntimeError(
            f"layer {index}: dense attention on the recorded tensors is {gap:.1%} off the model's own "
            "output, so this layer does something that the probe cannot repeat"
        )
    q_rotated, k_rotated = rotate(q, at, inv_freq), rotate(k, at, inv_freq)
    return LoadedLayer(
        index, q, k, v, q_rotated[0], k_rotated[0], inv_freq, captured.scale, dense, float(dense.norm()),
        dense_lse(q_rotated, k_rotated, captured.scale)[0],
        None if captured.logits is None else captured.logits.to(device, dtype)[None],
    )  # fmt: skip


def layer_view(
    layer: LoadedLayer,
    runner: ProteusLayer,
    settings: Settings,
    source: Source,
    watch: Stopwatch,
    way: Way = PLAIN,
    stop: Callable[[], object] = lambda: None,
) -> LayerView:
    """Run `layer` at `settings` and collect everything that is shown. Only the run itself is timed.

    latency_ms covers the keep decision, routing, rotation and attention; dense_ms covers rotation and fused
    attention. Neither covers the projections, which are the same for both. Dense attention takes equally long in
    every layer, so its runs are pooled: dense_ms is the median over the first few views, which one busy moment of the
    machine cannot distort. A `way` that the backends do not serve is computed by masks; `stop` is called between parts.
    """
    device, shape = source.device, source.shape
    run, latency_ms = (
        watch.run(
            "proteus",
            (layer.index, settings),
            lambda: runner.run(
                layer.q, layer.k, layer.v, inv_freq=layer.inv_freq, scale=layer.scale, logits=layer.logits
            ),
        )
        if way.plain
        else (see_layer(seeing(layer, runner, way), stop), 0.0)
    )
    if watch.count("dense", None) < RUNS:
        at = torch.arange(layer.q.shape[1], device=device)[None]
        watch.run("dense", None, lambda: dense_attention(layer.q, layer.k, layer.v, layer.inv_freq, at, layer.scale))
    T, H = layer.q.shape[1:3]
    result, every = run.result, torch.ones(T, dtype=torch.bool, device=device)
    keep = every if run.keep is None else run.keep[0]
    awake = keep[:, None].expand(T, H) if run.awake is None else run.awake[0] & keep[:, None]
    out = source.project(layer.index, run.out[0].flatten(1)).float()
    reads = result.reads[0]
    looks = getattr(run, "looks", 0.0)
    looked_up = 0 if run.budget.dense else settings.gates if way.chooser() is None else round(looks)
    rows, kept = int(awake.sum()), int(keep.sum())
    itemsize = layer.q.element_size()
    flops, moved = predicted_cost(int(reads.sum()), rows, kept, looked_up, shape, itemsize)
    dense_flops, dense_moved = predicted_cost(T * (T + 1) // 2 * H, T * H, T, 0, shape, itemsize)
    head_map, kind = _head_map(layer, run, keep, awake)
    return LayerView(
        layer=layer.index, settings=settings, head_map=_array(head_map.clamp(0, 1)), head_map_kind=kind,
        awake=_array(awake), kept=_array(keep), salience=_array(runner.gates.salience(layer.k)[0]),
        gate_of_key=_array(result.gate_of_key[0]), reads=_array(reads),
        error=float((out - layer.dense).norm()) / max(layer.dense_norm, 1e-9), latency_ms=latency_ms,
        dense_ms=watch.median("dense", None), flops=flops, dense_flops=dense_flops, bytes=moved,
        dense_bytes=dense_moved, budget=run.budget.to_dict(), backend=result.backend,
        backend_reason=result.backend_reason, device=str(device), way=way, looks=looks,
    )  # fmt: skip


def seeing(layer: LoadedLayer, runner: ProteusLayer, way: Way) -> Seeing:
    """The layer, ready to be asked for rows of any `way`."""
    given = dict(inv_freq=layer.inv_freq, scale=layer.scale, logits=layer.logits)
    return Seeing(way, layer.index, runner, layer.q, layer.k, layer.v, **given)


def _head_map(layer: LoadedLayer, run: LayerRun, keep: Tensor, awake: Tensor) -> tuple[Tensor, str]:
    """`(T, H)` in [0, 1]: routing weights divided by the largest possible weight, or attention outside the anchors."""
    if run.weight is not None:
        r, alpha = run.weight.shape[2] // layer.k.shape[2], run.budget.flux_alpha
        return run.weight[0] * keep[:, None] / (1 - alpha + alpha * r), "routing weight"
    mass = run.first[0] if isinstance(run, SeenRun) else _anchor_mass(layer, run, keep)
    return (1 - mass) * awake, "attention to other keys than anchors"


def _anchor_mass(layer: LoadedLayer, run: LayerRun, keep: Tensor) -> Tensor:
    """Attention each row gives the anchors, `(T, H)`; without any, the first token while it is local."""
    T, H, d = layer.q_rotated.shape
    G, budget = layer.k_rotated.shape[1], run.budget
    anchors = keep.nonzero()[: max(1, budget.anchors), 0]  # anchors are counted among the tokens that take part
    place = keep.cumsum(0) - 1
    causal = torch.arange(T, device=keep.device)[:, None] >= anchors
    if not budget.dense and not budget.anchors:
        causal &= (place // budget.block * budget.block <= budget.window)[:, None]
    lse = run.result.lse
    if lse is not None:
        lse = lse[0]
    elif run.keep is None:
        lse = layer.dense_lse
    else:
        lse = torch.full((T, H), torch.inf, device=keep.device)
        lse[keep] = dense_lse(layer.q_rotated[None, keep], layer.k_rotated[None, keep], layer.scale)[0]
    score = torch.einsum(
        "tgrd,agd->tgra", layer.q_rotated.view(T, G, H // G, d).float(), layer.k_rotated[anchors].float()
    ).flatten(1, 2)  # (T, H, anchors)
    mass = (score * layer.scale - lse[..., None]).exp().masked_fill(~causal[:, None], 0).sum(-1)
    return mass.masked_fill(~keep[:, None], 0)


def principal_plane(unit: Tensor) -> tuple[Tensor, Tensor, float]:
    """PCA of unit keys `(T, d)`: their mean `(d,)`, the two widest axes `(2, d)`, and the share these explain."""
    centre = unit.mean(0)
    _, size, axes = torch.linalg.svd(unit - centre, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # a sign that does not depend on LAPACK
    return centre, axes, float(size[:2].square().sum() / size.square().sum().clamp(min=1e-12))


def group_map(layer: LoadedLayer, group: int, gates: Gates) -> GateMap:
    """The group's unit keys, un-rotated, on their principal plane, and the prototypes on the same two axes."""
    keys = F.normalize(layer.k[0, :, group].float(), dim=-1).cpu()
    centre, axes, explained = principal_plane(keys)
    flat_keys, flat_prototypes = ((x - centre) @ axes.T for x in (keys, gates.prototypes[group].cpu()))
    return GateMap(layer.index, group, _array(flat_keys), _array(flat_prototypes), explained)


def _array(x: Tensor) -> np.ndarray:
    return x.contiguous().cpu().numpy()
