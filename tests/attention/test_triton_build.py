"""Every Triton kernel compiled for GPUs that are not here: it builds, it uses the matrix units, its tiles fit.

The interpreter shows none of this. A process of its own compiles, for here kernels may be the interpreter's.
"""

import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed for this system")
from proteus_playground.attention.backends import fused  # noqa: E402

pytestmark = pytest.mark.slow
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx1101": 64 << 10, "gfx942": 64 << 10}  # bytes a block may have
MULTIPLY = {
    "gates_kernel", "rank_kernel", "sums_kernel", "notes_kernel", "probe_kernel", "route_kernel", "far_kernel",
    "near_kernel", "far_query_kernel", "far_key_kernel", "near_query_kernel", "near_key_kernel", "note_grad_kernel",
    "anchor_kernel", "spread_kernel",
}  # fmt: skip
MOVE = {
    "rotate_kernel", "scan_counts_kernel", "scan_sums_kernel", "order_kernel", "bucket_kernel", "delta_kernel",
    "choose_kernel", "bucket_bits_kernel", "retire_kernel", "row_kernel", "fill_kernel",
}  # fmt: skip
everywhere = pytest.mark.parametrize("target", SHARED)


def build(cache: Path, target: str, *kernels: str) -> list[dict]:
    """What triton_build.py prints for a target, compiled afresh."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("triton_build.py")), target, *kernels]
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{target}: ended with {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    asserted = dict.fromkeys(line for line in done.stderr.splitlines() if "Assertion" in line)  # in the compiler
    said = "".join(f"\n{line}" for line in asserted)
    return [{**line, "error": line["error"] + said} if "error" in line else line for line in lines]


def listed(target: str, lines: list[dict], wrong: str) -> str:
    """One line per kernel and fault, with the first case that shows it."""
    faults = {}
    for line in lines:
        faults.setdefault((line["kernel"], wrong.format(**line)), line["case"])
    return "".join(f"\n{target}: {kernel} [{case}]: {fault}" for (kernel, fault), case in faults.items())


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """What each target's build will have printed; two at a time."""
    pool = ThreadPoolExecutor(2)
    yield {target: pool.submit(build, tmp_path_factory.mktemp(target), target) for target in SHARED}
    pool.shutdown(cancel_futures=True)


@everywhere
def test_every_kernel_builds(builds, target):
    failed = [line for line in builds[target].result() if "error" in line]
    assert not failed, listed(target, failed, "{error}")
    assert {line["kernel"] for line in builds[target].result()} == MULTIPLY | MOVE


def test_no_kernel_is_left_out():
    modules = [import_module(f"{fused.__name__}.{found.name}") for found in pkgutil.iter_modules(fused.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == MULTIPLY | MOVE


@everywhere
def test_what_multiplies_uses_the_matrix_units(builds, target):
    found = [line for line in builds[target].result() if line["kernel"] in MULTIPLY and "error" not in line]
    slow = [line for line in found if line["units"] == 0]
    assert found and not slow, listed(target, slow, "no matrix instruction")


@everywhere
def test_tiles_fit_in_shared_memory(builds, target):
    found = [line for line in builds[target].result() if "error" not in line]
    large = [line for line in found if line["shared"] > SHARED[target]]
    assert found and not large, listed(target, large, "{shared} bytes of shared memory, at most " + str(SHARED[target]))


def test_why_turing_is_refused(tmp_path):
    """`probe_triton` keeps Triton from sm_75 because matrices are multiplied without tensor cores there."""
    found = build(tmp_path, "sm_75", "rank_kernel", "far_kernel")
    built = [line for line in found if "error" not in line]
    if not built:
        pytest.skip("this Triton compiles nothing for sm_75:" + listed("sm_75", found, "{error}"))
    fast = [line for line in built if line["units"]]
    assert not fast, listed("sm_75", fast, "{units} matrix instructions: Triton could be let in there now")
