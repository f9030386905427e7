"""What the suite examines: a language model, or a random layer that shows the chance level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...hf.plain_text import text_ids
from ...streaming.pipeline import Scorer
from .answers import Reader
from .haystacks import Words

LAYER = "layer"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Subject:
    """Everything that the suite needs from a model."""

    name: str
    note: str  # one sentence for the report
    words: Words
    scorer: Callable[[str], Scorer]  # prompt -> scorer
    reader: Reader | None  # None if it cannot answer
    device: str
    dtype: str


def load(
    name: str, device: str = "cpu", cache: Path | None = None, dtype: str = "float32", answers: bool = True
) -> Subject:
    """A subject by name: "layer", or a pulled model. ValueError for another name or dtype.

    cache: a file for the keys of chunks, by content. dtype: "float32", "bfloat16" or "float16"; bfloat16 halves the
    time on a CPU with AVX512-BF16 or AMX. answers: whether the model will also be asked to answer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed is {', '.join(DTYPES)}")
    return _layer() if name == LAYER else _model(name, device, cache, dtype, answers)


def _layer(seed: int = 0) -> Subject:
    import torch

    from ...attention import AttentionConfig, ProteusAttention
    from ...streaming.layer_scorer import LayerScorer
    from ...streaming.random_words import WIDTH, RandomWords

    words = RandomWords()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        attn = ProteusAttention(AttentionConfig(d_model=WIDTH, n_heads=4, n_kv_heads=2, head_dim=16)).eval()

    class WordScorer:
        def __init__(self, prompt: str):
            ids = words.encode(prompt)
            labels = [words.vocabulary[i].strip() for i in ids]
            self._inner = LayerScorer(attn, torch.from_numpy(words.table[ids]), labels)
            self.fingerprint, self.explain = self._inner.fingerprint, self._inner.explain

        def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self._inner.score(words.table[rows])

    # Part of a run's settings: with other words, folders of earlier runs could not go on.
    note = ("One attention layer with random weights over whole words: its recall is what chance gives, and it cannot "
            "answer.")  # fmt: skip
    return Subject("random layer", note, words, WordScorer, None, "cpu", "float32")


def _model(name: str, device: str, cache: Path | None, dtype: str, answers: bool) -> Subject:
    import torch

    from ...hf import opening
    from ...hf.chat import ChatReader
    from ...hf.scorer import Asker

    model, tokenizer = opening.load(name, device, getattr(torch, dtype))
    asker = Asker(model, tokenizer, opening.base_name(name), cache=cache)
    note = f"{opening.title(name)} scores tokens by content match in heads (layer.head) {asker.heads_named}."
    slow = model.device.type == "cpu" and model.dtype != torch.float32  # a step of one token takes five times as long
    reader = ChatReader(opening.load(name)[0] if slow else model, tokenizer) if answers else None
    return Subject(opening.title(name), note, TokenWords(tokenizer), asker.ask, reader, str(model.device), dtype)


class TokenWords:
    """A model's tokenizer as `Words`."""

    def __init__(self, tokenizer):
        every = [[token] for token in range(len(tokenizer))]
        self._tokenizer = tokenizer
        self.vocabulary = tokenizer.batch_decode(every, clean_up_tokenization_spaces=False)

    def encode(self, body: str) -> np.ndarray:
        return np.array(text_ids(self._tokenizer, body, add_special_tokens=False), np.int32)
