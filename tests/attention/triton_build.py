"""Compile the Triton backend for a GPU that need not be here, and print a JSON line per kernel and case.

    python tests/attention/triton_build.py gfx942                 # every kernel, in every case for this GPU
    python tests/attention/triton_build.py sm_75 rank_kernel      # some, in the first case

The host code itself runs, on CPU tensors, and each launch becomes a warm-up: Triton's own launcher then decides how
arguments are specialised and which options the target takes. No kernel runs, so tensors hold whatever they held.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from proteus_playground.attention import AttentionConfig, Gates, KVBank, ProteusAttention, plan_budget, rope_frequencies
from proteus_playground.attention.backends.dispatch import attend
from proteus_playground.attention.backends.fused.bank_fill import PassIndex, fill
from proteus_playground.attention.backends.fused.bank_step import step
from proteus_playground.attention.backends.fused.plan import make_plan, sizes_of
from proteus_playground.attention.backends.fused.tables import GateLookup, index_keys
from proteus_playground.attention.fast_paths import attend_in_pieces

UNITS = {"sm": r"mma\.sync|wgmma\.mma_async", "gfx1101": r"v_wmma", "gfx942": r"v_mfma"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def config(d: int, heads: int, groups: int, **changes) -> AttentionConfig:
    return AttentionConfig(
        d_model=64, n_heads=heads, n_kv_heads=groups, head_dim=d, flux_alpha=1.0, shortlist=256, **changes
    )


def layer(dtype=torch.bfloat16, d=64, heads=8, groups=2, tokens=16384, **changes) -> None:
    """A layer without gradient: routes, weights of heads, int8 where `changes` say so."""
    cfg = config(d, heads, groups, **changes)
    x = torch.zeros(1, tokens, cfg.d_model, dtype=dtype)
    with torch.no_grad():
        attend_in_pieces(ProteusAttention(cfg).to(dtype), x, None, plan_budget(cfg, tokens))


def training(dtype=torch.bfloat16, d=64, heads=8, groups=2, tokens=16384, keep=False, **changes) -> None:
    """The operator, forwards and back; keep: with a number of tokens that stay, and positions of their own."""
    cfg = config(d, heads, groups, **changes)
    q, k, v = (torch.zeros(1, tokens, n, d, dtype=dtype, requires_grad=True) for n in (heads, groups, groups))
    gates = Gates(groups, cfg.gates_per_group, d)
    length, positions = (torch.tensor([tokens]), torch.arange(tokens)[None]) if keep else (None, None)
    out, *_ = attend(
        q,
        k,
        v,
        gates,
        plan_budget(cfg, tokens),
        positions=positions,
        inv_freq=rope_frequencies(d, 1e4),
        length=length,
        awake=None,
        scale=d**-0.5,
        int8=False,
        explain=False,
        backend="triton",
    )
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))


def bank(dtype=torch.bfloat16, d=64, heads=8, groups=2, **changes) -> None:
    """A prompt that fills a KV bank, and one token more."""
    cfg = config(d, heads, groups, **changes)
    gates, freq = Gates(groups, cfg.gates_per_group, d), rope_frequencies(d, 1e4)
    made = KVBank.empty(plan_budget(cfg, 1 << 20), gates, inv_freq=freq, dtype=dtype)
    q, k, v = (torch.zeros(1, 1, n, d, dtype=dtype) for n in (heads, groups, groups))
    prompt = torch.zeros(1, 4096, groups, d, dtype=dtype)
    lookup = GateLookup(gates.prototypes, gates.alive, None, freq, None)
    plan = make_plan(sizes_of(made.budget, heads // groups, d, cfg.gates_per_group))
    fill(made, PassIndex(index_keys(prompt, prompt, lookup, plan, False), prompt, prompt), None)
    step(made, q, k, v, None, None, torch.zeros(1, 1, dtype=torch.int64))


THREES = {"dtype": torch.float16, "d": 32, "heads": 9, "groups": 3, "tokens": 9001}
STORED = ("gates_kernel", "sums_kernel", "notes_kernel", "far_kernel", "near_kernel")  # read or write stored keys
LARGE = (
    "gates_kernel", "probe_kernel", "far_kernel", "near_kernel", "far_query_kernel", "far_key_kernel",
    "near_query_kernel", "near_key_kernel", "note_grad_kernel",
)  # fmt: skip
NEAREST = {"nearest_gates": True, "gates_per_group": 256, "probes": 16}  # a row reads the notes of some gates
BANK = ("fill_kernel", "retire_kernel", "row_kernel")
CHOSEN = (
    "gates_kernel", "rank_kernel", "probe_kernel", "choose_kernel", "bucket_bits_kernel", "far_kernel", "near_kernel",
    "near_query_kernel", "note_grad_kernel",
)  # fmt: skip
EVERY_KERNEL = [  # what runs, at which sizes, and which kernels of it are built (none named: all)
    (layer, {}, ()),
    (training, {}, ()),
    (training, NEAREST, CHOSEN),
    (bank, NEAREST, ()),
]
CASES = [
    *EVERY_KERNEL,
    (layer, {"dtype": torch.float16, "groups": 8, "int8": True}, STORED),
    (layer, {**THREES, "head_top_p": 0.6}, ("probe_kernel", "route_kernel")),
    (training, {**THREES, "keep": True}, ()),
    (layer, {"dtype": torch.float16, "d": 256, "int8": True}, ("far_kernel", "near_kernel")),
    (bank, {"d": 128, "heads": 16, "groups": 1, "gates_per_group": 512}, BANK),
    *((training, {"d": d}, LARGE) for d in (128, 96, 80)),  # the last two are kernels of 128: compiled once
]
LARGEST = (training, {"d": 256}, LARGE)  # takes longest
# Other sizes are built for sm_80 alone, the NVIDIA card of least memory. For other GPUs each kernel is built once.


class Absent:
    """What the launcher asks of a driver, answered for a GPU by its name, such as 'sm_80' or 'gfx942'."""

    def __init__(self, name: str):
        kind, number = re.fullmatch(r"(sm_|gfx)(\w+)", name).groups()
        waves = 64 if number.startswith("9") else 32
        self.target = GPUTarget("cuda", int(number), 32) if kind == "sm_" else GPUTarget("hip", name, waves)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Builder:
    """Builds kernels for the GPU `name` in place of `JITFunction.run`, and prints what came of each."""

    def __init__(self, name: str):
        self.units = next(pattern for kind, pattern in UNITS.items() if name.startswith(kind))
        self.launch, self.built = JITFunction.run, {}
        self.case, self.only = "", ()

    def run(self, fn, *args, grid, warmup, **options) -> None:
        if self.only and fn.__name__ not in self.only:
            return
        try:
            kernel = self.launch(fn, *args, grid=grid, warmup=True, **options)
            if kernel.hash not in self.built:
                self.built[kernel.hash] = self.measure(kernel)
            found = self.built[kernel.hash]
        except Exception as err:  # whatever a compiler may raise is a finding, and the next kernel is tried too
            while err.__cause__:
                err = err.__cause__
            found = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps({"kernel": fn.__name__, "case": self.case, **found}), flush=True)

    def measure(self, kernel) -> dict:
        """Shared memory in bytes, matrix instructions in the code, and what registers could not hold."""
        code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        return {"shared": kernel.metadata.shared, "units": len(re.findall(self.units, code)), "spills": spills(kernel)}


def spills(kernel) -> int | None:
    """A thread's spilled registers (gfx) or bytes of stack (sm); None where this Triton brings no cuobjdump."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"vgpr_spill_count: *(\d+)", kernel.asm["amdgcn"])[1])
    if not CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def main(name: str, *names: str) -> None:
    builder = Builder(name)
    triton.runtime.driver.set_active(Absent(name))
    torch.version.hip = name if name.startswith("gfx") else None  # the host code chooses options by it
    JITFunction.run = lambda fn, *args, **options: builder.run(fn, *args, **options)
    cases = [*CASES, LARGEST] if name == "sm_80" else EVERY_KERNEL
    for run, sizes, only in cases[:1] if names else cases:
        builder.case = " ".join([run.__name__, *(f"{key}={value}" for key, value in sizes.items())])
        builder.only = names or only
        run(**sizes)


if __name__ == "__main__":
    main(*sys.argv[1:])
