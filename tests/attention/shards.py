"""Run by each of several processes: a layer whose groups are shared out, beside the whole layer.

`TRITON_INTERPRET=1 torchrun --nproc-per-node 2 shards.py cpu`, or without the variable `shards.py cuda`. Each function
of `TESTS` raises an error where the two differ.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh

from proteus_playground.attention import AttentionConfig, ProteusAttention
from proteus_playground.attention.sharding import LAST_BIAS, _placement, join_groups, shard_groups
from proteus_playground.common.processes import together

T, SIZES = 96, {"d_model": 32, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "shortlist": 24, "gates_per_group": 8}


class Pair:
    """A layer as a whole and this process's part of it, with the same hidden states for both."""

    def __init__(self, mesh, seed: int = 0, **config):
        torch.manual_seed(seed)
        self.device = torch.device(mesh.device_type)
        self.whole = ProteusAttention(AttentionConfig(**{**SIZES, **config})).eval()
        self.x = torch.randn(2, T, self.whole.cfg.d_model)
        self.whole.calibrate(self.x[:, :-1])
        self.whole.to(self.device)
        self.x = self.x.to(self.device)
        self.mesh, self.part = mesh, shard_groups(self.whole, mesh)

    def near(self, mine, whole, name: str = "") -> None:
        rtol = 2e-3 if self.device.type == "cuda" else 1e-4
        torch.testing.assert_close(mine, whole, rtol=rtol, atol=2e-5, msg=lambda said: f"{name} {said}")

    def slice(self, name: str, tensor):
        """This process's slice of a tensor of the whole layer."""
        where = _placement(name)
        if not where.is_shard():
            return tensor
        return tensor.chunk(self.mesh.size(), where.dim)[self.mesh.get_local_rank()]

    def passes_agree(self, **how) -> None:
        """Output and every gradient."""
        upstream, results = torch.randn_like(self.x), []
        dist.broadcast(upstream, 0)
        for layer in (self.part, self.whole):
            layer.zero_grad()
            x = self.x.clone().requires_grad_()
            y = layer(x, **how)
            y.backward(upstream)
            results.append((y.detach(), x.grad))
        for mine, whole in zip(*results, strict=True):
            self.near(mine, whole)
        for name, weight in self.part.named_parameters():
            whole = self.whole.get_parameter(name).grad
            assert (weight.grad is None) == (whole is None), name
            if whole is not None:
                self.near(weight.grad, self.slice(name, whole), name)


def outputs_and_gradients(mesh) -> None:
    for config in (
        {"flux_alpha": 0.0, "bias": True},
        {"flux_alpha": 0.5, "notes": False},
        {"flux_alpha": 1.0, "bias": True, "nearest_gates": True, "probes": 4, "max_notes": 2},
        {"flux_alpha": 1.0, "head_top_p": 0.6},
        {"flux_alpha": 1.0, "heads_awake_max": 1, "d_model": 8, "bias": True},  # projected head by head
        {"flux_alpha": 1.0, "route_heads": False, "backend": "reference"},
    ):
        pair = Pair(mesh, **config)
        pair.passes_agree()
        with torch.no_grad():
            pair.near(pair.part(pair.x), pair.whole(pair.x), str(config))
        padding = torch.arange(T, device=pair.device) >= torch.tensor([[T], [T - 9]], device=pair.device)
        pair.passes_agree(key_padding_mask=padding, positions=torch.arange(T) + 5)


def dropped_tokens(mesh) -> None:
    pair = Pair(mesh, flux_alpha=1.0, keep_ratio=0.61, bias=True)
    pair.passes_agree()
    mine, whole = (layer(pair.x, return_stats=True)[1].kept for layer in (pair.part, pair.whole))
    assert torch.equal(mine, whole) and not whole.all()


def triton_in_pieces(mesh) -> None:
    """A path that reads weights and calls no projection. On a CPU only where its kernels are interpreted."""
    if mesh.device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return
    pair = Pair(mesh, flux_alpha=1.0, backend="triton", bias=True)
    with torch.no_grad():
        pair.near(pair.part(pair.x[:1, :32]), pair.whole(pair.x[:1, :32]))


def training(mesh) -> None:
    pair = Pair(mesh, flux_alpha=1.0, keep_ratio=0.61, heads_awake_max=1, ema_decay=0.9)
    pair.part.train()
    pair.whole.train()
    for _ in range(3):
        pair.passes_agree()
    for name, buffer in pair.whole.named_buffers():
        if "sample" not in name:
            mine = pair.part.get_buffer(name)
            pair.near(mine, pair.slice(name, buffer) if "inv_freq" not in name else buffer, name)


def decoding(mesh) -> None:
    pair = Pair(mesh, flux_alpha=1.0, bias=True)
    y, state = pair.part.prefill(pair.x[:, :80], T)
    steps = [pair.part.decode(pair.x[:, t : t + 1], state) for t in range(80, 84)]
    with torch.no_grad():
        pair.near(torch.cat([y, *steps], dim=1), pair.whole(pair.x)[:, :84])


def first_device_counts(mesh) -> None:
    """Values come from the first device; they are written as the whole layer; what is frozen stays so."""
    rank = mesh.get_local_rank()
    torch.manual_seed(rank)
    attn = ProteusAttention(AttentionConfig(**SIZES, bias=True))
    attn.q_proj.weight.requires_grad_(False)
    part = shard_groups(attn, mesh)
    assert not part.q_proj.weight.requires_grad and part.training and part.cfg.n_kv_heads == 2
    assert (LAST_BIAS in part.state_dict()) == (rank == 0)
    copies = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    torch.manual_seed(0)
    first = ProteusAttention(AttentionConfig(**SIZES, bias=True))
    joined = join_groups(part)
    with tempfile.TemporaryDirectory() as folder:
        path = part.save(Path(folder) / "layer.safetensors")
        assert path.exists() == (rank == 0)
        saved = ProteusAttention.load(path) if rank == 0 else joined
    with torch.no_grad():
        for weight in (*attn.parameters(), *attn.buffers()):
            weight.zero_()  # of which the part holds a copy
    for name, mine in copies.items():
        assert torch.equal(mine.nan_to_num(), part.state_dict()[name].nan_to_num())
    for name, tensor in first.state_dict().items():
        for layer in (joined, saved):
            torch.testing.assert_close(layer.state_dict()[name].cpu(), tensor, rtol=0, atol=0, equal_nan=True, msg=name)


TESTS = (outputs_and_gradients, dropped_tokens, triton_in_pieces, training, decoding, first_device_counts)

if __name__ == "__main__":
    torch.set_num_threads(1)
    device = torch.device(sys.argv[1])
    with together(device) as (_, ranks):
        for test in TESTS:
            test(init_device_mesh(device.type, (ranks,)))
            print(test.__name__, flush=True)
