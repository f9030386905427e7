"""Sizes that the Triton kernels are compiled for, chosen from a budget and a head dim.

Axes: `r` = query heads per KV group, `d` head dim, `C` gates per group, `n` probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...budget import Budget

TILE_TOKENS = 64  # most tokens per tile of the kernels that build the index
TILE_ROWS = 64  # rows per tile of the kernels that attend
LOG2_E = 1.4426950408889634
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Sizes(NamedTuple):
    """The integers of a call that decide everything else. A custom operator passes them on as a list."""

    window: int
    block: int
    anchors: int
    probes: int
    ring: int
    ring_reads: int
    notes: int
    heads_per_group: int
    head_dim: int
    gates_per_group: int


@dataclass(frozen=True)
class Plan:
    """Integers of a call: the budget's, and the sizes that kernels are compiled for. None depends on the length."""

    window: int
    block: int
    anchors: int
    probes: int  # n, 0 where rings are empty
    ring: int
    ring_reads: int
    fills_rings: bool
    notes: int
    some_notes: bool  # whether a row reads the notes of some gates, and not of all
    tile_tokens: int  # BT: tokens per tile of the kernels that match keys and queries with prototypes
    chunk: int  # CH: tokens per chunk of keys
    segment: int  # SEG: tokens per segment of rows
    near_tokens: int  # TT: tokens per tile of the near kernel
    near_heads: int  # RC: heads per tile of the near kernel
    tile_rows: int  # M: rows per tile
    tile_keys: int  # BN: keys per step of a tile
    ring_keys: int  # BN of rings: keys per step
    tile_notes: int  # NB: notes per step of a tile
    tile_gates: int  # GB: gates per program when keys are summed
    tick_keys: int  # BS: keys per step when the keys of one tick are summed
    padded_half: int  # HP: d / 2 as a power of two of at least 16
    padded_gates: int  # CP: C, likewise
    probe_gates: int  # CP of the probe kernel: all gates, or some of them where it only scores them
    padded_dim: int  # DP: d, likewise

    @property
    def kinds(self) -> int:
        """Notes per gate: of all keys that have left the window, and, where rows read the notes of gates that they have
        opened, of those less the ring."""
        if not self.notes:
            return 0
        return 2 if self.probes and not self.some_notes else 1

    @property
    def chooses(self) -> bool:
        """Whether the gates of a row are chosen by their number of keys, or closed gates by their rank."""
        return self.fills_rings or self.some_notes

    def tokens_per_piece(self, most: int) -> int:
        """Whole segments of up to `most` tokens, at least one; fewer where scores and rings take more memory."""
        most = most // 4 if self.chooses else most
        return max(self.segment, most // self.segment * self.segment)

    @property
    def near_ticks(self) -> int:
        """NTT: ticks per tile of the near kernel."""
        return max(1, self.near_tokens // self.block)


def sizes_of(budget: Budget, heads_per_group: int, head_dim: int, gates_per_group: int) -> Sizes:
    """The `Sizes` of a call with this budget."""
    return Sizes(
        window=budget.window,
        block=budget.block,
        anchors=budget.anchors,
        probes=budget.probes,
        ring=budget.ring,
        ring_reads=budget.ring_reads,
        notes=budget.notes,
        heads_per_group=heads_per_group,
        head_dim=head_dim,
        gates_per_group=gates_per_group,
    )


@cache
def make_plan(sizes: Sizes) -> Plan:
    """The plan for these sizes."""
    block, gates, d = sizes.block, sizes.gates_per_group, sizes.head_dim
    probes = sizes.probes if sizes.ring else 0
    fills, some = sizes.probes * sizes.ring > sizes.ring_reads, 0 < sizes.notes < gates
    row_probes = sizes.heads_per_group * max(probes, 1)  # (row, probe) pairs per token
    wanted = _power(-(-256 * gates // row_probes))  # about 256 rows per (segment, gate)
    segment = min(4096, max(TILE_TOKENS, wanted), max(TILE_TOKENS, 1 << 15 >> (row_probes - 1).bit_length()))
    heads = min(sizes.heads_per_group, TILE_ROWS)
    tokens = TILE_ROWS // heads
    tokens = tokens // block * block if tokens >= block else 1 << (tokens.bit_length() - 1)
    return Plan(
        window=sizes.window,
        block=block,
        anchors=sizes.anchors,
        probes=probes,
        ring=sizes.ring,
        ring_reads=sizes.ring_reads,
        notes=sizes.notes,
        some_notes=some,
        fills_rings=fills,
        tile_tokens=tile_tokens(gates),
        chunk=min(segment, max(TILE_TOKENS, min(256, 16 * block))),
        segment=segment,
        near_tokens=tokens,
        near_heads=heads,
        tile_rows=TILE_ROWS,
        tile_keys=32 if d > 128 else 64,
        ring_keys=max(16, min(32 if d > 128 else 64, _power(2 * sizes.ring))),
        tile_notes=max(16, min(32, _power(gates * (2 if probes else 1)))),
        tile_gates=max(16, min(32 if d > 128 else 64, _power(gates))),
        tick_keys=max(16, block),
        padded_half=padded(d // 2),
        padded_gates=padded(gates),
        probe_gates=min(padded(gates), 64) if fills or some else padded(gates),
        padded_dim=padded(d),
    )


def tile_tokens(gates: int) -> int:
    """Tokens per tile of a kernel that matches them with all prototypes: few enough for the registers."""
    return max(16, min(TILE_TOKENS, (1 << 13) // padded(gates)))


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


def padded(size: int) -> int:
    """The smallest power of two that holds `size` and that a matrix unit takes: at least 16."""
    return max(16, _power(size))


def compiler_options(plan: Plan) -> dict:
    """Compiler options of the attention kernels: on NVIDIA, few enough registers that four tiles share a processor."""
    options = {"num_warps": 8 if plan.padded_dim > 128 else 4, "num_stages": 1}
    return options | (few_registers(128) if plan.padded_dim <= 64 else {})


def few_registers(most: int) -> dict:
    """Compiler option: at most so many registers to a thread, so that a processor holds more of them. NVIDIA only."""
    return {} if torch.version.hip else {"maxnreg": most}
