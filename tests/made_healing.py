"""A healing run whose steps are made up, for tests of the panel alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from proteus_playground.hf.healing.plan import Data, Plan, Stage
from proteus_playground.hf.healing.presets import DENSE, NO_LOSS
from proteus_playground.hf.healing.session import PLAN
from proteus_playground.hf.healing.training import Step

A = Stage("A", 128, (64,), DENSE, losses=NO_LOSS, trains=())
STEPS = 4


def plan_for(text: str) -> Plan:
    """One step that moves prototypes, and four that train."""
    return Plan((A, Stage("B", STEPS * 128, (64,))), batch_tokens=128, data=Data(sources=(text,)))


def measured(gap: float) -> dict:
    """What `Measured.to_dict` gives where the gap at 1/8 of the keys is `gap`."""
    gaps = {32: 4 * gap, 16: 2 * gap, 8: gap}
    return {"base": 3.0, "dense": 3.0, "sparse": {s: 3.0 + g for s, g in gaps.items()},
            "reads": {32: 2.0, 16: 4.0, 8: 8.0}, "gaps": gaps}  # fmt: skip


def step(number: int, stage: str = "B", gap: float | None = None) -> Step:
    loss = 0.0 if stage == "A" else 1.0 / number
    return Step(number, stage, 64, 0.5, 0.8, 8.0, 16.0, loss, loss, 0.0, 0.0, 0.0, 1e-3, 1.0, 128 * number, 1000.0,
                0.1 * number, None if gap is None else measured(gap))  # fmt: skip


class MadeSession:
    """Goes through `STEPS` steps of stage B after one of stage A; the gap halves with each measurement."""

    def __init__(self, path: Path, device: str):
        self.run_folder = Path(path) / "runs" / "001-try"
        plan = Plan.read(self.run_folder / PLAN)
        self.training = SimpleNamespace(stage=plan.stages[0], plan=plan, left=plan.tokens)
        self.run = self
        self._left = iter([step(1, "A", 0.4), *(step(1 + n, "B", 0.4 / 2**n) for n in range(1, STEPS + 1))])

    def begin(self, say, seconds, every) -> None:
        say("Measuring held-out text before the first step.")

    def steps(self, stop):
        for _ in range(1 if self.training.stage.name == "A" else STEPS):
            self.training.left -= 128
            yield next(self._left)

    def finish_stage(self) -> None:
        stages = self.training.plan.stages
        self.training.stage = stages[1] if self.training.stage is stages[0] else None
