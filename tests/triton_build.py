"""Compile the Triton backend for a GPU that need not be here: `python triton_build.py sm_80` prints a JSON line per kernel.

The host code itself runs, on CPU tensors; a launch becomes a warm-up, so that Triton's own launcher decides how arguments
are specialised and which options it accepts. What the kernels would have computed stays as allocated.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from proteus_playground.attention import AttentionConfig, Gates, ProteusAttention, plan_budget, rope_frequencies
from proteus_playground.attention.backends import triton as fused
from proteus_playground.attention.pieces import attend_in_pieces

UNITS = {"sm": r"mma\.sync|wgmma\.mma_async", "gfx1101": r"v_wmma", "gfx942": r"v_mfma"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:
    """What the launcher asks a driver, answered for a GPU by its name."""

    def __init__(self, name: str):
        kind, number = re.fullmatch(r"(sm_|gfx)(\w+)", name).groups()
        if kind == "sm_":
            self.target = GPUTarget("cuda", int(number), 32)
        else:
            self.target = GPUTarget("hip", name, 64 if number.startswith("9") else 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def spilled(kernel) -> int | None:
    """Spilled registers of a thread (gfx), or bytes of its stack (sm); None where that cannot be told."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"vgpr_spill_count: *(\d+)", kernel.asm["amdgcn"])[1])
    if not CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


class Report:
    """Stands in for `JITFunction.run`: builds a kernel for the GPU `name` and prints what came of it."""

    def __init__(self, name: str):
        self.units = next(pattern for kind, pattern in UNITS.items() if name.startswith(kind))
        self.build, self.built = JITFunction.run, {}
        self.case, self.only = "", ()

    def run(self, fn, *args, grid, warmup, **options) -> None:
        if self.only and fn.__name__ not in self.only:
            return
        start = time.perf_counter()
        try:
            kernel = self.build(fn, *args, grid=grid, warmup=True, **options)
            found = self.built.setdefault(kernel.hash, None) or self.measure(kernel)
            self.built[kernel.hash] = found
        except Exception as err:  # whatever a compiler may throw is a finding, and the next kernel has to be tried
            found = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps({"kernel": fn.__name__, "case": self.case, **found, "s": round(time.perf_counter() - start, 2)}), flush=True)

    def measure(self, kernel) -> dict:
        code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        return {"shared": kernel.metadata.shared, "units": len(re.findall(self.units, code)), "spills": spilled(kernel)}


def config(d: int, heads: int, groups: int, **changes) -> AttentionConfig:
    return AttentionConfig(d_model=64, n_heads=heads, n_kv_heads=groups, head_dim=d, flux_alpha=1.0, shortlist=256, **changes)


def layer(dtype, d: int, heads: int, groups: int, tokens: int, **changes) -> None:
    """A layer's forward pass: routing, kernels and weights, without gradient."""
    cfg = config(d, heads, groups, **changes)
    with torch.no_grad():
        attend_in_pieces(
            ProteusAttention(cfg).to(dtype), torch.zeros(1, tokens, 64, dtype=dtype), None, plan_budget(cfg, tokens)
        )


def training(dtype, d: int, heads: int, groups: int, tokens: int, keep: bool = False) -> None:
    """Forward and backward of the operator; keep: with a number of tokens that stay."""
    cfg = config(d, heads, groups)
    q, k, v = (torch.zeros(1, tokens, n, d, dtype=dtype, requires_grad=True) for n in (heads, groups, groups))
    gates, length = Gates(groups, cfg.gates_per_group, d), torch.full((1,), tokens) if keep else None
    find = fused.Finder(gates.prototypes, gates.alive, torch.arange(tokens), rope_frequencies(d, 1e4), length)
    out, _ = fused.attend(q, k, v, find, None, plan_budget(cfg, tokens), d**-0.5, False)
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))


def main(name: str) -> None:
    report = Report(name)
    triton.runtime.driver.set_active(Absent(name))
    torch.version.hip = "any" if name.startswith("gfx") else None  # what the host code chooses its options by
    JITFunction.run = lambda fn, *args, **options: report.run(fn, *args, **options)
    half, brain = torch.float16, torch.bfloat16
    for case, run in {
        "layer bf16 64 8/2": lambda: layer(brain, 64, 8, 2, 16384),
        "training bf16 64 8/2": lambda: training(brain, 64, 8, 2, 16384),
        "layer fp16 64 8/8 int8": lambda: layer(half, 64, 8, 8, 16384, int8=True),
        "training keep fp16 32 9/3": lambda: training(half, 32, 9, 3, 9001, keep=True),
        "layer fp16 32 9/3": lambda: layer(half, 32, 9, 3, 9001),
        **{f"{f.__name__} bf16 {d}": lambda d=d, f=f: f(brain, d, 8, 2, 16384) for d in (256, 128, 96, 80) for f in (layer,training)},
        "layer int8 256": lambda: layer(half, 256, 4, 1, 16384, int8=True),
        **{f"training fp32 {d}": lambda d=d: training(torch.float32, d, 8, 2, 16384) for d in (64, 128,256)},
    }.items():
        report.case = case
        run()


if __name__ == "__main__":
    main(*sys.argv[1:])
