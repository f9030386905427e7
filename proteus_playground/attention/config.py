"""The one configuration of an attention layer: frozen, typed, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite

from ..common.checks import whole_number

BACKENDS = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True)
class AttentionConfig:
    """Everything that shapes a `ProteusAttention` layer.

    Raises `TypeError` or `ValueError` naming the field, its value and what is allowed.
    """

    d_model: int = 512
    """Width of the hidden states, features, >= 1."""
    n_heads: int = 8
    """Query heads H, >= 1, a multiple of `n_kv_heads`."""
    n_kv_heads: int | None = None
    """KV groups G, >= 1; the heads of one group share keys and values. None means one per head (MHA)."""
    head_dim: int | None = None
    """Features per head d, even, >= 2. None means d_model / n_heads."""
    shortlist: int = 128
    """L, cap on reads (keys and notes) per query at flux alpha 1, >= 1."""
    dna_fraction: float = 0.5
    """Share of L spent on gates (rings and notes), in [0, 1]; the rest is window and anchors."""
    keep_ratio: float = 1.0
    """Upper bound on the share of tokens that take part at flux alpha 1, in (0, 1]."""
    flux_alpha: float | None = None
    """Pins alpha in [0, 1]: 0 is dense, 1 is the constant shortlist. None lets the length choose."""
    dense_below: int = 4096
    """Without a pinned alpha: at and below this many tokens alpha is 0, >= 1."""
    shortlist_from: int = 16384
    """Without a pinned alpha: from this many tokens alpha is 1; linear in log T between, > dense_below."""
    route_heads: bool = True
    """Whether a router may put heads to sleep and weigh those awake. False keeps every head, weight 1."""
    head_top_p: float = 1.0
    """Probability mass at which waking heads stops at flux alpha 1, in (0, 1]."""
    heads_awake_min: int = 1
    """Fewest heads awake per token and KV group, in [1, heads_awake_max]."""
    heads_awake_max: int | None = None
    """Most heads awake per token and KV group at flux alpha 1, in [1, H/G]. None means all of them. Where one head
    alone is awake in a group, its renormalised weight is 1 whatever the router says: the task's loss then teaches the
    router nothing (its z-loss and the balance bias still act). Leave 2 or more to a router that should learn."""
    gates_per_group: int = 32
    """Gates (each owns one prototype) per KV group, C, >= 1, and >= H/G when heads are routed."""
    probes: int = 2
    """Gates a query opens, in [1, gates_per_group]."""
    n_anchors: int = 4
    """First tokens that every query reads (attention sinks), >= 0."""
    notes: bool = True
    """Whether each gate's summary (one mean key and value) is read, where all of them take at most half of the gates'
    share of L."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding, > 0. None leaves queries and keys un-rotated."""
    prior_max: float = 0.5
    """Largest share the prototypes' prior takes in routing, in [0, 1]."""
    prior_temperature: float = 0.1
    """Temperature of the prior's softmax over cosines, > 0."""
    balance_rate: float = 1e-3
    """Step by which the balance bias of an over- or under-used head moves per training forward, >= 0."""
    ema_decay: float = 0.99
    """How much of a prototype survives one training update, in [0, 1)."""
    bias: bool = False
    """Whether the four projections carry a bias."""
    backend: str = "auto"
    """One of 'auto', 'reference', 'torch', 'triton'. An explicit name never falls back."""
    int8: bool = False
    """Whether sparse reads see keys and values stored in int8 with a scale per row. Has no gradient."""
    init_scale: float = field(default=1.0, repr=False)
    """Multiplies the initial projection weights, > 0."""

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "n_heads",
            "shortlist",
            "dense_below",
            "shortlist_from",
            "heads_awake_min",
            "gates_per_group",
            "probes",
        ):
            whole_number(name, getattr(self, name), 1)
        whole_number("n_anchors", self.n_anchors, 0)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        whole_number("n_kv_heads", self.n_kv_heads, 1)
        if self.n_heads % self.n_kv_heads:
            self._refuse("n_kv_heads", f"a divisor of n_heads={self.n_heads}")
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                self._refuse("d_model", f"a multiple of n_heads={self.n_heads} (or give head_dim)")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        whole_number("head_dim", self.head_dim, 2)
        if self.head_dim % 2:
            self._refuse("head_dim", "even, so that RoPE can turn pairs of features")
        for name in ("dna_fraction", "prior_max"):
            self._real(name, 0.0, 1.0, "in [0, 1]")
        for name in ("keep_ratio", "head_top_p"):
            self._real(name, 0.0, 1.0, "in (0, 1]", open_low=True)
        self._real("ema_decay", 0.0, 1.0, "in [0, 1)", open_high=True)
        self._real("balance_rate", 0.0, float("inf"), ">= 0", open_high=True)
        for name in ("prior_temperature", "init_scale"):
            self._real(name, 0.0, float("inf"), "> 0 and finite", open_low=True, open_high=True)
        if self.flux_alpha is not None:
            self._real("flux_alpha", 0.0, 1.0, "in [0, 1], or None to follow the length")
        if self.rope_theta is not None:
            self._real("rope_theta", 0.0, float("inf"), "> 0, or None for no rotation", open_low=True, open_high=True)
        for name in ("route_heads", "notes", "bias", "int8"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.shortlist_from <= self.dense_below:
            self._refuse("shortlist_from", f"greater than dense_below={self.dense_below}")
        if self.heads_awake_max is None:
            object.__setattr__(self, "heads_awake_max", self.heads_per_group)
        whole_number("heads_awake_max", self.heads_awake_max, 1)
        if self.heads_awake_max > self.heads_per_group:
            self._refuse("heads_awake_max", f"at most n_heads / n_kv_heads = {self.heads_per_group}")
        if self.heads_awake_min > self.heads_awake_max:
            self._refuse("heads_awake_min", f"at most heads_awake_max={self.heads_awake_max}")
        if self.probes > self.gates_per_group:
            self._refuse("probes", f"at most gates_per_group={self.gates_per_group}")
        if self.route_heads and self.gates_per_group < self.heads_per_group:
            self._refuse(
                "gates_per_group", f"at least one per head of a group ({self.heads_per_group}), or route_heads=False"
            )
        if self.backend not in BACKENDS:
            self._refuse("backend", f"one of {', '.join(map(repr, BACKENDS))}")

    @property
    def heads_per_group(self) -> int:
        """r = H / G."""
        return self.n_heads // self.n_kv_heads

    def to_dict(self) -> dict:
        """Plain values, enough to rebuild the config: `AttentionConfig(**cfg.to_dict())`."""
        return asdict(self)

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def _real(self, name, low, high, allowed, open_low=False, open_high=False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r}: expected a number {allowed}")
        below = value <= low if open_low else value < low
        above = value >= high if open_high else value > high
        if not isfinite(value) or below or above:
            self._refuse(name, allowed)
