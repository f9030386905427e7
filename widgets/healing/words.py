"""The healing panel's words: what is trained on what, the tiles, and how far the gap has fallen."""

from __future__ import annotations

from proteus_playground.hf.healing.plan import Plan
from proteus_playground.hf.own.folder import Folder

from ..parts.html import cell, key, no_tiles_html, tiles_html
from ..parts.sentences import duration, listed, percent
from .figure import BEFORE, EARLIER, NOW
from .record import Record

LEGEND = (
    '<div class="pp-legend">' + key(BEFORE, "before healing", line=True) + key(EARLIER, "earlier", line=True)
    + key(NOW, "now", line=True) + "</div>"
)  # fmt: skip
STAGE_TIP = (
    "A and D move the prototypes to the keys of the text and change no weight; B and C train adapters. The share is "
    "that of the plan's tokens."
)


def note(folder: Folder, plan: Plan) -> str:
    """What is trained on which texts, and where the gap is measured."""
    what = "all weights are" if plan.adapter is None else f"adapters of rank {plan.adapter.rank} are"
    shown = [f"“{source}”" for source in plan.data.held_out] or ["the last part of each text"]
    sources = listed([f"“{source}”" for source in plan.data.sources])
    return (
        f"Healing of “{folder.path.name}” (base “{folder.stanza.base.model}”): {what} trained on {sources}, so that "
        f"the model predicts with few keys what it predicts with all. The gap is the loss per token on held-out text "
        f"({listed(shown)}) with few keys, less that of the untouched model with all."
    )


def numbers_html(number: int, record: Record, share: float, left: float | None) -> str:
    """The tiles. share: how much of the plan's tokens is read; left: seconds, None while that is not known."""
    step = record.last
    if step is None:
        return no_tiles_html(number, "Nothing is trained yet: press Start.")
    trains = bool(record.calm) and bool(step.loss)
    cells = [
        cell("stage", step.stage, f"{percent(share)} of the plan", STAGE_TIP),
        cell("step", f"{step.step:,}", f"{step.read:,} tokens", "Steps of the optimiser, and tokens of text read."),
        cell("tokens/s", f"{step.tokens_per_second:,.0f}", f"rows of {step.length:,}",
             "Tokens per second in the last step, measured on this machine."),
        cell("loss", f"{record.calm[-1]:.3f}" if trains else "–", "smoothed",
             "KL divergence plus the weighted distance of the attention outputs, smoothed over steps."),
        cell("KL", f"{step.kl:.3f}" if trains else "–", "nats per token",
             "KL divergence of the sparse pass's next token from the dense pass's, in the last step."),
        cell("α", f"{step.alpha:.2f}", f"at most {step.ceiling:.2f}",
             "Flux alpha of the last step, drawn anew for each pass below a limit that rises."),
        cell("reads per query", f"{step.reads:,.0f}", "at most, in training",
             "Keys and notes that a query could read in the last step; L is drawn anew for each pass."),
        cell("time left", "–" if left is None else duration(left), "with measuring",
             "At the speed since the last start, measurements of held-out text included."),
        *_measured(record),
    ]  # fmt: skip
    return tiles_html(number, cells)


def _measured(record: Record) -> list[str]:
    if not record.curves:
        return []
    now = record.curves[-1]
    first = "" if record.before is None else f"{record.before.gap:.3f} before"
    return [
        cell("gap", f"{now.gap:.3f}", first, "Mean of the gaps on held-out text, nats per token."),
        cell("dense loss", f"{now.dense:.3f}", f"untouched {now.base:.3f}",
             "Loss on held-out text with all keys, nats per token: of the trained model, and of the untouched one. "
             "The trained model should not become worse."),
    ]  # fmt: skip


def verdict(record: Record) -> str:
    """How far the gap has fallen with the fewest keys."""
    before = record.before
    if before is None:
        return "The gap is measured before the first step, and then every quarter of a minute."
    share, reads = before.shares[0], before.reads[0]
    with_few = f"With 1/{share} of the keys ({reads:.0f} reads per query)"
    if not record.curves:
        return f"{with_few} the gap is {before.gaps[0]:.3f} nats per token before healing."
    now = record.curves[-1]
    change = (
        f"was {before.gaps[0]:.3f} nats per token before healing and is {now.gaps[0]:.3f} after {now.read:,} tokens"
    )
    fallen = f": {percent(1 - now.gaps[0] / before.gaps[0])} of it is gone" if 0 < now.gaps[0] < before.gaps[0] else ""
    return f"{with_few} the gap {change}{fallen}."
