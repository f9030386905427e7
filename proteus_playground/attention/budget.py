"""Budgets of a call, from flux alpha and the length: one formula per budget. All integers are decided here.

Every budget runs geometrically from "all" at alpha 0 to its configured value at alpha 1:
`L(a) = T^(1-a) L^a`, `k(a) = r^(1-a) k^a`, `P(a) = p^a`; the keep ratio runs linearly, `1 - a (1 - rho)`. L is rounded
down. k is rounded to nearest: rounding down would leave the last head awake only at alpha exactly 0, so it would hardly
be trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, floor, isqrt, log, sqrt
from typing import TYPE_CHECKING

from torch import SymInt

from ..common.checks import whole_number

if TYPE_CHECKING:
    from .config import AttentionConfig

MAX_BLOCK = 64  # rows that share one clock tick; larger blocks are no faster, and make each row read more local keys


@dataclass(frozen=True)
class Budget:
    """Budgets of one call. Reads per row never exceed `shortlist`."""

    flux_alpha: float  # 0 dense .. 1 constant shortlist
    tokens: int  # T this was planned for
    shortlist: int  # L(alpha), reads per row
    keep_ratio: float  # rho(alpha)
    heads_awake_min: int  # per token and KV group
    heads_awake_max: int  # k(alpha), per token and KV group
    head_top_p: float  # P(alpha)
    dense: bool  # the shortlist holds every key there is
    window: int  # w, keys before the row's block that every row still reads one by one
    block: int  # b, rows per clock tick, a power of two
    anchors: int  # first keys always read
    probes: int  # most gates a row opens
    ring: int  # m, newest keys read per opened gate
    ring_reads: int  # most keys in the rings of a row together: it opens its best gates as long as their keys fit
    notes: int  # gates whose note a row reads (the mean key and value of a gate's keys not read one by one)

    @property
    def fills_rings(self) -> bool:
        """Whether a row may have to open fewer than `probes` gates, because their rings hold more than it may read."""
        return self.probes * self.ring > self.ring_reads

    def to_dict(self) -> dict:
        return asdict(self)


def alpha_for_length(tokens: int, dense_below: int, shortlist_from: int) -> float:
    """Flux alpha where the length decides: 0 up to `dense_below`, 1 from `shortlist_from`, linear in log T between."""
    if tokens <= dense_below:
        return 0.0
    if tokens >= shortlist_from:
        return 1.0
    return log(tokens / dense_below) / log(shortlist_from / dense_below)


def geometric(full: float, reduced: float, alpha: float) -> int:
    """`full^(1-alpha) reduced^alpha`, rounded down, exact at both ends."""
    if alpha in (0.0, 1.0):
        return int(reduced if alpha else full)
    return max(int(reduced), floor(full ** (1 - alpha) * reduced**alpha + 1e-9))


def plan_budget(cfg: AttentionConfig, tokens: int, flux_alpha: float | None = None) -> Budget:
    """Budgets for a call over `tokens` tokens.

    flux_alpha: in [0, 1], overrides `cfg.flux_alpha`; when both are None the length decides. Raises `TypeError` or
    `ValueError` naming the argument.
    """
    if not isinstance(tokens, SymInt):  # a length that torch.export leaves open
        whole_number("tokens", tokens, 1)
    alpha = cfg.flux_alpha if flux_alpha is None else flux_alpha
    if alpha is None:
        alpha = alpha_for_length(tokens, cfg.dense_below, cfg.shortlist_from)
    alpha = check_alpha(alpha)
    r = cfg.heads_per_group
    cap = geometric(tokens, min(cfg.shortlist, tokens), alpha)
    return Budget(
        flux_alpha=alpha,
        tokens=tokens,
        shortlist=cap,
        keep_ratio=(1 - alpha) + alpha * cfg.keep_ratio,
        heads_awake_min=min(cfg.heads_awake_min, r),
        heads_awake_max=max(cfg.heads_awake_max, floor(r ** (1 - alpha) * cfg.heads_awake_max**alpha + 0.5)),
        head_top_p=cfg.head_top_p**alpha,
        dense=cap >= tokens,
        **split_shortlist(
            cap,
            cfg.dna_fraction,
            cfg.n_anchors,
            cfg.probes,
            cfg.gates_per_group,
            cfg.max_notes if cfg.notes else 0,
            cfg.nearest_gates,
        ),
    )


def check_alpha(alpha) -> float:
    """`alpha` as a float. Raises `TypeError` or `ValueError` unless it is a number in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"flux_alpha={alpha!r}: expected a number in [0, 1], or None to follow the length")
    if not 0 <= alpha <= 1:
        raise ValueError(f"flux_alpha={alpha!r}: must be in [0, 1], or None to follow the length")
    return float(alpha)


def split_shortlist(
    cap: int,
    dna_fraction: float,
    n_anchors: int,
    probes: int,
    gates: int,
    notes: int | None,
    nearest_gates: bool = False,
) -> dict:
    """Divide `cap` reads per row between window, anchors, rings and notes: fields of `Budget`.

    A row reads at most window + block local keys, `anchors` anchors, `ring_reads` keys of opened gates and `notes`
    notes, those of the gates that it ranks next. notes=None: those of all gates, as long as they take half of the
    gates' share or less; with the smaller rings that more would leave, more is lost than notes bring (docs/log.md).
    nearest_gates: rings of about the root of their reads, and as many notes as the root of 2 L, near the best of those
    tried at L = 128 and 512 (docs/log.md).
    """
    gate_reads = min(floor(dna_fraction * cap + 1e-9), cap - 1)  # rounded down: a row always reads itself
    other_reads = cap - gate_reads
    anchors = min(n_anchors, (other_reads - 1) // 2)
    local = other_reads - anchors
    block = 1
    while block * 4 <= other_reads and block * 2 <= local and block < MAX_BLOCK:
        block *= 2
    half = gate_reads // 2
    if notes is None:
        notes = isqrt(2 * cap) if nearest_gates else gates if gates <= half else 0
    notes = min(notes, gates, half)
    probes = min(probes, gates, gate_reads - notes)
    left = gate_reads - notes
    ring = left // probes if probes else 0
    if nearest_gates:
        ring = max(ring, ceil(sqrt(left)))
    return {
        "window": local - block,
        "block": block,
        "anchors": anchors,
        "probes": probes,
        "ring": ring,
        "ring_reads": left if nearest_gates else probes * ring,
        "notes": notes,
    }
