"""What a patched decoder cannot serve exactly is refused."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from tiny_decoders import T, logits, make, proteus, untouched  # noqa: E402 -- after the skip
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from proteus_playground.hf.patch import patched  # noqa: E402

CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
ADDED = torch.zeros(T, T).masked_fill(~CAUSAL, -torch.inf)
MASKS = {
    "values": (ADDED + 0.5 * CAUSAL.float(), "adds values"),
    "small values": (torch.zeros(T, T).masked_fill(~CAUSAL, -9.0), "adds values"),
    "heads": (torch.stack([ADDED] * 5 + [ADDED.masked_fill(~CAUSAL.tril(-9).logical_not(), -torch.inf)]), "heads"),
    "window": (CAUSAL & CAUSAL.triu(-9), "neither causal"),
    "window, added": (ADDED.masked_fill(~CAUSAL.triu(-9), -torch.inf), "neither causal"),
    "blocks": (CAUSAL & ~((torch.arange(T) >= 30)[:, None] & (torch.arange(T) < 30)), "packed sequences"),
    "later tokens": (torch.ones(T, T, dtype=torch.bool), "later tokens"),
    "prefix": (CAUSAL | (torch.arange(T) < 9), "later tokens"),
    "a hole": (CAUSAL & ~((torch.arange(T) == 50)[:, None] & (torch.arange(T) == 8)), "neither causal"),
    "rows of padding": (CAUSAL & ~((torch.arange(T) >= 20)[:, None] & (torch.arange(T) < 20)), "neither causal"),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.bad_input
def test_masks_that_are_refused(llama, ids, kind):
    mask, said = MASKS[kind]
    mask = mask[None] if mask.dim() == 3 else mask[None, None]
    with patched(llama, {1: proteus(0.0)}), pytest.raises(ValueError, match=f"attention_mask of layer 1.*{said}"):
        logits(llama, ids, attention_mask=mask)
    assert untouched(llama)


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_masks_that_only_hide_are_served(llama, ids, lowest):
    mask = torch.zeros(2, 1, T, T).masked_fill(~CAUSAL, lowest)
    mask[1, :, 20:, :20] = lowest  # padding on the left; its own rows read what they like
    mask[1, :, :20] = 0
    native = logits(llama, ids, attention_mask=mask)
    with patched(llama, dict.fromkeys(range(3), proteus(0.0))):
        ours = logits(llama, ids, attention_mask=mask)
    assert_close(ours[0], native[0], atol=1e-4, rtol=0)
    assert_close(ours[1, 20:], native[1, 20:], atol=1e-4, rtol=0)


def test_packed_sequences_are_refused(llama, ids):
    at = torch.cat((torch.arange(30), torch.arange(T - 30)))[None]
    with patched(llama, {0: proteus(0.0)}):
        with pytest.raises(ValueError, match="packed sequences"):
            logits(llama, ids, position_ids=at)
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            logits(llama, ids, cu_seq_lens_q=torch.tensor([0, 30, T]))


def test_positions_that_start_again_in_one_text_are_served(llama, ids):
    at = torch.cat((torch.arange(30), torch.arange(T - 30)))[None].expand(2, -1)
    mask = torch.ones_like(ids)
    native = logits(llama, ids, position_ids=at, attention_mask=mask)
    with patched(llama, dict.fromkeys(range(3), proteus(0.0))):
        assert_close(logits(llama, ids, position_ids=at, attention_mask=mask), native, atol=1e-4, rtol=0)


def test_attention_weights_cannot_be_returned(ids):
    model = make(LlamaForCausalLM, LlamaConfig)  # transformers leaves hooks of its own on it
    with patched(model, {0: proteus(0.0)}), pytest.raises(ValueError, match="output_attentions=True"):
        logits(model, ids, output_attentions=True)


def test_an_attention_that_is_called_twice_is_refused(llama, ids):
    block = llama.model.layers[1]
    again = block.self_attn.register_forward_hook(
        lambda module, args, kwargs, output: module.forward(*args, **kwargs), with_kwargs=True
    )
    try:
        with patched(llama, {1: proteus(0.0)}), pytest.raises(ValueError, match="layer 1 calls its attention twice"):
            logits(llama, ids)
    finally:
        again.remove()
    assert untouched(llama)
