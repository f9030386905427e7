"""BM25, a rival at equal buffer size: windows of the document, ranked by the words they share with the question.

The library bm25s ranks, Snowball makes the stems. Windows overlap by half, so that a short fact lies whole in one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .haystacks import Words, read

if TYPE_CHECKING:
    from .cases import NeedleCase, PlantedStore

STRIDE = 32  # tokens
WINDOW = 2 * STRIDE


def stems(texts: list[str]) -> list[list[str]]:
    """The stems of each text's content words, as BM25 compares them. ImportError without the `verify` extra."""
    try:
        import bm25s
        import snowballstemmer
    except ImportError as err:
        raise ImportError(f"BM25 needs the verify extra: pip install 'proteus-playground[verify]' ({err})") from err
    stemmer = snowballstemmer.stemmer("english")
    return bm25s.tokenize(texts, stopwords="english_plus", stemmer=stemmer, return_ids=False, show_progress=False)


class WindowIndex:
    """Ranks the windows of one haystack for many cases; only windows that a case has changed are stemmed again."""

    def __init__(self, tokens: np.ndarray, words: Words):
        self._words = words
        self._stems = stems([read(tokens[at : at + WINDOW], words) for at in range(0, len(tokens), STRIDE)])

    def rank(self, store: PlantedStore, case: NeedleCase, seed: int) -> np.ndarray:
        """Each position of the document once, best window first; windows that share no word come last, shuffled."""
        import bm25s

        total = -(-case.length // STRIDE)
        texts = self._stems[:total]
        changed = {at // STRIDE for start, ids in case.written for at in range(start, start + len(ids))}
        changed |= {at - 1 for at in changed} | {total - 2, total - 1}  # the last windows end with the document
        changed = sorted(at for at in changed if 0 <= at < total)
        spans = [(at * STRIDE, min(at * STRIDE + WINDOW, case.length)) for at in changed]
        fresh = stems([read(store.read(*span), self._words) for span in spans])
        for at, text in zip(changed, fresh, strict=True):
            texts[at] = text
        index, asked = bm25s.BM25(), stems([case.prompt])[0]
        index.index(texts, show_progress=False)
        score = index.get_scores(asked) if asked else np.zeros(total)
        tie = np.random.default_rng(seed).permutation(total)
        order = np.lexsort((np.where(score > 0, np.arange(total), tie), -score))
        return _positions(order, case.length)


def _positions(order: np.ndarray, length: int) -> np.ndarray:
    """The positions of the windows in `order`, each where it first occurs: `(length,)`."""
    halves = np.stack([order, order + 1], axis=1).ravel()  # a window is two strides
    _, first = np.unique(halves, return_index=True)
    halves = halves[np.sort(first)]
    tokens = (halves[:, None] * STRIDE + np.arange(STRIDE)).ravel()
    return tokens[tokens < length]
