"""A small Llama and two rows of tokens, where a file of tests has none of its own."""

import pytest
import torch


@pytest.fixture(scope="module")
def llama():
    from tiny_decoders import make
    from transformers import LlamaConfig, LlamaForCausalLM

    return make(LlamaForCausalLM, LlamaConfig)


@pytest.fixture(scope="module")
def ids():
    from tiny_decoders import VOCABULARY, T

    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1))
