"""A small run that several training tests share; as a program, one that hangs in a write, or one rank of several."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from proteus_playground import AttentionConfig
from proteus_playground.common.processes import together
from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.training import Batch, Recipe, Stage, train


class Echo:
    """Texts whose second half repeats the first; row i of batch n is text n * sequences + i."""

    vocab_size = 32

    def __init__(self, seed: int = 0):
        self.seed = seed

    def batch(self, index, sequences, length):
        rows = []
        for row in range(index * sequences, (index + 1) * sequences):
            half = torch.randint(0, 32, (length // 2 + 1,), generator=torch.Generator().manual_seed(self.seed + row))
            rows.append(torch.cat([half, half])[: length + 1])
        ids = torch.stack(rows)
        return Batch(ids[:, :-1], ids[:, 1:].clone())


def model(seed: int = 0, **attention) -> ProteusLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "shortlist": 16, "gates_per_group": 4}
    return ProteusLM(ModelConfig(32, 2, AttentionConfig(**{**sizes, "heads_awake_max": 1, **attention})))


def recipe(tokens: int = 96, **changes) -> Recipe:
    stages = (Stage((24,), tokens, 5, 0.0), Stage((24, 48), tokens, 7, (0.0, 1.0), top_share=0.3))
    return Recipe(**{"stages": stages, "warmup": 3, "lr": 3e-3, **changes})


LONG = (Stage((24,), 96, 40, 0.0), Stage((24, 48), 96, 30, (0.0, 1.0), top_share=0.3))


def hang_while_writing(folder: Path, saves: int) -> None:
    """Train, and stop for good when the state of save number `saves` is written but has not taken its name."""
    replace, seen = os.replace, []

    def stuck(part, path):
        if str(path).endswith("state.safetensors"):
            seen.append(path)
            if len(seen) == saves:
                print("writing", flush=True)
                sys.stdin.read()
        replace(part, path)

    os.replace = stuck
    list(train(model(), Echo(), recipe(), folder=folder, save_seconds=0))


def train_long(folder: Path, step: Callable[[], None]) -> None:
    """Train, and save after every step; `step` is called as each begins."""
    torch.set_num_threads(1)
    batch = Echo.batch

    def told(self, *sizes):
        step()
        return batch(self, *sizes)

    Echo.batch = told
    list(train(model(), Echo(), recipe(stages=LONG), folder=folder, save_seconds=0, every=4))


def rank(folder: Path) -> None:
    """Train with half of the tokens a step; the first process writes the weights it ends with."""
    with together(torch.device("cpu")) as (number, _):
        lm = model(seed=number)  # the second one's weights must not count
        list(train(lm, Echo(), recipe(48), folder=folder / "run", every=3))
        lm.save(folder / f"{number}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "hang":
        hang_while_writing(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        rank(Path(sys.argv[2]))
