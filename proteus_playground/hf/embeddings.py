"""The vocabulary of a model with the input embedding of each token.

Input embeddings are used and not the keys of the first layer, because those match grammar. With a fact about a soup
planted in Python's manual, the first layer's queries ranked 10,000 of 100,000 tokens above the words of the fact.
"""

from __future__ import annotations

import numpy as np

from .opening import files_of

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")  # what families call their input embeddings


class PulledWords:
    """The tokenizer and the input embeddings of a model; its layers are not loaded.

    `vocabulary[i]` is the text of token i, `table[i]` of `table` `(V, D)` float32 its embedding. Raises `ValueError`
    if the model is not pulled or its embeddings have another name.
    """

    random = False

    def __init__(self, name: str):
        from safetensors import safe_open
        from tokenizers import Tokenizer

        folder = files_of(name)
        self.model, self.name = name, "input embeddings"
        # Not AutoTokenizer: importing transformers takes longer than everything else here.
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # splits them as text
        self.table = None
        for part in folder.glob("*.safetensors"):
            with safe_open(part, framework="pt") as file:
                found = [key for key in file.keys() if key.endswith(EMBEDDINGS)]  # noqa: SIM118 - no mapping
                if found:
                    self.table = file.get_tensor(found[0]).float().numpy()
        if self.table is None:
            raise ValueError(f"name={name!r}: its weights hold none of {', '.join(EMBEDDINGS)}")
        every = [[token] for token in range(len(self.table))]
        self.vocabulary = self._tokenizer.decode_batch(every, skip_special_tokens=False)

    def encode(self, body: str) -> np.ndarray:
        """Token ids `(n,)` int32, without special tokens; those in the text stay text."""
        return np.array(self._tokenizer.encode(body, add_special_tokens=False).ids, np.int32)
