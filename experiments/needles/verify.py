"""The validation suite's loop. Every case is measured once and saved at once, so that a stopped run can go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import inf
from operator import itemgetter
from pathlib import Path
from time import perf_counter

from ...common.files import check_folder
from ...common.progress import Stop, check_stop
from ...common.runs import RunFolder, as_json
from ...streaming.buffer import StreamPlan
from ...streaming.stores import fits
from . import retrieval
from .answers import DENSE, answer
from .bm25 import WindowIndex
from .cases import NeedleCase, PlantedStore
from .haystacks import Haystack, build
from .pairs import Pair
from .retrieval import RIVALS
from .subjects import Subject
from .tasks import ASKED, TASKS, World, cases

CASES, SETTINGS = "cases.jsonl", "settings.json"
FIELDS = ("task", "asked", "length", "depth", "in_order", "strengths", "recall", "replies")  # every row has them
MOST = 10**6  # seeds, answers, tokens of a chunk
BYTES_PER_TOKEN = 64  # memory for one token of the haystack, the stems of its words included


@dataclass(frozen=True)
class VerifySettings:
    """Everything that decides what a run measures. `ValueError` names the field that does not fit."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    tasks: tuple[str, ...] = tuple(TASKS)
    asked: tuple[str, ...] = ASKED
    seeds: int = 3
    haystack: str = "auto"
    buffer_share: float = 0.03
    chunk_tokens: int = 4096
    per_chunk: float = 4.0  # tokens one chunk may promote, as a multiple of its fair share of the buffer
    neighbours: int = 12
    answers: int = 0  # cases per task, length and way of asking that the model also answers
    read_tokens: int = 1024  # best tokens of a buffer that the model reads to answer

    def __post_init__(self) -> None:
        for name in ("lengths", "depths", "tasks", "asked"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: must have at least one entry")
        for name, allowed in (("tasks", tuple(TASKS)), ("asked", ASKED)):
            for word in set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name}={word!r}: must be one of {', '.join(allowed)}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths={depth!r}: must be in [0, 1]")
        if not 0 < self.buffer_share <= 1:
            raise ValueError(f"buffer_share={self.buffer_share!r}: must be in (0, 1]")
        if not 1 <= self.per_chunk < inf:
            raise ValueError(f"per_chunk={self.per_chunk!r}: must be >= 1, or part of the buffer would stay empty")
        for name, low in (("seeds", 1), ("answers", 0), ("read_tokens", 1), ("chunk_tokens", 64)):
            if not low <= getattr(self, name) <= MOST:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be >= {low} and at most {MOST:,}")
        if min(self.lengths) < 256:
            raise ValueError(f"lengths={min(self.lengths)!r}: must be >= 256 tokens")
        self.plan(min(self.lengths))

    def plan(self, length: int) -> StreamPlan:
        """Chunk and buffer sizes for a document of `length` tokens."""
        kept = max(1, round(self.buffer_share * length))
        share = max(1, round(self.per_chunk * self.buffer_share * self.chunk_tokens))
        return StreamPlan(self.chunk_tokens, kept, min(share, kept), neighbours=self.neighbours)


@dataclass(frozen=True)
class Done:
    """A finished case."""

    index: int  # from 1
    total: int
    row: dict  # a line of cases.jsonl
    known: bool  # it was measured by an earlier run


def verify(
    settings: VerifySettings, pairs: list[Pair], subject: Subject, out: Path, *, stop: Stop | None = None
) -> Iterator[Done]:
    """Measure every case of `settings` that `out` does not hold yet.

    Raises `ValueError` where `out` holds a run with other settings or a document would not fit in memory, `Stopped`
    between chunks, `OSError`.
    """
    check_folder(out, "out")
    enough, figures = fits(BYTES_PER_TOKEN * max(settings.lengths), None)
    if not enough:
        raise ValueError(f"lengths={max(settings.lengths)!r}: must fit in memory, of which {figures}")
    haystack = build(settings.haystack, max(settings.lengths), subject.words)
    world = World(haystack, subject.words, tuple(pairs), settings.depths, settings.chunk_tokens)
    every = list(cases(world, settings.tasks, settings.lengths, settings.seeds, settings.asked))
    run = run_folder(out)
    run.claim(_about(settings, pairs, subject, haystack))
    known = read_rows(out)
    index, cases_so_far = None, Counter()
    for i, case in enumerate(every, 1):
        group = (case.task, case.length, case.asked)
        cases_so_far[group] += 1
        row = known.get(case.key)
        if row is None:
            check_stop(stop)
            index = index or WindowIndex(haystack.tokens, subject.words)
            asks = subject.reader is not None and bool(case.answers) and cases_so_far[group] <= settings.answers
            row = measure_case(case, PlantedStore(haystack.tokens, case), settings, subject, index, asks, stop)
            row = as_json(row)  # the same types as a row that is read back from the file
            run.append([row])
        yield Done(i, len(every), row, case.key in known)


def measure_case(
    case: NeedleCase, store: PlantedStore, settings: VerifySettings, subject: Subject, index: WindowIndex, asks: bool,
    stop: Stop | None = None,
) -> dict:  # fmt: skip
    """One case as plain numbers: recall of every method and, where `asks`, the model's replies."""
    began = perf_counter()
    ours = retrieval.kept_by_us(store, subject.scorer(case.prompt), settings.plan(case.length), stop)
    kept = [ours, *(retrieval.kept_by_rival(name, store, case, len(ours.ranked), index) for name in RIVALS)]
    row = {
        "key": case.key, "task": case.task, "asked": case.asked, "length": case.length, "depth": case.depth,
        "seed": case.seed, "pairs": [needle.pair for needle in case.needles], "kept": len(ours.ranked),
        "strengths": [needle.strength for needle in case.needles], "in_order": ours.in_order,
        "recall": {some.method: asdict(retrieval.recall(some, case)) for some in kept}, "replies": {},
    }  # fmt: skip
    if asks:
        for some in (None, *kept):
            check_stop(stop)
            reply = answer(subject.reader, store, case, some, settings.read_tokens)
            if reply is not None:
                row["replies"][DENSE if some is None else some.method] = asdict(reply)
    row["seconds"] = perf_counter() - began
    return row


def run_folder(out: Path) -> RunFolder:
    return RunFolder(out, SETTINGS, CASES)


def read_rows(out: Path) -> dict[str, dict]:
    """The finished cases of a folder by key, except a last one that a kill cut short."""
    try:
        fields = itemgetter("key", *FIELDS)  # KeyError where one is missing
        return {fields(row)[0]: row for row in run_folder(out).rows()}
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(f"out={str(out)!r}: {CASES} is not what verify wrote: allowed is another folder") from err


def _about(settings: VerifySettings, pairs: list[Pair], subject: Subject, haystack: Haystack) -> dict:
    """Everything that two runs must have in common to share a folder."""
    return asdict(settings) | {
        "model": subject.name, "about_model": subject.note, "device": subject.device, "dtype": subject.dtype,
        "scorer": subject.scorer("?").fingerprint[:200], "about_haystack": haystack.note,
        "haystack_hash": haystack.fingerprint, "pairs": len(pairs),
        "pairs_hash": sha256(repr(pairs).encode()).hexdigest()[:32],
    }  # fmt: skip
