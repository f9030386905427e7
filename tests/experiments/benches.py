"""What the tests of the benchmarks share: small options, a case, and the report that a command saved."""

from __future__ import annotations

import json

import torch
from helpers import config
from proteus_playground.experiments.speed.rivals import OURS, BenchCase

SMALL = ["--d-model", "32", "--heads", "4", "--head-dim", "8", "--shortlist", "32"]
TINY = [*SMALL, "--groups", "2", "--repeats", "2", "--no-memory"]


def case(who=OURS, tokens=64, scope="layer", passes="forward", dtype=torch.float32, **changes) -> BenchCase:
    return BenchCase(
        scope, passes, tokens, who, config(**{"route_heads": False, **changes}), torch.device("cpu"), dtype
    )


def saved(path="out.json") -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
