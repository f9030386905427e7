"""The likeliest next tokens before and after a change, as bars in HTML."""

from __future__ import annotations

from html import escape

from proteus_playground.playground.views import NextTokens

from ..parts.sentences import shown, token_name
from ..parts.terms import with_terms

NONE = (
    "There is no next token to show, because this layer is random or the model has sliding windows. The output error "
    "above says what changed."
)
HOW = (
    "In every layer only this token's query reads as the controls say. The tokens before it were read densely, as when "
    "a prompt is read densely and the answer is written sparsely."
)


def bars_html(request: int, seen: NextTokens, tokens: list[str], token: int) -> str:
    """A table with two bars for each word. `aria-label` says the first three in a sentence."""
    first, second = seen.names
    lines = "".join(
        f'<tr><th scope="row">{escape(shown(word))}</th>{_bar(before, "pp-before")}{_bar(after, "pp-after")}</tr>'
        for word, before, after in zip(seen.words, seen.before, seen.after, strict=True)
    )
    said = sentence(seen)
    return (
        f'<div class="pp-next" data-request="{request}" role="img" aria-label="{escape(said)}">'
        f"<b>What comes after {escape(token_name(tokens, token))}: KL {_nats(seen.kl)}</b>"
        f'<p title="{escape(HOW)}">{with_terms(said)}</p><table><tr><th></th><th scope="col">{escape(first)}</th>'
        f'<th scope="col">{escape(second)}</th></tr>{lines}</table></div>'
    )


def sentence(seen: NextTokens) -> str:
    """The likeliest token before and after the change."""
    first, second = seen.names
    was, now = (int(p.argmax()) for p in (seen.before, seen.after))
    top = f"‘{shown(seen.words[was])}’, {seen.before[was]:.0%}"
    if was == now:
        return f"Likeliest with {first}: {top}; with {second} still, {seen.after[now]:.0%}."
    return f"Likeliest with {first}: {top}; with {second}: ‘{shown(seen.words[now])}’, {seen.after[now]:.0%}."


def _nats(kl: float) -> str:
    return f"{kl:.3f} nats" if kl >= 0.0005 else "under 0.001 nats"


def _bar(share: float, name: str) -> str:
    return f'<td><i class="{name}" style="width:{100 * share:.1f}px"></i>{share:.1%}</td>'


def no_bars_html(why: str) -> str:
    return f'<div class="pp-next"><b>What comes next</b><p>{with_terms(why)}</p></div>'
