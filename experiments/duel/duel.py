"""The duel: a dense and a Proteus model are trained in turns on the same text, batches and schedule.

Both have the same width, heads and depth, and start from equal weights where shapes agree; Proteus also has a router.
Dense trains at alpha 0, Proteus first at alpha 0 and then at a random alpha in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path

import torch
from torch import Tensor

from ...common.files import check_folder
from ...common.processes import place
from ...common.progress import Stop
from ...lm.training import Step, read_log, train
from ...lm.training.data import Bytes, Codec, TextBatches, windows
from ...lm.training.look import look
from .curve import held_out_loss
from .files import Score, add_scores, claim, read_scores, write_report
from .settings import ARMS, PRESETS, DuelSettings, pick_text, split, start

__all__ = ["ARMS", "PRESETS", "Score", "DuelSettings", "Turn", "duel", "read_scores", "write_report"]


@dataclass(frozen=True)
class Turn:
    """One step of one arm."""

    arm: str
    step: Step
    steps: int  # that each arm takes in all
    scores: tuple[Score, ...]  # one per alpha if the held-out text was read after this step, else empty
    known: bool  # an earlier run took this step


def duel(
    settings: DuelSettings, out: str | Path, *, device: str | torch.device = "cpu", precision: str = "auto",
    codec: Codec | None = None, stop: Stop | None = None,
) -> Iterator[Turn]:  # fmt: skip
    """Train both arms in turns, each step of dense followed by the same step of Proteus. Known steps come first.

    out: a folder; the same call goes on there after a stop or a kill, and at the end it holds both models. codec: bytes
    by default. Raises `ValueError` for a folder of another duel or a text that is too short, `Stopped`, `OSError`.
    """
    out, codec = Path(out), codec or Bytes()
    check_folder(out, "out")
    text = pick_text(settings.text)
    tokens = torch.tensor(codec.encode(text.body), dtype=torch.int32)
    device = torch.device(device)
    settings = claim(out, settings, text, codec, tokens, device, precision)
    return _turns([_Arm(name, settings, tokens, codec, out, device, precision, stop) for name in ARMS], out, device)


def _turns(arms: list[_Arm], out: Path, device: torch.device) -> Iterator[Turn]:
    try:
        for turns in zip(*(arm.turns() for arm in arms), strict=True):
            yield from turns
        for arm in arms:
            arm.finish()
    finally:
        for arm in arms:
            arm.training.close()
        if place()[0] == 0:
            write_report(out, device)


class _Arm:
    """One model, its training, and the steps and scores that earlier runs saved."""

    def __init__(
        self, name: str, settings: DuelSettings, tokens: Tensor, codec: Codec, out: Path, device: torch.device,
        precision: str, stop: Stop | None,
    ):  # fmt: skip
        train_on, held_out = split(tokens)
        self.name, self.settings, self.codec, self.device = name, settings, codec, device
        self.out = out
        self.model = start(settings, name, codec.vocab_size)
        self.windows = windows(held_out, settings.length, settings.held_out)
        batches, recipe = TextBatches(train_on, codec.vocab_size, settings.seed), settings.recipe(name)
        self.training = train(
            self.model, batches, recipe, folder=out / name, every=max(5, settings.steps // 50), device=device,
            precision=precision, stop=stop,
        )  # fmt: skip
        self.past = read_log(out / name)
        self.scores = {(score.step, score.alpha): score for score in read_scores(out) if score.arm == name}
        self.alphas = (0.0,) if name == "dense" else (0.0, 1.0)
        self.due = {round(settings.steps * (i + 1) / settings.scored) for i in range(settings.scored)}

    def turns(self) -> Iterator[Turn]:
        for step in self.past:
            scores = self._known(step.step)
            if step is self.past[-1] and len(scores) < len(self.alphas):
                scores = self._score(step)
            yield Turn(self.name, step, self.settings.steps, scores, known=True)
        for step in self.training:
            yield Turn(self.name, step, self.settings.steps, self._score(step), known=False)

    def finish(self) -> None:
        if place()[0] == 0:
            self.model.save(self.out / f"{self.name}.safetensors")

    def _known(self, step: int) -> tuple[Score, ...]:
        return tuple(self.scores[step, alpha] for alpha in self.alphas if (step, alpha) in self.scores)

    def _score(self, step: Step) -> tuple[Score, ...]:
        """Scores at every alpha if they are due after this step; only the first process computes them."""
        if step.step not in self.due or place()[0]:
            return ()
        scores = tuple(self._read(step.step, alpha) for alpha in self.alphas)
        add_scores(self.out, scores)
        return scores

    @torch.no_grad()
    def _read(self, step: int, alpha: float) -> Score:
        texts = self.windows.to(self.device)
        prompt = texts[:1, : min(48, self.settings.length)]
        with self.model.eval().settings(flux_alpha=alpha):
            loss = held_out_loss(self.model, texts, self.settings.tokens)
            seen = look(self.model, texts[:1, :-1])
            written = self.model.generate(prompt, self.settings.sample, temperature=0.8, seed=self.settings.seed)
            sample = self.codec.decode(torch.cat([prompt[0], *written]).tolist())
        return Score(self.name, step, alpha, loss, exp(loss), sample=sample, **asdict(seen))
