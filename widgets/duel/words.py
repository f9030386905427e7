"""The duel panel's words: the tiles of both models, what they wrote, and the loss at the slider."""

from __future__ import annotations

from html import escape
from os.path import commonprefix

from proteus_playground.experiments.duel.duel import Score

from ..parts.html import cell, key, tiles_html
from ..parts.sentences import duration
from .figure import DENSE, PROTEUS
from .record import Record

LEGENDS = {
    "loss": key(DENSE, "dense", line=True) + key(PROTEUS, "Proteus", line=True)
    + f'<span style="color:{DENSE}">● held out</span>'
    f'<span style="color:{PROTEUS}">◆ held out, α = 1</span><span style="color:{PROTEUS}">◇ α = 0</span>',
    "curve": key(PROTEUS, "Proteus", line=True) + f'<span style="color:{DENSE}">⋯ dense</span>',
    "text": "",
}  # fmt: skip


def name_of(score: Score) -> str:
    return "dense" if score.arm == "dense" else f"Proteus, α = {score.alpha:g}"


def numbers_html(request: int, record: Record) -> str:
    """Both models side by side; a dash where nothing is known yet."""
    dense, proteus = record.arms["dense"], record.arms["proteus"]
    newest = {name_of(score): score for score in record.newest()}

    def last(values: list, form: str) -> str:
        return format(values[-1], form) if values else "–"

    def held_out(name: str, below: str, tip: str) -> str:
        score = newest.get(name)
        return cell(name, "–" if score is None else f"{score.perplexity:.3f}", below, tip)

    keys = newest.get("Proteus, α = 1")
    reads = "perplexity" if keys is None else f"perplexity, reads {keys.density:.0%}"
    held = "on held-out text, which training never uses"
    budget = f"{record.settings.shortlist} for texts of {record.settings.length} tokens"
    cells = [
        cell("step", f"{record.step:,}", f"of {record.steps:,}" if record.steps else "",
              "Training steps of each model."),
        cell("tokens", last(dense.tokens, ",d"), "the same for both", "Tokens that each model was trained on."),
        cell("loss", last(dense.calm_loss, ".3f"), f"Proteus {last(proteus.calm_loss, '.3f')}",
              "Loss on the training text in nats per token, smoothed. For Proteus, each step draws its α at random."),
        cell("tokens/s", last(dense.calm_speed, ",.0f"), f"Proteus {last(proteus.calm_speed, ',.0f')}",
              "Tokens per second in training, measured on this machine."),
        held_out("dense", "perplexity, reads all", f"The dense model's perplexity per token {held}."),
        held_out("Proteus, α = 0", "perplexity, reads all",
                 f"Proteus's perplexity per token at α = 0, where it reads every key, {held}."),
        held_out("Proteus, α = 1", reads, f"Proteus's perplexity per token with a shortlist of {budget}, {held}."),
    ]  # fmt: skip
    return tiles_html(request, cells)


def progress_sentence(record: Record, seconds: float, done: int) -> str:
    """seconds: since training began or was resumed; done: steps taken since then."""
    rest = (record.steps - record.step) * seconds / max(1, done)
    return f"step {record.step:,} of {record.steps:,}" + (f", {duration(rest)} left" if done > 1 else "")


def verdict(record: Record) -> str:
    """Both perplexities on held-out text, compared."""
    newest = record.newest()
    if len(newest) < 3:
        return "A few times in training, both models read held-out text, which training never uses, and write a sample."
    dense, _, sparse = newest
    off = sparse.perplexity / dense.perplexity - 1
    where = "as good as dense" if abs(off) < 0.0005 else f"{abs(off):.1%} {'worse' if off > 0 else 'better'} than dense"
    return (
        f"After {record.tokens_at(sparse.step):,} tokens: at α = 1 Proteus reads {sparse.density:.0%} of the keys and "
        f"is {where}, perplexity {sparse.perplexity:.3f} against {dense.perplexity:.3f}."
    )


def slider_sentence(record: Record, alpha: float) -> str:
    """Held-out loss at the slider's α."""
    loss = record.loss_at(alpha)
    if loss is None:
        return "Measured when training is over."
    measured = any(point.alpha == alpha for point in record.curve)
    how = "measured" if measured else "between measured points"
    return f"α {alpha:.2f}: loss {loss:.3f} ({how})."


def samples_html(request: int, scores: list[Score]) -> str:
    """What each model wrote after the same words."""
    if not scores:
        empty = '<p class="pp-more">No sample has been written yet.</p>'
        return f'<div class="pp-samples" data-request="{request}">{empty}</div>'
    given = commonprefix([score.sample for score in scores]) if len(scores) > 1 else ""
    cards = "".join(
        f'<div class="pp-sample pp-{score.arm}"><b>{escape(name_of(score))}, after step {score.step:,}</b>'
        f"<p><i>{escape(given)}</i>{escape(score.sample[len(given) :])}</p></div>"
        for score in scores
    )
    return f'<div class="pp-samples" data-request="{request}" tabindex="0">{cards}</div>'
