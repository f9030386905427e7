"""Every knob of an attention layer: its default, range, unit and meaning, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from .knobs import knob

BACKENDS = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True)
class AttentionConfig:
    """Everything that shapes a `ProteusAttention` layer.

    Raises `TypeError` or `ValueError` naming the field, its value and what is allowed.
    """

    d_model: int = knob(512, 1, unit="features")
    """Width of the hidden states, >= 1."""
    n_heads: int = knob(8, 1, unit="heads")
    """Query heads H, >= 1, a multiple of `n_kv_heads`."""
    n_kv_heads: int | None = knob(None, 1, unit="groups")
    """KV groups G, >= 1; the heads of one group share keys and values. None means one group per head (MHA)."""
    head_dim: int | None = knob(None, 2, unit="features")
    """Features per head d, even, >= 2. None means d_model / n_heads."""
    shortlist: int = knob(128, 1, unit="reads")
    """L, the most keys and notes that one query reads at flux alpha 1, >= 1."""
    dna_fraction: float = knob(0.5, 0.0, 1.0)
    """Share of L spent on gates (rings and notes), in [0, 1]; the rest goes to window and anchors."""
    keep_ratio: float = knob(1.0, 0.0, 1.0, open_low=True)
    """Largest share of the tokens that take part at flux alpha 1, in (0, 1]."""
    flux_alpha: float | None = knob(None, 0.0, 1.0, none="to follow the length")
    """Pins alpha in [0, 1]: 0 is dense attention, 1 is the constant shortlist. None: alpha follows the length."""
    dense_below: int = knob(4096, 1, unit="tokens")
    """Where alpha follows the length: up to this many tokens alpha is 0, >= 1."""
    shortlist_from: int = knob(16384, 1, unit="tokens")
    """Where alpha follows the length: from this many tokens on alpha is 1, > dense_below. Between the two, alpha is
    linear in log T."""
    route_heads: bool = True
    """Whether a router puts heads to sleep and weighs those awake. False keeps every head awake with weight 1."""
    head_top_p: float = knob(1.0, 0.0, 1.0, open_low=True)
    """Heads wake, the most probable first, until their probabilities add up to this at flux alpha 1, in (0, 1]. At 1
    only `heads_awake_max` limits how many wake."""
    heads_awake_min: int = knob(1, 1, unit="heads")
    """Fewest heads awake per token and KV group, in [1, heads_awake_max]."""
    heads_awake_max: int | None = knob(None, 1, unit="heads")
    """Most heads awake per token and KV group at flux alpha 1, in [1, H/G]. None means all of them. Use 2 or more if
    the router is to be trained: the weight of a single awake head is always 1, so the task's loss gives the router no
    gradient (the router's z-loss and the balance bias still act)."""
    gates_per_group: int = knob(32, 1, unit="gates")
    """Gates per KV group C, each with one prototype, >= 1, and >= H/G when heads are routed."""
    probes: int = knob(2, 1, unit="gates")
    """Gates that a query opens, in [1, gates_per_group]; with `nearest_gates` the most that it opens, >= 1."""
    nearest_gates: bool = False
    """Whether a query opens its best gates for as long as the keys in their rings fit, and reads the notes of the next
    best. False: it opens `probes` gates, which share the reads evenly, and reads the notes of all gates."""
    n_anchors: int = knob(4, 0, unit="tokens")
    """First tokens that every query reads (attention sinks), >= 0."""
    notes: bool = True
    """Whether a query also reads notes: the mean key and value of those keys of a gate that it does not read one by
    one. See `max_notes` for how many."""
    max_notes: int | None = knob(None, 1, unit="notes")
    """Most notes that a query reads, >= 1: those of the gates that match it best after the opened ones. They never take
    more than half of the gates' share of L. None: with `nearest_gates` about the root of 2 L, without the notes of all
    gates, or none at all where they would take more than half."""
    rope_theta: float | None = knob(10_000.0, 0.0, open_low=True, none="for no rotation")
    """Base of the rotary embedding, > 0. None leaves queries and keys un-rotated."""
    prior_max: float = knob(0.5, 0.0, 1.0)
    """Largest share that the prototypes have in a head's probability, beside the router, in [0, 1]."""
    prior_temperature: float = knob(0.1, 0.0, open_low=True)
    """Temperature of the softmax over cosines between query and prototypes, > 0."""
    balance_rate: float = knob(1e-3, 0.0)
    """Step by which the balance bias of an over- or under-used head moves per training forward, >= 0."""
    ema_decay: float = knob(0.99, 0.0, 1.0, open_high=True)
    """Weight of the old prototype in one training update, in [0, 1)."""
    bias: bool = False
    """Whether the four projections carry a bias."""
    backend: str = "auto"
    """One of 'auto', 'reference', 'torch', 'triton'. A named backend is never replaced by another."""
    int8: bool = False
    """Whether sparse attention reads keys and values from int8 with a scale per row. Has no gradient."""
    init_scale: float = knob(1.0, 0.0, open_low=True, repr=False)
    """Multiplies the initial projection weights, > 0."""

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check(each.name)
        self._fill_in()
        self._check_together()

    def _check(self, name: str) -> None:
        """One field on its own; None is allowed where the annotation says so."""
        value, declared = getattr(self, name), self.__dataclass_fields__[name]
        if "range" in declared.metadata and not (value is None and declared.type.endswith("| None")):
            declared.metadata["range"].check(name, value)
        if isinstance(declared.default, bool) and not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False")

    def _fill_in(self) -> None:
        """Sizes that None leaves to the others."""
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.n_heads % self.n_kv_heads:
            self._refuse("n_kv_heads", f"a divisor of n_heads={self.n_heads}")
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                self._refuse("d_model", f"a multiple of n_heads={self.n_heads} (or give head_dim)")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
            self._check("head_dim")
        if self.heads_awake_max is None:
            object.__setattr__(self, "heads_awake_max", self.heads_per_group)

    def _check_together(self) -> None:
        """Fields that limit each other, and the backend's name."""
        if self.head_dim % 2:
            self._refuse("head_dim", "even, so that RoPE can turn pairs of features")
        if self.shortlist_from <= self.dense_below:
            self._refuse("shortlist_from", f"greater than dense_below={self.dense_below}")
        if self.heads_awake_max > self.heads_per_group:
            self._refuse("heads_awake_max", f"at most n_heads / n_kv_heads = {self.heads_per_group}")
        if self.heads_awake_min > self.heads_awake_max:
            self._refuse("heads_awake_min", f"at most heads_awake_max={self.heads_awake_max}")
        if self.probes > self.gates_per_group and not self.nearest_gates:
            self._refuse("probes", f"at most gates_per_group={self.gates_per_group}")
        if self.route_heads and self.gates_per_group < self.heads_per_group:
            allowed = f"at least one per head of a group ({self.heads_per_group}), or route_heads=False"
            self._refuse("gates_per_group", allowed)
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
