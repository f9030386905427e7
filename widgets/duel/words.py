"""What the duel panel says: the numbers of both arms, what they wrote, and where the slider is."""

from __future__ import annotations

from html import escape
from os.path import commonprefix

from proteus_playground.experiments.duel.duel import Score

from ..workbench.readout import _cell, _key
from .figure import DENSE, PROTEUS
from .record import Record

LOSS_LEGEND = (
    _key(DENSE, "dense", line=True) + _key(PROTEUS, "Proteus", line=True)
    + f'<span style="color:{DENSE}">● held out</span>'
    f'<span style="color:{PROTEUS}">◆ held out, α = 1</span><span style="color:{PROTEUS}">◇ α = 0</span>'
)  # fmt: skip
CURVE_LEGEND = _key(PROTEUS, "Proteus", line=True) + f'<span style="color:{DENSE}">⋯ dense</span>'


def name_of(score: Score) -> str:
    return "dense" if score.arm == "dense" else f"Proteus, α = {score.alpha:g}"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def numbers_html(request: int, record: Record) -> str:
    """The arms side by side; a dash where nothing is known yet."""
    dense, proteus = record.arms["dense"], record.arms["proteus"]
    newest = {name_of(score): score for score in record.newest()}

    def last(values: list, form: str) -> str:
        return format(values[-1], form) if values else "–"

    def held_out(name: str, below: str, tip: str) -> str:
        score = newest.get(name)
        return _cell(f"{name}", "–" if score is None else f"{score.perplexity:.3f}", below, tip)

    keys = newest.get("Proteus, α = 1")
    reads = "perplexity" if keys is None else f"perplexity, reads {keys.density:.0%}"
    held = "on text that training never saw"
    budget = f"{record.settings.shortlist} for texts of {record.settings.length} tokens"
    cells = [
        _cell("step", f"{record.step:,}", f"of {record.steps:,}" if record.steps else "", "Steps of each arm."),
        _cell("tokens", last(dense.tokens, ",d"), "each arm, the same ones", "Tokens that each arm was trained on."),
        _cell("loss", last(dense.calm_loss, ".3f"), f"Proteus {last(proteus.calm_loss, '.3f')}",
              "Training loss of dense, nats per token, smoothed; Proteus's is at the α drawn for each step."),
        _cell("tokens/s", last(dense.calm_speed, ",.0f"), f"Proteus {last(proteus.calm_speed, ',.0f')}",
              "Tokens that dense trains on in a second on this machine; measured."),
        held_out("dense", "perplexity, reads all", f"The dense model's perplexity per token {held}."),
        held_out("Proteus, α = 0", "perplexity, reads all", f"Proteus's, read densely, {held}."),
        held_out("Proteus, α = 1", reads, f"Proteus's, with a shortlist of {budget}, {held}."),
    ]  # fmt: skip
    return f'<div class="pp-readout" data-request="{request}">{"".join(cells)}</div>'


def progress_sentence(record: Record, seconds: float, done: int) -> str:
    """seconds: since training began or went on; done: steps taken since."""
    left = (record.steps - record.step) * seconds / max(1, done)
    return f"step {record.step:,} of {record.steps:,}" + (f", {minutes(left)} left" if done > 1 else "")


def verdict(record: Record) -> str:
    """Who is ahead on text that training never saw."""
    newest = record.newest()
    if len(newest) < 3:
        return "Held-out text is read a few times while they train; then they also write something."
    dense, _, sparse = newest
    off = sparse.perplexity / dense.perplexity - 1
    where = "as good as dense" if abs(off) < 0.0005 else f"{abs(off):.1%} {'worse' if off > 0 else 'better'} than dense"
    return (
        f"After {record.tokens_at(sparse.step):,} tokens: at α = 1 Proteus reads {sparse.density:.0%} of the keys and "
        f"is {where}, perplexity {sparse.perplexity:.3f} against {dense.perplexity:.3f}."
    )


def slider_sentence(record: Record, alpha: float) -> str:
    loss = record.loss_at(alpha)
    if loss is None:
        return "Measured once training is over."
    measured = any(point.alpha == alpha for point in record.curve)
    how = "measured" if measured else "between two measured points"
    return f"α {alpha:.2f}: held-out loss {loss:.3f} ({how})."


def samples_html(request: int, scores: list[Score]) -> str:
    """What each wrote after the same words."""
    if not scores:
        return f'<div class="pp-samples" data-request="{request}"><p class="pp-more">Nothing is written yet.</p></div>'
    given = commonprefix([score.sample for score in scores]) if len(scores) > 1 else ""
    cards = "".join(
        f'<div class="pp-sample pp-{score.arm}"><b>{escape(name_of(score))}, after step {score.step:,}</b>'
        f"<p><i>{escape(given)}</i>{escape(score.sample[len(given) :])}</p></div>"
        for score in scores
    )
    return f'<div class="pp-samples" data-request="{request}" tabindex="0">{cards}</div>'
