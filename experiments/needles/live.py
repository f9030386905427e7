"""The validation suite live: its cases one by one, small enough to watch, with what each method kept of the facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from ...common.progress import Stop, check_stop
from . import retrieval
from .bm25 import WindowIndex
from .cases import NeedleCase, PlantedStore
from .haystacks import build, read
from .pairs import Pair
from .retrieval import METHODS, OURS
from .subjects import Subject
from .tasks import World, cases
from .verify import VerifySettings

LENGTHS, DEPTHS, CHUNK = (1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0), 1024
LIVE_TASKS = ("single", "jigsaw", "clustered", "fading")


@dataclass(frozen=True)
class Found:
    """A finished case: for each method the share of its facts whose answer is kept whole, and for ours each fact."""

    task: str
    length: int
    depth: float | None
    prompt: str
    share: dict[str, float]
    each: tuple[float, ...]
    strengths: tuple[float, ...]
    kept: int
    text: str  # the kept tokens within our first fact, the dropped ones as "·"


def methods() -> tuple[str, ...]:
    """The methods that are installed: BM25 needs the extra `verify`."""
    there = find_spec("bm25s") and find_spec("snowballstemmer")
    return tuple(name for name in METHODS if there or name != "bm25")


def total(tasks: tuple[str, ...], lengths=LENGTHS, depths=DEPTHS) -> int:
    """How many cases `live` measures."""
    return len(lengths) * sum(len(depths) if task == "single" else 1 for task in tasks)


def live(
    subject: Subject, pairs: list[Pair], text: str = "pydoc", tasks: tuple[str, ...] = LIVE_TASKS,
    lengths: tuple[int, ...] = LENGTHS, depths: tuple[float, ...] = DEPTHS, stop: Stop | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Every case, shortest documents first. text: as for `build`. Raises as `build` and `verify`."""
    settings = VerifySettings(lengths=lengths, depths=depths, tasks=tasks, chunk_tokens=CHUNK)
    haystack = build(text, max(lengths), subject.words)
    world = World(haystack, subject.words, tuple(pairs), depths, CHUNK)
    index = WindowIndex(haystack.tokens, subject.words) if "bm25" in methods() else None
    for case in cases(world, tasks, lengths, 1, ["paraphrase"]):
        check_stop(stop)
        store = PlantedStore(haystack.tokens, case)
        ours = retrieval.kept_by_us(store, subject.scorer(case.prompt), settings.plan(case.length), stop)
        count = len(ours.ranked)
        kept = [ours, *(retrieval.kept_by_rival(m, store, case, count, index) for m in methods() if m != OURS)]
        found = {one.method: retrieval.recall(one, case) for one in kept}
        yield Found(case.task, case.length, case.depth, case.prompt, {m: one.answer for m, one in found.items()},
                    found[OURS].each, tuple(n.strength for n in case.needles), count,
                    _shown(store, case, set(ours.ranked.tolist()), subject))  # fmt: skip


def _shown(store: PlantedStore, case: NeedleCase, kept: set[int], subject: Subject) -> str:
    needle = case.needles[0]
    ids = store.read(needle.start, needle.stop)
    return "".join(read(ids[i : i + 1], subject.words) if needle.start + i in kept else " ·" for i in range(len(ids)))
