"""`proteus bench tiny`: train tiny-english, a small model with dense attention, from the first weight.

It comes with the package, so that a laptop without a GPU can open, convert and heal a model in minutes. Its tokenizer
is made from the same texts. It was never trained with the slider.
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from ...common.files import new_folder, write_json
from ...common.machine import environment, fast_dtype
from ...common.options import Device, Folder, Seed, pick_device
from ...common.texts import load_text

VOCABULARY = 2048
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
CONTEXT = 1024
END = "<|end|>"
HELD_OUT = 0.01  # of each text, its end


def new_tokenizer(bodies: list[str]):
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, made from texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    words.train_from_iterator(bodies, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, model_max_length=CONTEXT)


def new_model(seed: int):
    """The model with random weights, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows_at(ids: Tensor, starts: Tensor) -> Tensor:
    """Rows of CONTEXT + 1 ids that begin at `starts` (B,): `(B, CONTEXT + 1)`."""
    return ids[starts[:, None] + torch.arange(CONTEXT + 1, device=ids.device)]


def loss_of(model, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model, ids: Tensor, rows: int = 32) -> float:
    """The loss on rows that lie evenly over held-out `ids`."""
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, rows, device=ids.device).long()
    return torch.stack([loss_of(model, rows_at(ids, start[None])) for start in starts]).mean().item()


def train(model, ids: Tensor, steps: int, batch: int, rate: float, seed: int, seconds: float) -> int:
    """AdamW with a warm-up and a linear fall of the rate; returns the steps done when they or `seconds` were over."""
    weights = [w for w in model.parameters() if w.dim() > 1], [w for w in model.parameters() if w.dim() <= 1]
    groups = [{"params": weights[0], "weight_decay": 0.1}, {"params": weights[1], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    source, ends = torch.Generator().manual_seed(seed), monotonic() + seconds
    kind, dtype = ids.device.type, fast_dtype(ids.device)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for step in range(steps):
            done = max(step / steps, 1 - (ends - monotonic()) / seconds)
            if done >= 1:
                return step
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 200) * (1 - done)
            starts = torch.randint(len(ids) - CONTEXT - 1, (batch,), generator=source).to(ids.device)
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, rows_at(ids, starts))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            bar.update()
    return steps


def tiny_command(
    text: Annotated[list[str], typer.Option(help="Text to train on. May be repeated.")],
    out: Folder,
    steps: Annotated[int, typer.Option(help="Most optimiser steps.", min=1)] = 6000,
    batch: Annotated[int, typer.Option(help="Rows of a step, each of 1,024 tokens.", min=1)] = 64,
    rate: Annotated[float, typer.Option(help="Largest learning rate.", min=1e-6)] = 3e-3,
    seconds: Annotated[float, typer.Option(help="Stop after so many seconds.", min=1)] = 120.0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train the small model that comes with the package, with its tokenizer."""
    dev = pick_device(device)
    bodies = [load_text(name).body for name in text]
    words = new_tokenizer(bodies)
    parts = [torch.tensor(words(body, add_special_tokens=False, verbose=False)["input_ids"]) for body in bodies]
    cuts = [int(len(part) * (1 - HELD_OUT)) for part in parts]
    ids = torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)]).to(dev)
    kept = torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)]).to(dev)
    if min(len(ids), len(kept)) <= CONTEXT + 1:
        raise typer.BadParameter(
            f"the texts have {len(ids) + len(kept):,} tokens: must have more than {CONTEXT / HELD_OUT:,.0f}",
            param_hint="--text",
        )
    model = new_model(seed).to(dev)
    done = train(model, ids, steps, batch, rate, seed, seconds)
    model.eval()
    about = {"benchmark": "tiny", **environment(dev), "seed": seed, "steps": done, "batch": batch, "rate": rate}
    about |= {"texts": [Path(name).name for name in text], "tokens": len(ids), "read": done * batch * CONTEXT}
    about |= {"held_out_loss": round(held_out_loss(model, kept), 4)}
    with new_folder(out, "--out") as part:
        model.half().save_pretrained(part)
        words.save_pretrained(part)
        write_json(part / "recipe.json", about)
    typer.echo(
        f"{out}: {done:,} steps of {batch * CONTEXT:,} tokens, {len(ids):,} different ones; held-out loss "
        f"{about['held_out_loss']:.3f} nats per token"
    )


if __name__ == "__main__":
    typer.run(tiny_command)
