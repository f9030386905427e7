"""What is asked of a buffer: one needle, many, a cluster, a fading signal, a jigsaw, live fire, order, look-alikes.

Every task is a generator of cases for one length, one seed and one way of asking. The same seed plants the same facts
in the same places however they are asked for, so that ways of asking can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from .cases import Needle, NeedleCase, Planter
from .haystacks import Haystack, Words
from .pairs import Pair

MANY, CLUSTER, ORDERED = 8, 4, 6  # facts
PIECES = 3
FADES = (1.0, 0.8, 0.6, 0.4, 0.2)
REPEATS = 4  # of every distractor


@dataclass(frozen=True)
class World:
    """What all cases of a run share."""

    haystack: Haystack
    words: Words
    pairs: tuple[Pair, ...]
    depths: tuple[float, ...]
    chunk_tokens: int


class _Bench:
    """One seed's order of facts and places for one task and length."""

    def __init__(self, world: World, task: str, length: int, seed: int, asked: str):
        self.world, self.task, self.length, self.seed, self.asked = world, task, length, seed, asked
        self.rng = np.random.default_rng([seed, length, crc32(task.encode())])
        self.pairs = [world.pairs[i] for i in self.rng.permutation(len(world.pairs))]

    def planter(self) -> Planter:
        return Planter(self.world.haystack, self.length, self.world.chunk_tokens, self.world.words)

    def some(self, count: int) -> list[Pair]:
        return self.pairs[:count]

    def case(
        self,
        planter: Planter,
        pairs: list[Pair],
        needles: list[Needle],
        depth: float | None = None,
        decoys: list[Needle] | None = None,
    ) -> NeedleCase:
        prompt = " ".join(pair.asked(self.asked) for pair in pairs)
        answers = pairs[0].answers if len(pairs) == 1 else ()
        return NeedleCase(self.task, self.asked, self.length, depth, self.seed, prompt, answers, tuple(needles),
                    tuple(decoys or ()), tuple(planter.written))  # fmt: skip


def single(bench: _Bench) -> Iterator[NeedleCase]:
    """One fact at each depth: the grid of the heat map."""
    for i, depth in enumerate(bench.world.depths):
        pair, planter = bench.pairs[i % len(bench.pairs)], bench.planter()
        yield bench.case(planter, [pair], [planter.fact(pair, pair.fact, depth)], depth)


def many(bench: _Bench) -> Iterator[NeedleCase]:
    """Eight facts spread over the document, all asked for in one prompt."""
    pairs, planter = bench.some(MANY), bench.planter()
    needles = [planter.fact(pair, pair.fact, (i + 0.5) / len(pairs)) for i, pair in enumerate(pairs)]
    yield bench.case(planter, pairs, needles)


def clustered(bench: _Bench) -> Iterator[NeedleCase]:
    """Four facts close together at a random place: what one chunk may promote has to hold them all."""
    pairs, planter, depth = bench.some(CLUSTER), bench.planter(), float(bench.rng.random())
    yield bench.case(planter, pairs, [planter.fact(pair, pair.fact, depth) for pair in pairs], depth)


def fading(bench: _Bench) -> Iterator[NeedleCase]:
    """One fact said five times, ever more rarely and ever more weakly.

    Gaps double from mention to mention, and each mention loses a fifth of the fact's tokens to the haystack's own;
    the answer's tokens are always there.
    """
    pair, planter = bench.pairs[0], bench.planter()
    depths = [2.0 ** (i - len(FADES)) for i in range(len(FADES))]
    needles = [
        planter.fact(pair, pair.fact, depth, strength, seed=bench.seed)
        for depth, strength in zip(depths, FADES, strict=True)
    ]
    yield bench.case(planter, [pair], needles)


def jigsaw(bench: _Bench) -> Iterator[NeedleCase]:
    """One fact cut in three at its words, the pieces far apart and in order: all of each has to be kept."""
    pair, planter, words = bench.pairs[0], bench.planter(), bench.world.words
    parts = [" ".join(part) for part in np.array_split(pair.fact.split(" "), PIECES)]
    needles = [
        planter.piece(pair, words.encode(" " + part), part, (i + 0.25 + bench.rng.random() / 2) / PIECES)
        for i, part in enumerate(parts)
    ]
    yield bench.case(planter, [pair], needles)


def live(bench: _Bench) -> Iterator[NeedleCase]:
    """Live fire: every fact once, each alone at a random place."""
    for pair in bench.pairs:
        planter, depth = bench.planter(), float(bench.rng.random())
        yield bench.case(planter, [pair], [planter.fact(pair, pair.fact, depth)], depth)


def ordering(bench: _Bench) -> Iterator[NeedleCase]:
    """Six facts at random places, asked for in another order than they stand: the buffer keeps the document's."""
    pairs, planter = bench.some(ORDERED), bench.planter()
    needles = [planter.fact(pair, pair.fact, float(bench.rng.random())) for pair in pairs]
    yield bench.case(planter, pairs, sorted(needles, key=lambda needle: needle.start))


def distractors(bench: _Bench) -> Iterator[NeedleCase]:
    """One fact among look-alikes: each of its distractors four times over, at random places."""
    pair, planter = bench.pairs[0], bench.planter()
    needle = planter.fact(pair, pair.fact, float(bench.rng.random()))
    decoys = [planter.fact(pair, text, float(bench.rng.random())) for text in pair.distractors for _ in range(REPEATS)]
    yield bench.case(planter, [pair], [needle], None, decoys)


TASKS: dict[str, Callable[[_Bench], Iterator[NeedleCase]]] = {
    task.__name__: task for task in (single, many, clustered, fading, jigsaw, live, ordering, distractors)
}
ASKED = ("paraphrase", "literal")


def cases(world: World, tasks: list[str], lengths: list[int], seeds: int, asked: list[str]) -> Iterator[NeedleCase]:
    """Every case of a run, shortest documents first. ValueError names a task or a way of asking that is none."""
    for name, given, allowed in (("tasks", tasks, TASKS), ("asked", asked, ASKED)):
        for word in given:
            if word not in allowed:
                raise ValueError(f"{name}={word!r}: must be one of {', '.join(allowed)}")
    for length in sorted(lengths):
        for task in tasks:
            for seed in range(seeds):
                for how in asked:
                    yield from TASKS[task](_Bench(world, task, length, seed, how))
