"""One layer on one device and on several, each with some of its KV groups, beside dense attention shared out alike.

`torchrun --nproc-per-node N -m proteus_playground.experiments.speed.shards --device cuda --dtype bfloat16`

Dense is the same layer at flux alpha 0: fused SDPA between the same projections. Backward passes are timed as in
training, so ours also records keys for its prototypes. On several devices a call takes as long as the slowest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed import DeviceMesh, init_device_mesh

from ...attention import AttentionConfig, ProteusAttention
from ...attention.sharding import add_up, shard_groups
from ...common import options
from ...common.machine import environment, markdown
from ...common.processes import together
from .measure import clock, measured_on, publish, release, summary
from .rivals import CALIBRATION, draw

WARM_UP = 2  # untimed calls: the first compiles kernels, the second finds memory cached


def main(
    lengths: options.Lengths = "16k,64k,256k",
    d_model: options.Width = 1024,
    heads: options.Heads = 16,
    groups: Annotated[int, typer.Option(help="KV groups, a multiple of the processes.")] = 8,
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 256,
    alpha: options.Alpha = 1,
    backward: Annotated[bool, typer.Option(help="Time forward and backward, instead of forward.")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    repeats: Annotated[int, typer.Option(help="Timed calls of each.", min=1)] = 11,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """A layer whose KV groups are shared out over the processes of torchrun, by length."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, options.DTYPES)
    cfg = AttentionConfig(d_model=d_model, n_heads=heads, n_kv_heads=groups, head_dim=head_dim, shortlist=shortlist,
                          flux_alpha=alpha)  # fmt: skip
    with together(dev) as (rank, ranks):
        if ranks == 1:
            raise typer.BadParameter("one process: must be two or more; start with torchrun --nproc-per-node 2")
        mesh = init_device_mesh(dev.type, (ranks,))
        rows = [
            measure(cfg, tokens, mesh, dtype=kind, backward=backward, repeats=repeats, seed=seed)
            for tokens in options.parse_lengths(lengths)
        ]
        about = {"dtype": dtype, "seed": seed, "devices": ranks, "backward": backward, "config": cfg.to_dict()}
        report = {"benchmark": "shards", **environment(dev), **about, "rows": rows}
        if rank == 0:
            publish(report, shards_table(report), out)


def measure(
    cfg: AttentionConfig, tokens: int, mesh: DeviceMesh, *, dtype: torch.dtype, backward: bool, repeats: int, seed: int
) -> dict:
    """One row of the table; all processes call this.

    In milliseconds: one, one_dense on one device; shared, shared_dense on all; exchange: one all-reduce of the output.
    speedup, speedup_dense: one over all; against_dense: dense over ours, on all. difference: the largest between the
    outputs of one device and of several, largest: the largest output.
    """
    torch.manual_seed(seed)
    device = torch.device(mesh.device_type)
    topics, gen = torch.randn(64, cfg.d_model).to(device), torch.Generator(device).manual_seed(seed)
    x = draw(tokens, 1, cfg.d_model, topics, gen, dtype)[:, :, 0]
    dist.broadcast(x, 0)
    whole = ProteusAttention(cfg).to(device, dtype).eval()
    whole.calibrate(x[:, :CALIBRATION])
    part, first = shard_groups(whole, mesh), dist.get_rank() == 0
    exchange = _by_all(lambda: add_up(x, mesh), device, repeats)
    row = {"tokens": tokens, "exchange": exchange}
    with torch.no_grad():
        y = part(x)
        if first:
            exact = whole(x)
            row |= {"difference": float((y - exact).abs().max()), "largest": float(exact.abs().max())}
            del exact
        del y
    x.requires_grad_(backward)
    for name, layer, timed in (("one", whole, _alone), ("shared", part, _by_all)):
        row[name] = timed(_call(layer.train(backward), x, backward), device, repeats)
        with layer.settings(flux_alpha=0.0):
            row[f"{name}_dense"] = timed(_call(layer.eval(), x, backward), device, repeats)
    release(device)
    if first:
        ms = {name: times["median_ms"] for name, times in row.items() if isinstance(times, dict)}
        row |= {"speedup": ms["one"] / ms["shared"], "speedup_dense": ms["one_dense"] / ms["shared_dense"],
                "against_dense": ms["shared_dense"] / ms["shared"]}  # fmt: skip
    return row


def _call(layer: ProteusAttention, x: Tensor, backward: bool) -> Callable[[], object]:
    """A forward pass, or also the backward pass to x and all weights."""
    if not backward:
        return torch.no_grad()(lambda: layer(x))
    leaves, upstream = [x, *layer.parameters()], x.detach().clone()
    return lambda: torch.autograd.grad(layer(x), leaves, upstream, allow_unused=True)


def _alone(run: Callable[[], object], device: torch.device, repeats: int) -> dict | None:
    """Summary of the milliseconds of `repeats` calls by the first process; the others wait and return None."""
    found = None if dist.get_rank() else summary(_samples(run, device, repeats))
    _meet(device)
    return found


def _by_all(run: Callable[[], object], device: torch.device, repeats: int) -> dict:
    """Summary of the milliseconds of `repeats` calls by all processes, each the slowest one's."""
    slowest = torch.tensor(_samples(run, device, repeats, before=lambda: _meet(device)), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return summary(slowest.tolist())


def _samples(run: Callable[[], object], device: torch.device, repeats: int, before=lambda: None) -> list[float]:
    times = []
    for _ in range(WARM_UP + repeats):
        before()
        times.append(clock(run, device)[0])
    return times[WARM_UP:]


def _meet(device: torch.device) -> None:
    """Wait for all processes."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None)


def shards_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    cfg, n = report["config"], report["devices"]
    columns = ("one", "shared", "exchange", "one_dense", "shared_dense")
    rows = [
        [f"{r['tokens']:,}", *(f"{r[name]['median_ms']:.2f}" for name in columns), f"{r['speedup']:.2f}x",
         f"{r['speedup_dense']:.2f}x", f"{r['against_dense']:.2f}x", f"{r['difference']:.1e} of {r['largest']:.1e}"]
        for r in report["rows"]
    ]  # fmt: skip
    head = ["tokens", "Proteus on 1, ms", f"on {n}, ms", "all-reduce alone, ms", "dense SDPA on 1, ms",
            f"on {n}, ms", f"speed-up by {n}", "of dense", f"Proteus against dense on {n}",
            "largest difference to 1"]  # fmt: skip
    what = "forward and backward" if report["backward"] else "forward"
    return (
        f"{n} x {measured_on(report)}; one layer, {what}, batch 1, D = {cfg['d_model']}, {cfg['n_heads']} heads over "
        f"{cfg['n_kv_heads']} KV groups of {cfg['head_dim']}, L = {cfg['shortlist']}, "
        f"alpha = {cfg['flux_alpha']:g}\n\n{markdown(head, rows)}"
    )


if __name__ == "__main__":
    typer.run(main)
