"""Plans by name: `quick` for a small model on a CPU, `try` for minutes, `small` for an hour, and `guide`.

`guide` has the step counts of the integration guide.
"""

from __future__ import annotations

from dataclasses import replace

from ...common.texts import TOPICS
from .plan import Budgets, Data, Losses, Plan, Plateau, Rates, Stage

DENSE = Budgets(alpha_high=0.0, alpha_start=0.0, dense_share=1.0)
NO_LOSS = Losses(kl=0.0, match=0.0)
MANUAL = Data(sources=(TOPICS,), held_out_rows=4)


def _a(tokens: int, *lengths: int) -> Stage:
    """Prototypes follow the keys of the text; no weight of the model changes, and there is no gradient.

    Training prototypes to match dense attention's share on each gate (`Losses.gates`) did not help (docs/log.md).
    """
    return Stage("A", tokens, lengths, DENSE, losses=NO_LOSS, trains=())


def _d(tokens: int, length: int) -> Stage:
    """The same once more, for the keys of the trained weights."""
    return replace(_a(tokens, length), name="D", optional=True)


def _quick(data: Data) -> Plan:
    """For a model of about a million parameters on two cores: short rows, small steps and a high rate."""
    budgets = Budgets(alpha_start=1.0, alpha_low=0.5, dense_share=0.2)
    stages = _a(80_000, 512), Stage("B", 960_000, (512,), budgets, Rates(weights=4e-3))
    return Plan(stages, batch_tokens=512, pass_tokens=512, checkpoint=False, data=data, minutes=3.0)


def _try(data: Data) -> Plan:
    b = Stage("B", 3_000_000, (2048,), Budgets(alpha_start=0.5), Rates(weights=5e-4))
    return Plan((_a(200_000, 2048), b), data=data, minutes=10.0)


def _small(data: Data) -> Plan:
    b = Stage("B", 8_000_000, (2048,), Budgets(alpha_start=0.3), Rates(weights=5e-4), plateau=Plateau(1_000_000))
    c = Stage("C", 12_000_000, (2048, 4096, 8192), Budgets(), Rates(weights=2e-4), plateau=Plateau(1_000_000))
    return Plan((_a(500_000, 2048), b, c, _d(500_000, 8192)), data=data, minutes=60.0)


def _guide(data: Data) -> Plan:
    """10,000, 40,000, 150,000 and 20,000 steps of `batch_tokens` or a row: the upper ends of the guide's ranges."""
    plateau, step, lengths = Plateau(8_000_000), 8192, (8192, 16384, 32768, 65536)
    a = _a(10_000 * step, 2048, 4096)
    b = Stage("B", 40_000 * step, (4096,), Budgets(alpha_start=0.0, rise=1.0), Rates(weights=2e-4), plateau=plateau,
              losses=Losses(cross_entropy=0.1))  # fmt: skip
    c = Stage("C", sum(150_000 // 4 * n for n in lengths), lengths, Budgets(), Rates(weights=1e-4), plateau=plateau,
              losses=Losses(cross_entropy=0.1))  # fmt: skip
    return Plan((replace(a, plateau=plateau), b, c, _d(20_000 * step, 8192)), batch_tokens=step, data=data)


PRESETS = {"quick": _quick, "try": _try, "small": _small, "guide": _guide}


def preset(name: str, data: Data | None = None) -> Plan:
    """The plan called `name`, on `data`. Raises `ValueError` for another name.

    Without `data`, `quick` reads Python's manual, and the others the commonplace book.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name](data or (MANUAL if name == "quick" else Data()))
