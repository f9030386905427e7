"""A small Llama and two rows of tokens, where a file of tests has none of its own; and the same on a GPU."""

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


@pytest.fixture
def model():
    from test_cache import built

    return built("llama").to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def texts(model):
    from test_cache import T
    from tiny_decoders import VOCABULARY

    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1)).to(model.device)
