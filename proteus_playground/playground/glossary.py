"""The words that the playground teaches, one plain sentence each.

`docs/glossary.md` is written from here: `python -m proteus_playground.playground.glossary > docs/glossary.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Term:
    """One taught word. Its picture is `docs/img/glossary/{slug}.svg`."""

    word: str
    sentence: str
    field_term: str  # what papers call it
    code: tuple[str, ...]  # names that it has in the code

    @property
    def slug(self) -> str:
        return self.word.lower().replace(" ", "-")


TERMS = (
    Term(
        "ASPA",
        "Adaptive Sparse Proto Attention: an attention layer in which each token uses only a few heads and each "
        "query reads only a few of the earlier tokens.",
        "sparse attention with a mixture of attention heads",
        ("ProteusAttention", "AttentionConfig"),
    ),
    Term(
        "head",
        "One of several units that work side by side in an attention layer: for each token it compares a query "
        "with the keys of the tokens so far and returns a weighted mean of their values.",
        "attention head",
        ("n_heads",),
    ),
    Term(
        "KV group",
        "Several heads that share one set of keys and values; each of these heads has its own queries.",
        "grouped-query attention (GQA)",
        ("n_kv_heads",),
    ),
    Term(
        "gate",
        "A gate collects keys that are alike: it has one prototype, holds the keys closest to it, and belongs to "
        "one head.",
        "router expert, inverted list",
        ("Gates", "gates_per_group"),
    ),
    Term(
        "prototype",
        "The typical direction of the keys that a gate collects: their running average, scaled to length 1.",
        "centroid, codeword",
        ("gates.prototypes",),
    ),
    Term(
        "lure",
        "A gate lures a key if its prototype is more similar to the key than any other prototype of the KV group; "
        "each key goes to exactly one gate.",
        "nearest-centroid assignment",
        ("gates.lure",),
    ),
    Term(
        "probe",
        "A query probes: it opens the few gates whose prototypes match it best, and reads keys from them.",
        "IVF nprobe",
        ("probes", "gates.probe"),
    ),
    Term(
        "salience",
        "How strongly a token is lured: how similar its key is to the closest prototype, times how similar that "
        "gate's keys usually are to it.",
        "router score",
        ("salience",),
    ),
    Term(
        "flux alpha",
        "The main slider of a layer: at 0 every query reads every earlier token, at 1 it reads at most a fixed "
        "number of keys, and in between that number shrinks smoothly.",
        "sparsity level",
        ("flux_alpha",),
    ),
    Term(
        "keep ratio",
        "The largest share of the tokens that take part in a layer; the least salient tokens are skipped.",
        "token pruning",
        ("keep_ratio",),
    ),
    Term(
        "shortlist",
        "The most that one query may read: keys of window, anchors and rings, and notes, counted together.",
        "candidate set, KV budget",
        ("shortlist",),
    ),
    Term(
        "window",
        "The newest keys, ending at the query's own token; a query always reads all of them.",
        "local attention, sliding window",
        ("Budget.window",),
    ),
    Term("anchor", "One of the first tokens of the text, which every query reads.", "attention sink", ("n_anchors",)),
    Term(
        "DNA fraction",
        "The share of the shortlist that is spent on gates, whose keys may be any distance away; the rest goes to "
        "window and anchors.",
        "retrieval budget",
        ("dna_fraction",),
    ),
    Term(
        "ring",
        "A gate's newest keys outside the window; a query that opens the gate reads them one by one.",
        "bounded inverted list",
        ("Budget.ring",),
    ),
    Term(
        "note",
        "The mean key and the mean value of those keys of a gate that a query does not read one by one; reading a "
        "note counts as one read.",
        "cluster centroid with pooled value",
        ("notes",),
    ),
    Term(
        "Top-P",
        "For each token, heads wake in order of their probability until the probabilities add up to P; the other "
        "heads sleep.",
        "nucleus routing",
        ("head_top_p",),
    ),
    Term(
        "Top-A",
        "A filter for the next word: it keeps the candidates whose output vectors point in a direction similar to "
        "what the awake heads have found.",
        "agreement filter",
        ("TopA",),
    ),
    Term(
        "balance",
        "A correction that makes over-used heads wake less often; it changes which heads wake, but not how much "
        "an awake head counts.",
        "loss-free load balancing",
        ("balance_rate",),
    ),
    Term(
        "expert",
        "A small feed-forward network that runs only for the tokens that are routed to it.",
        "mixture of experts (MoE)",
        ("n_experts",),
    ),
    Term(
        "controller",
        "A program that adjusts heads, shortlist or flux alpha between calls until a target for density, time or "
        "memory is met.",
        "budget controller",
        ("SparseHeadController",),
    ),
    Term(
        "shelf",
        "A made-up text of short documents with known facts, so that answers about it can be marked right or wrong.",
        "synthetic retrieval task",
        ("shelf",),
    ),
    Term(
        "INT8",
        "Numbers stored as whole numbers from -127 to 127 with one scale per row; this takes about half the "
        "memory of 16-bit numbers.",
        "KV-cache quantisation",
        ("int8",),
    ),
    Term(
        "backend",
        "The code that computes the attention; backends differ in speed and in the hardware that they need, but "
        "not in the result.",
        "kernel",
        ("backend",),
    ),
    Term(
        "KV bank",
        "A memory of fixed size for a layer that writes text: it holds the window, the anchors, and each gate's "
        "ring and note.",
        "bounded KV cache",
        ("KVBank", "ProteusCache"),
    ),
    Term(
        "chunked shortlist",
        "A way to read very long documents: chunk by chunk, the best tokens are kept in a buffer, and attention "
        "then reads the buffer alone.",
        "two-pass token selection",
        ("proteus stream",),
    ),
    Term(
        "champion",
        "A token that scored high enough to enter the buffer; a token with a better score may push it out later.",
        "top-k entry",
        ("Champions",),
    ),
    Term(
        "content match",
        "How well a token's key fits the queries of the prompt, regardless of how far away the token is.",
        "late interaction, retrieval heads",
        ("hf.scorer",),
    ),
)


@cache
def by_word() -> dict[str, Term]:
    return {term.word: term for term in TERMS}


@cache
def by_code() -> dict[str, Term]:
    """Terms by each of their names in the code."""
    return {name: term for term in TERMS for name in term.code}


def sentence(word: str) -> str:
    """What `word` means. ValueError where the glossary does not have it."""
    if word not in by_word():
        raise ValueError(f"word={word!r}: allowed is {', '.join(by_word())}")
    return by_word()[word].sentence


def markdown() -> str:
    """The page `docs/glossary.md`."""
    head = """# Glossary

The words that the playground teaches, in an order in which each builds on those before it. The panels show the same
sentences as tooltips.

In the pictures a square is a token of the text, the newest one on the right; the dark square is the token whose query
reads. Blue is the window, orange an anchor, green a ring, pink a note; grey tokens are not read.

<!-- Written by: python -m proteus_playground.playground.glossary > docs/glossary.md -->
"""
    return head + "".join(map(_entry, TERMS))


def _entry(term: Term) -> str:
    code = ", ".join(f"`{name}`" for name in term.code)
    return (
        f"\n## {term.word}\n\n![{term.word}](img/glossary/{term.slug}.svg)\n\n{term.sentence}\n\n"
        f"*In papers:* {term.field_term}. *In the code:* {code}.\n"
    )


if __name__ == "__main__":
    print(markdown(), end="")
