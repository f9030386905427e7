"""A layer whose KV groups are shared out over processes is the whole layer; its benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import init_device_mesh

from proteus_playground.attention import AttentionConfig, ProteusAttention
from proteus_playground.attention.sharding import GroupShard, shard_groups

HERE = Path(__file__).parent
no_rendezvous = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's gloo rendezvous needs libuv there")


def two_processes(*program) -> str:
    """What two processes print. Raises `AssertionError` where one fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, program)]
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@no_rendezvous
def test_two_processes_are_the_whole_layer():
    assert two_processes(HERE / "shards.py", "cpu").count("first_device_counts") == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_the_whole_layer():
    assert two_processes(HERE / "shards.py", "cuda").count("first_device_counts") == 2


@no_rendezvous
def test_the_benchmark_writes_its_rows(tmp_path):
    sizes = {"lengths": "64,96", "d-model": 32, "heads": 4, "groups": 2, "head-dim": 8, "shortlist": 24, "repeats": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    module = "proteus_playground.experiments.speed.shards"
    said = two_processes("-m", module, *options, "--backward", "--out", tmp_path / "shards.json")
    report = json.loads((tmp_path / "shards.json").read_text())
    assert "| 96 |" in said and said.count("| tokens |") == 1
    assert (report["devices"], report["backward"]) == (2, True)
    assert [row["tokens"] for row in report["rows"]] == [64, 96]
    for row in report["rows"]:
        assert row["difference"] < 1e-4 * row["largest"]
        assert row["speedup"] == row["one"]["median_ms"] / row["shared"]["median_ms"]
        assert {row[name]["runs"] for name in ("one", "shared", "one_dense", "shared_dense")} == {2}


@pytest.fixture(scope="module")
def meshes():
    """Meshes of stand-in processes, which exchange nothing: one of three devices, and one of two axes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield init_device_mesh("cpu", (3,)), init_device_mesh("cpu", (3, 1), mesh_dim_names=("data", "heads"))
    dist.destroy_process_group()


def layer(**config) -> ProteusAttention:
    return ProteusAttention(AttentionConfig(d_model=24, n_heads=6, head_dim=4, gates_per_group=4, **config))


@pytest.mark.bad_input
def test_what_cannot_be_shared_out_is_refused(meshes):
    flat, square = meshes
    assert isinstance(part := shard_groups(layer(n_kv_heads=3), flat), GroupShard)
    adapted, hooked = layer(n_kv_heads=3), layer(n_kv_heads=3)
    adapted.v_proj = nn.Sequential(adapted.v_proj)
    hooked.o_proj.register_forward_hook(lambda *seen: None)
    for wrong, mesh, error, said in (
        (layer(n_kv_heads=2), flat, ValueError, "n_kv_heads=2: must be a multiple of the mesh's 3 devices"),
        (layer(n_kv_heads=3), square, ValueError, "mesh has 2 axes .*data.*heads.*: must have one"),
        (layer(n_kv_heads=3), 3, TypeError, "mesh=int: expected a DeviceMesh"),
        (nn.Linear(2, 2), flat, TypeError, "attn=Linear: expected ProteusAttention"),
        (part, flat, TypeError, "attn=GroupShard: expected ProteusAttention"),
        (adapted, flat, TypeError, "v_proj is a .*Sequential: must be an nn.Linear without hooks"),
        (hooked, flat, TypeError, "o_proj is a .*Linear: must be an nn.Linear without hooks"),
    ):
        with pytest.raises(error, match=said):
            shard_groups(wrong, mesh)
