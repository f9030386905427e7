"""The tasks: one needle, many, a cluster, a fading signal, a jigsaw, live fire, order, look-alikes.

A task generates the cases for one length, one seed and one way of asking. A seed plants the same facts in the same
places for both ways of asking, so that they can be compared pair by pair.
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
PIECES = 3  # of a jigsaw
FADES = (1.0, 0.8, 0.6, 0.4, 0.2)  # shares of a fading fact's tokens
REPEATS = 4  # of every distractor


@dataclass(frozen=True)
class World:
    """What all cases of a run have in common."""

    haystack: Haystack
    words: Words
    pairs: tuple[Pair, ...]
    depths: tuple[float, ...]
    chunk_tokens: int


class _Draw:
    """One seed's random order of facts and places for one task and length."""

    def __init__(self, world: World, task: str, length: int, seed: int, asked: str):
        self.world, self.task, self.length, self.seed, self.asked = world, task, length, seed, asked
        self.rng = np.random.default_rng([seed, length, crc32(task.encode())])
        self.pairs = [world.pairs[i] for i in self.rng.permutation(len(world.pairs))]

    def planter(self) -> Planter:
        return Planter(self.world.haystack, self.length, self.world.chunk_tokens, self.world.words)

    def some(self, count: int) -> list[Pair]:
        return self.pairs[:count]

    def case(
        self, planter: Planter, pairs: list[Pair], needles: list[Needle], depth: float | None = None,
        decoys: list[Needle] | None = None,
    ) -> NeedleCase:  # fmt: skip
        prompt = " ".join(pair.asked(self.asked) for pair in pairs)
        answers = pairs[0].answers if len(pairs) == 1 else ()
        return NeedleCase(self.task, self.asked, self.length, depth, self.seed, prompt, answers, tuple(needles),
                    tuple(decoys or ()), tuple(planter.written))  # fmt: skip


def single(draw: _Draw) -> Iterator[NeedleCase]:
    """One fact at each depth, for the grid of the heat map."""
    for i, depth in enumerate(draw.world.depths):
        pair, planter = draw.pairs[i % len(draw.pairs)], draw.planter()
        yield draw.case(planter, [pair], [planter.fact(pair, pair.fact, depth)], depth)


def many(draw: _Draw) -> Iterator[NeedleCase]:
    """Eight facts spread over the document, all asked for in one prompt."""
    pairs, planter = draw.some(MANY), draw.planter()
    needles = [planter.fact(pair, pair.fact, (i + 0.5) / len(pairs)) for i, pair in enumerate(pairs)]
    yield draw.case(planter, pairs, needles)


def clustered(draw: _Draw) -> Iterator[NeedleCase]:
    """Four facts close together at a random place: one chunk has to promote them all."""
    pairs, planter, depth = draw.some(CLUSTER), draw.planter(), float(draw.rng.random())
    yield draw.case(planter, pairs, [planter.fact(pair, pair.fact, depth) for pair in pairs], depth)


def fading(draw: _Draw) -> Iterator[NeedleCase]:
    """One fact mentioned five times, at growing distances and with fewer and fewer of its tokens.

    The gap doubles from mention to mention, and each mention has a fifth fewer of the fact's tokens; the haystack's
    tokens stay in their place. The answer's tokens are always written.
    """
    pair, planter = draw.pairs[0], draw.planter()
    depths = [2.0 ** (i - len(FADES)) for i in range(len(FADES))]
    needles = [
        planter.fact(pair, pair.fact, depth, strength, seed=draw.seed)
        for depth, strength in zip(depths, FADES, strict=True)
    ]
    yield draw.case(planter, [pair], needles)


def jigsaw(draw: _Draw) -> Iterator[NeedleCase]:
    """One fact cut into three pieces between words, far apart and in order: each piece has to be kept whole."""
    pair, planter, words = draw.pairs[0], draw.planter(), draw.world.words
    parts = [" ".join(part) for part in np.array_split(pair.fact.split(" "), PIECES)]
    needles = [
        planter.piece(pair, words.encode(" " + part), part, (i + 0.25 + draw.rng.random() / 2) / PIECES)
        for i, part in enumerate(parts)
    ]
    yield draw.case(planter, [pair], needles)


def live(draw: _Draw) -> Iterator[NeedleCase]:
    """Live fire: every fact once, alone in its document at a random place."""
    for pair in draw.pairs:
        planter, depth = draw.planter(), float(draw.rng.random())
        yield draw.case(planter, [pair], [planter.fact(pair, pair.fact, depth)], depth)


def ordering(draw: _Draw) -> Iterator[NeedleCase]:
    """Six facts at random places, asked for in another order: the buffer keeps the document's order."""
    pairs, planter = draw.some(ORDERED), draw.planter()
    needles = [planter.fact(pair, pair.fact, float(draw.rng.random())) for pair in pairs]
    yield draw.case(planter, pairs, sorted(needles, key=lambda needle: needle.start))


def distractors(draw: _Draw) -> Iterator[NeedleCase]:
    """One fact among look-alikes: each of its distractors is written four times at random places."""
    pair, planter = draw.pairs[0], draw.planter()
    needle = planter.fact(pair, pair.fact, float(draw.rng.random()))
    decoys = [planter.fact(pair, text, float(draw.rng.random())) for text in pair.distractors for _ in range(REPEATS)]
    yield draw.case(planter, [pair], [needle], None, decoys)


TASKS: dict[str, Callable[[_Draw], Iterator[NeedleCase]]] = {
    task.__name__: task for task in (single, many, clustered, fading, jigsaw, live, ordering, distractors)
}
ASKED = ("paraphrase", "literal")


def cases(world: World, tasks: list[str], lengths: list[int], seeds: int, asked: list[str]) -> Iterator[NeedleCase]:
    """Every case of a run, shortest documents first. ValueError names an unknown task or way of asking."""
    for name, given, allowed in (("tasks", tasks, TASKS), ("asked", asked, ASKED)):
        for word in given:
            if word not in allowed:
                raise ValueError(f"{name}={word!r}: must be one of {', '.join(allowed)}")
    for length in sorted(lengths):
        for task in tasks:
            for seed in range(seeds):
                for how in asked:
                    yield from TASKS[task](_Draw(world, task, length, seed, how))
