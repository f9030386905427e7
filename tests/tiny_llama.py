"""A Llama of three layers over a handful of words, for tests that need a language model and its tokenizer."""

from __future__ import annotations

WORDS = [
    "the",
    "soup",
    "was",
    "cold",
    "and",
    "a",
    "humble",
    "token",
    "waited",
    "on",
    "page",
    "five",
    "for",
    "somebody",
    "who",
    "would",
    "read",
    "it",
    "again",
]


def build(seed: int = 0, **sizes):
    """(model in evaluation mode, tokenizer): random weights, 6 heads over 2 KV groups of 8 features."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: at for at, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **dict(
            vocab_size=len(WORDS) + 1,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
        | sizes
    )
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def family(kind: str, seed: int = 0, **sizes):
    """A tiny causal language model of the family `kind`, in evaluation mode; norms' weights are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **dict(bos_token_id=1, eos_token_id=None, pad_token_id=0) | sizes)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn_like(weight)
        elif weight.dim() == 2:
            weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
