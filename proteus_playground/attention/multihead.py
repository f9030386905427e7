"""A drop-in for `nn.MultiheadAttention` in causal models.

Axes: `B` batch, `T` queries, `S` keys, `D` embedding, `H` heads, `d` head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.reference import weights as attention_weights
from .budget import plan_budget
from .config import AttentionConfig
from .functional import prepare
from .layer import ProteusAttention
from .shortlist import everything
from .transforms import in_vmap, refuse


class CausalProteusMultiheadAttention(nn.Module):
    """`ProteusAttention` with the signature of `nn.MultiheadAttention`.

    Self-attention is causal and sparse; it raises for an `attn_mask` that is not the causal one. Cross-attention
    (where key is not query) is dense `scaled_dot_product_attention` with the given masks and the same projections.
    Deliberate differences: keys and values have the query's width (`kdim` and `vdim` raise); `add_bias_kv` and
    `add_zero_attn` raise; `dropout` acts on the layer's output, since no fused kernel exposes the weights;
    self-attention uses RoPE (`rope_theta=None` removes it), cross-attention does not.
    """

    in_proj_bias = None  # so that nn.TransformerEncoderLayer does not take its fused path, which would skip this layer

    _qkv_same_embed_dim = False  # which nn.TransformerEncoder reads, so that it makes no nested tensors

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        **proteus,
    ):
        """proteus: any other fields of `AttentionConfig`. Heads are not routed unless route_heads=True."""
        super().__init__()
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name}={value!r}: must be False; Proteus has no such key")
        for name, value in (("kdim", kdim), ("vdim", vdim)):
            if value not in (None, embed_dim):
                raise ValueError(f"{name}={value!r}: must be None or embed_dim={embed_dim}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r}: must be in [0, 1)")
        unknown = set(proteus) - set(AttentionConfig.__dataclass_fields__)
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: not a field of AttentionConfig")
        self.batch_first, self.dropout = batch_first, dropout
        cfg = AttentionConfig(
            **{"route_heads": False, **proteus, "d_model": embed_dim, "n_heads": num_heads, "bias": bias}
        )
        self.attn = ProteusAttention(cfg).to(device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: `(B, T, D)` if batch_first, else `(T, B, D)`, or `(T, D)` unbatched.

        key_padding_mask `(B, S)` bool, True for padding. attn_mask `(T, S)`: causal for self-attention (bool, True
        for hidden, or float, -inf for hidden). need_weights=True also returns `(B, T, S)` weights (`(B, H, T, S)`
        without averaging), in which a note's weight is shared evenly by its keys. They take O(T S) memory: for display,
        not for long sequences.
        """
        if not isinstance(query, Tensor) or query.dim() not in (2, 3):
            raise ValueError(f"query has shape {tuple(getattr(query, 'shape', ()))}: must have 2 or 3 axes")
        if query.is_nested:
            raise ValueError("query is a nested tensor: must be padded, with a key_padding_mask")
        is_self_attention = key is query and value is query
        unbatched = query.dim() == 2
        q, k, v = (x[None] if unbatched else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value))
        if unbatched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        key_padding_mask = _as_padding(key_padding_mask, k)
        if is_self_attention:
            if key_padding_mask is not None:
                q = q.masked_fill(key_padding_mask[..., None], 0)  # padding may hold any value, NaN included
            q = _check_causal(attn_mask, q)
            out = self.attn(q, key_padding_mask=key_padding_mask)
            shown = self._weights(q, key_padding_mask) if need_weights else None
        else:
            out, shown = self._cross(q, k, v, key_padding_mask, attn_mask, is_causal, need_weights)
        if shown is not None and average_attn_weights:
            shown = shown.mean(1)
        out = F.dropout(out, self.dropout, self.training)
        if unbatched:
            return out[0], None if shown is None else shown[0]
        return out if self.batch_first else out.transpose(0, 1), shown

    @torch.no_grad()
    def _weights(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Attention weights of self-attention, `(B, H, T, T)`."""
        attn, cfg = self.attn, self.attn.cfg
        if in_vmap():
            raise RuntimeError("need_weights=True: must be False under torch.func.vmap")
        q, k, v = attn.project(x)
        budget = plan_budget(cfg, x.shape[1])
        ready = prepare(
            q, k, v, attn.gates, budget, inv_freq=attn.inv_freq, positions=None, keep=attn.kept(k, budget, padding)
        )
        p = attention_weights(ready.q, ready.k, ready.short or everything(ready.gate, cfg.n_heads), cfg.head_dim**-0.5)
        if ready.index is None:
            return p
        B, H, S, T = *p.shape[:3], x.shape[1]
        real = torch.arange(S, device=p.device) < ready.length[:, None]
        p = p * (real[:, None, :, None] & real[:, None, None, :])
        column = ready.index[:, None, None].expand(B, H, S, S)  # kept tokens back to their places among all T
        columns_placed = p.new_zeros(B, H, S, T).scatter_(3, column, p)
        row = ready.index[:, None, :, None].expand_as(columns_placed)
        return p.new_zeros(B, H, T, T).scatter_(2, row, columns_placed)

    def _cross(self, q, k, v, padding, attn_mask, is_causal, need_weights):
        attn, cfg = self.attn, self.attn.cfg
        if padding is not None:
            k, v = (x.masked_fill(padding[..., None], 0) for x in (k, v))
        mask = _merge_masks(q, k, padding, attn_mask, is_causal)
        qh, kh, vh = (
            proj(x).unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
            for proj, x in ((attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v))
        )
        kh, vh = (x.repeat_interleave(cfg.heads_per_group, dim=1) for x in (kh, vh))
        out = attn.o_proj(F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask).transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            score = qh @ kh.transpose(-1, -2) * cfg.head_dim**-0.5
            shown = (score if mask is None else score + mask).softmax(-1)
        return out, shown


def _as_padding(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The padding mask as bool, checked against keys `(B, S, D)`."""
    if mask is None:
        return None
    if mask.is_floating_point():
        mask = _hidden(mask, "key_padding_mask")
    if mask.dtype != torch.bool or mask.shape != k.shape[:2]:
        raise ValueError(
            f"key_padding_mask {mask.dtype} of shape {tuple(mask.shape)}: must be bool (or float with "
            f"-inf) of shape {tuple(k.shape[:2])}"
        )
    return mask


def _hidden(mask: Tensor, name: str) -> Tensor:
    """Where a float mask hides a key: at -inf or finfo.min (below -1e4). Raises for other values, except 0."""
    hidden = mask < -1e4
    biases = mask.masked_fill(hidden, 0).flatten()
    largest = F.pad(biases.abs(), (0, 1)).max()  # an empty mask has no maximum
    return refuse(largest, name + " holds values such as {wrong}: must be 0 or -inf (no biases)", hidden)


def _check_causal(mask: Tensor | None, q: Tensor) -> Tensor:
    """q `(B, T, D)`. Raises unless the mask is None or the causal one."""
    if mask is None:
        return q
    hidden, T = mask if mask.dtype == torch.bool else _hidden(mask, "attn_mask"), q.shape[1]
    allowed = f"self-attention is causal; must be None or the ({T}, {T}) causal mask"
    message = f"attn_mask of shape {tuple(mask.shape)}: {allowed}"
    if tuple(mask.shape) != (T, T):
        raise ValueError(message)
    causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).triu(1)
    return refuse((hidden != causal).any(), message, q)


def _merge_masks(q, k, padding, attn_mask, is_causal) -> Tensor | None:
    """One additive float mask for cross-attention, or None."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if attn_mask is None and not is_causal and padding is None:
        return None
    mask = q.new_zeros(1, 1, T, S)
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None:
        if attn_mask.shape[-2:] != (T, S) or attn_mask.dim() not in (2, 3):
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}: must be ({T}, {S}) or (B H, {T}, {S})")
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (B, -1))
        mask = mask + attn_mask if attn_mask.is_floating_point() else mask.masked_fill(attn_mask, -torch.inf)
    return mask if padding is None else mask.masked_fill(padding[:, None, None], -torch.inf)
