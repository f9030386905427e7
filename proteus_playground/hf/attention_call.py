"""What a patched attention layer is asked for, and what is looked at before it may answer: rotation and mask.

RoPE turns pairs of features. transformers' families pair them in several ways: the first half of the turned features
with the second (Llama), neighbours (GPT-J, Cohere), and often only some features of a head are turned (Phi, GLM). A
fixed order of the features maps each of these onto one: half-split over the whole head, where a pair that is not turned
has frequency 0. Scores do not change, since queries and keys are put into the same order.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.rope import rotate, rotate_both

HIDDEN = -1e4  # a mask's value that is as low hides a key: its weight is 0 in every floating type
TABLE_ERROR = 0.02  # cosines of bfloat16 tables are this far off
CACHE_NAMES = ("cache", "past_key_values")  # what a pass calls its KV cache: since transformers 5.24, and before


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer is asked for: un-rotated q `(B, T, H, d)`, k and v `(B, T, G, d)`.

    Features of q and k are in the order of `order`; where values have fewer features than keys, zeros follow them.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor | None  # (d / 2,) radians per token; None where the layer does not turn q and k
    positions: Tensor  # (B, T) tokens
    scale: float
    keep: Tensor | None  # (B, T) bool, False at padding; None when nothing is padded
    past: Tensor | None = None  # (B, earlier tokens) bool, which of them the mask shows; None where it does not say
    order: tuple[int, ...] | None = None  # the model's feature at each place of q and k; None for the model's order
    turned = None  # q and k as the model has turned them, where a `TurnedCall` still has them


class TurnedCall(AttentionCall):
    """A call whose q and k are turned back when they are first asked for; for passes without a gradient.

    turned: q and k as the model has turned them, in the order of `order`; back: the frequencies that undo it.
    """

    def __init__(self, turned: tuple[Tensor, Tensor], back: Tensor, **fields):
        for name, value in {"turned": turned, "back": back, **fields}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        q, k = self.turned
        if q.shape[1] == 1:
            return rotate_both(q, k, self.positions, self.back)
        return rotate(q, self.positions, self.back), rotate(k, self.positions, self.back)

    @property
    def q(self) -> Tensor:
        return self._both[0]

    @property
    def k(self) -> Tensor:
        return self._both[1]


Attend = Callable[[AttentionCall], Tensor | None]  # (B, T, H, d), or None to let the model's own attention run


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its queries and keys.

    source: names of the module and of its buffer that holds the frequencies, or the frequencies themselves; None where
    the layer turns nothing. sign: -1 where it turns backwards. order: see `AttentionCall`. width: features of a head,
    the padding of short values included. table: how the model lays out its tables of cosines, a key of `TABLES`; None
    where it has none. sines_first: whether its sines come before its cosines.
    """

    source: tuple[str, str] | tuple[float, ...] | None
    sign: int
    order: tuple[int, ...] | None
    width: int
    table: str | None
    sines_first: bool = False

    def own_frequencies(self, decoder: nn.Module) -> Tensor | None:
        """The model's frequencies as they are now, `(turned features / 2,)`; None where nothing is turned."""
        if self.source is None:
            return None
        if isinstance(self.source[0], float):
            return torch.tensor(self.source, dtype=torch.float64)
        owner, buffer = self.source
        return getattr(decoder.get_submodule(owner), buffer)

    def frequencies(self, own: Tensor, device: torch.device) -> Tensor:
        """One frequency for each pair of a head, `(d / 2,)` float32 on `device`, from `own_frequencies`."""
        return F.pad(self.sign * own.to(device, torch.float32), (0, self.width // 2 - len(own)))


TABLES = {  # from angles (..., pairs) to those that a model's tables hold
    "halves": lambda angle: torch.cat((angle, angle), -1),
    "neighbours": lambda angle: angle.repeat_interleave(2, -1),
    "pairs": lambda angle: angle,
}


def orders(turned: int, head: int, width: int) -> dict[str, tuple[int, ...]]:
    """The known ways to pair features, by name: half-split order of `width` features, `turned` of `head` are turned."""
    found = {}
    for start in dict.fromkeys((0, head - turned)):
        own = range(start, start + turned)
        ways = {"half-split": (own[: turned // 2], own[turned // 2 :]), "interleaved": (own[::2], own[1::2])}
        still = [i for i in range(width) if i not in own]
        half = len(still) // 2
        for name, (first, second) in ways.items():
            found[f"{name} from {start}"] = (*first, *still[:half], *second, *still[half:])
    return found


def arranged(x: Tensor, order: Sequence[int] | None, width: int) -> Tensor:
    """`x` `(..., d)` with zeros up to `width` features, in `order`."""
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    return x if order is None else x[..., list(order)]


def tables_in(arguments: dict) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines among an attention's arguments, as the model orders them, each `(B or 1, T, features)`.

    None where there are none.
    """
    for name, value in arguments.items():
        if "freqs" in name or "rotary" in name or "position_embeddings" in name:
            if isinstance(value, Tensor) and value.is_complex():
                value = value.real, value.imag
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(x, Tensor) for x in value):
                cos, sin = (x.reshape(-1, *x.shape[-2:]) for x in value)
                return cos, sin
    if isinstance(arguments.get("cos"), Tensor) and isinstance(arguments.get("sin"), Tensor):
        return tuple(arguments[name].reshape(-1, *arguments[name].shape[-2:]) for name in ("cos", "sin"))
    return None


def table_matches(tables: tuple[Tensor, Tensor], layout: str, positions: Tensor, own: Tensor) -> bool:
    """Whether the tables hold the angles positions x frequencies; scaled RoPE (YaRN) stretches them, which is right."""
    cos, sin = (table.float() for table in tables)
    angle = TABLES[layout](positions.float()[..., None] * own.to(positions.device, torch.float32))
    size = (cos.square() + sin.square()).sqrt()
    if cos.shape[-2:] != angle.shape[-2:]:
        return False
    error = torch.maximum((cos / size - angle.cos()).abs(), ((sin / size).abs() - angle.sin().abs()).abs())
    return bool(error.amax() < TABLE_ERROR)


def visible(mask: Tensor, layer: int) -> Tensor:
    """Which keys each query of `layer` may read, `(B, queries, keys)`, from a 4-dimensional attention mask.

    Raises `ValueError` for masks that do more than to hide keys, or that differ between heads.
    """
    if mask.dim() != 4:
        raise ValueError(f"attention_mask of layer {layer} has shape {tuple(mask.shape)}: must be (B, 1, T, keys)")
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        seen = mask == 0
        if not (seen | (mask <= HIDDEN)).all():
            raise ValueError(
                f"attention_mask of layer {layer} adds values to the scores: a patched layer takes 0 and -inf only"
            )
    else:
        raise ValueError(f"attention_mask of layer {layer} is {mask.dtype}: must be bool, or floating with 0 and -inf")
    if seen.shape[1] > 1 and not (seen == seen[:, :1]).all():
        raise ValueError(f"attention_mask of layer {layer} differs between heads: a patched layer takes one for all")
    return seen[:, 0]


def real_tokens(
    mask: Tensor | None, batch: int, tokens: int, layer: int
) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Which of the last `tokens` keys are real, `(B, T)`, and which of those before, from a causal mask with padding.

    None stands for all. Raises `ValueError` for any other mask: packed sequences (block-diagonal), windows, attention
    to later tokens.
    """
    if mask is None:
        return None, None
    seen = visible(mask, layer).expand(batch, -1, -1)
    past, seen = seen[..., :-tokens], seen[..., -tokens:]
    keep = seen[:, -1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    expected = causal & keep[:, None, :]
    open_padding = seen.all(-1, keepdim=True) & ~expected.any(-1, keepdim=True)  # a row of padding that reads anything
    if seen.shape[1] != tokens or not (((seen == expected) | open_padding).all() and (past == past[:, -1:]).all()):
        raise ValueError(
            f"attention_mask of layer {layer} is neither causal nor causal with padding (packed sequences, whose "
            "positions start again, windows and attention to later tokens are such masks): a patched layer cannot "
            "serve it exactly; give each text a row of its own, padded"
        )
    return keep, past[:, -1] if past.shape[-1] else None
