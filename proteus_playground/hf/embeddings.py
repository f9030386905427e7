"""A pulled model's vocabulary with one row per entry: what a token is before any layer has looked around it.

These are its input embeddings and not its first layer's keys: with a fact about a soup planted in Python's manual, that
layer's own queries ranked the fact's words behind 10,000 others of 100,000, since they look for grammar.
"""

from __future__ import annotations

import numpy as np

from .models import list_models


class PulledWords:
    """The tokenizer and the input embeddings of a pulled model; its layers are not loaded.

    `vocabulary[i]` is what token i reads as, `table` `(V, D)` float32 its embedding. `ValueError` where the model is
    not pulled or keeps its embeddings under another name.
    """

    random = False

    def __init__(self, name: str):
        from safetensors import safe_open
        from tokenizers import Tokenizer

        info = next((info for info in list_models() if info.name == name), None)
        if info is None:
            raise ValueError(f"name={name!r} is not pulled: run `proteus models pull {name}` first")
        self.model, self.name = name, "input embeddings"
        # The file itself and not AutoTokenizer: importing transformers takes longer than all the rest.
        self._tokenizer = Tokenizer.from_file(str(info.path / "tokenizer.json"))
        with safe_open(info.path / "model.safetensors", framework="pt") as file:
            found = [key for key in file.keys() if key.endswith("embed_tokens.weight")]  # noqa: SIM118 - no mapping
            if not found:
                raise ValueError(f"name={name!r}: its weights hold no embed_tokens.weight")
            self.table = file.get_tensor(found[0]).float().numpy()
        every = [[token] for token in range(len(self.table))]
        self.vocabulary = self._tokenizer.decode_batch(every, skip_special_tokens=False)

    def encode(self, body: str) -> np.ndarray:
        """Token ids `(n,)` int32, without what a tokenizer puts in front of a text."""
        return np.array(self._tokenizer.encode(body, add_special_tokens=False).ids, np.int32)
