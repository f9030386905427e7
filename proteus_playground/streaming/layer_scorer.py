"""The built-in attention layer as a scorer of embeddings, by content match with a prompt or by salience.

With a prompt, a token's score is the best q.k over prompt rows and heads, un-rotated and scaled as in attention.
Without one it is the token's salience. A chunk is cut into pieces, and one thread computes a piece from beginning to
end. If several threads shared a matrix product, its rounding would depend on their number; this way it does not.

Axes: `n` rows of a piece, `P` prompt rows, `D` model width, `H` query heads, `G` KV groups, `r = H / G`, `d` head dim,
`C` gates per group.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import ProteusAttention

NUMBERS_PER_CPU_PIECE = 1 << 18  # of rows or of dot products: 1 MB, a core's second-level cache
NUMBERS_PER_GPU_PIECE = 1 << 22  # large enough to hide kernel launches, small enough to copy one while another computes
MIN_ROWS_PER_PIECE = 64
ALIGNMENT = 64  # bytes, as PyTorch aligns its own tensors


class LayerScorer:
    """Scores embeddings `(n, D)` by content match with `prompt` `(P, D)`, or by salience if it is None.

    The layer's weights are copied, on its device. labels: a name for each prompt row, used by `explain`. `TypeError` or
    `ValueError` names the argument.
    """

    def __init__(self, attn: ProteusAttention, prompt: Tensor | None = None, labels: Sequence[str] | None = None):
        if not isinstance(attn, ProteusAttention):
            raise TypeError(f"attn={type(attn).__name__}: expected ProteusAttention")
        cfg = self._cfg = attn.cfg
        self.device = attn.k_proj.weight.device
        self._key, self._key_bias = _plain(attn.k_proj.weight), _plain(attn.k_proj.bias)  # (G d, D), (G d,)
        if prompt is None:
            self._measure, widest = self._salience, cfg.n_kv_heads * cfg.gates_per_group
            self._prototypes = _plain(attn.gates.prototypes)  # (G, C, d)
            self._confidence = _plain(attn.gates.confidence)
            self._alive = attn.gates.alive.clone()
            state = (self._key, self._key_bias, self._prototypes, self._confidence, self._alive)
        else:
            rows = self._check(prompt, "prompt").to(self.device, torch.float32)
            if not len(rows):
                raise ValueError("prompt has no rows: give at least one, or None to score by salience")
            widest = len(rows) * cfg.n_heads
            with torch.no_grad():
                q = F.linear(rows, _plain(attn.q_proj.weight), _plain(attn.q_proj.bias)) * cfg.head_dim**-0.5
            state = self._prepare(q.view(len(rows), cfg.n_heads, cfg.head_dim))
        if labels is not None and (prompt is None or len(labels) != len(prompt)):
            raise ValueError(f"labels has {len(labels)} entries: must be one per prompt row")
        self._labels = labels
        numbers = NUMBERS_PER_CPU_PIECE if self.device.type == "cpu" else NUMBERS_PER_GPU_PIECE
        self._rows_per_piece = max(MIN_ROWS_PER_PIECE, numbers // max(cfg.d_model, widest))
        self.fingerprint = _fingerprint(state, self._measure.__name__, self.device)

    def score(self, rows: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """rows: `(n, D)` floating, an array or a tensor on any device -> score `(n,)` float32, reason `(n,)` int32."""
        x = self._check(rows, "rows")
        score = torch.empty(len(x), device=self.device)
        reason = torch.empty(len(x), dtype=torch.int32, device=self.device)

        def measure(start: int, part: Tensor) -> None:
            stop = start + len(part)
            part = part.to(self.device, torch.float32)
            if part.data_ptr() % ALIGNMENT:  # the rounding of a product of few rows depends on their alignment
                part = part.clone()
            score[start:stop], reason[start:stop] = self._measure(part)

        starts = range(0, len(x), self._rows_per_piece)
        if self.device.type == "cpu":
            with one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda start: measure(start, x[start : start + self._rows_per_piece]), starts))
        elif self.device.type == "cuda" and not x.is_cuda:
            for start, part in _fed(x, starts, self._rows_per_piece, self.device):
                measure(start, part)
        else:
            for start in starts:
                measure(start, x[start : start + self._rows_per_piece])
        return score.cpu().numpy(), reason.cpu().numpy()

    def explain(self, reason: int) -> str:
        """The prompt row and head, or the gate, that a reason code names."""
        if self._measure == self._salience:
            group, gate = divmod(reason, self._cfg.gates_per_group)
            return f"salient: gate {gate} of KV group {group}"
        row, head = divmod(reason, self._cfg.n_heads)
        label = f" {self._labels[row]!r}" if self._labels else ""
        return f"matches prompt row {row}{label} in head {head}"

    def _check(self, x: np.ndarray | Tensor, name: str) -> Tensor:
        if isinstance(x, np.ndarray):
            with warnings.catch_warnings():  # torch warns about read-only arrays, but this one is only read
                warnings.simplefilter("ignore", UserWarning)
                x = torch.from_numpy(x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}={getattr(x, 'dtype', type(x).__name__)}: expected floating-point rows (n, D)")
        if x.dim() != 2 or x.shape[1] != self._cfg.d_model:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (n, D={self._cfg.d_model})")
        return x.detach()

    # -- three measures of a piece: (n, D) float32 -> score (n,), reason (n,) ----------------------------------

    def _prepare(self, q: Tensor) -> tuple[Tensor, ...]:
        """Choose the cheaper product for queries `(P, H, d)`, prepare its operands, and return them."""
        cfg = self._cfg
        G, r, d, D = cfg.n_kv_heads, cfg.heads_per_group, cfg.head_dim, cfg.d_model
        dots = q.shape[0] * cfg.n_heads
        per_group = q.unflatten(1, (G, r))  # (P, G, r, d)
        if dots * D <= G * d * D + dots * d:
            self._measure = self._match_folded
            self._folded = torch.einsum("pgrd,gdD->pgrD", per_group, self._key.view(G, d, D)).reshape(dots, D)
            bias = self._key_bias
            self._folded_bias = None
            if bias is not None:
                self._folded_bias = torch.einsum("pgrd,gd->pgr", per_group, bias.view(G, d)).reshape(dots)
            return self._folded, self._folded_bias
        self._measure = self._match_keys
        self._queries = per_group.permute(1, 3, 0, 2).reshape(G, d, -1).contiguous()  # (G, d, P r)
        return self._key, self._key_bias, self._queries

    def _match_folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q.(W x + b) as (W'q).x + q.b: needs no keys, which is cheaper for short prompts."""
        return F.linear(x, self._folded, self._folded_bias).max(dim=1)  # column p H + head is the reason code

    def _match_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, at = torch.bmm(self._keys(x), self._queries).max(dim=2)  # (G, n) each
        best, group = best.max(dim=0)
        row_in_group = at.gather(0, group[None])[0]  # p r + i
        r = self._cfg.heads_per_group
        return best, row_in_group // r * self._cfg.n_heads + group * r + row_in_group % r

    def _salience(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Gates.salience`; the reason is the gate with the largest salience, of any group."""
        k = self._keys(x)
        dots = torch.bmm(k, self._prototypes.mT)  # (G, n, C)
        if not self._alive.all():
            dots = dots.masked_fill(~self._alive[:, None], -torch.inf)
        best, gate = dots.max(dim=2)  # (G, n), not divided by the key's norm yet, which changes no maximum
        lured = best / k.norm(dim=2).clamp(min=1e-12) * self._confidence.gather(1, gate)
        group = lured.argmax(dim=0)
        return lured.mean(dim=0), group * self._cfg.gates_per_group + gate.gather(0, group[None])[0]

    def _keys(self, x: Tensor) -> Tensor:
        """Un-rotated keys by group, `(G, n, d)`."""
        return F.linear(x, self._key, self._key_bias).unflatten(1, (self._cfg.n_kv_heads, -1)).transpose(0, 1)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Inside, every Python thread computes with one torch thread. Yields torch's number of threads before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _fed(x: Tensor, starts: range, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Pieces of a host tensor on a CUDA device; each is copied while the piece before it is being computed."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    slots = [torch.empty(min(size, len(x)), x.shape[1], dtype=x.dtype, pin_memory=True) for _ in range(2)]
    arrived = [torch.cuda.Event() for _ in slots]
    for i, start in enumerate(starts):
        slot, event, part = slots[i % 2], arrived[i % 2], x[start : start + size]
        event.synchronize()  # wait until the slot's last copy has ended, before the slot is overwritten
        with torch.cuda.stream(side):
            there = slot[: len(part)].copy_(part).to(device, non_blocking=True)
            event.record(side)
        main.wait_event(event)
        there.record_stream(main)
        yield start, there


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().clone()


def _fingerprint(state: tuple, way: str, device: torch.device) -> str:
    """A digest of all that decides the bits of a score: operands, formula, device and torch version."""
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    digest = hashlib.sha256(f"{way} {capability} {torch.__version__}".encode())
    for tensor in state:
        digest.update(b"none" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return f"layer-{digest.hexdigest()[:32]}"
