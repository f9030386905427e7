"""One sentence for each picture of the workbench, made from the numbers in the picture; and numbers as words."""

from __future__ import annotations

import numpy as np

from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE, LayerView, RowView

NAMED = 4  # opened gates that are named; more are counted
KIND_WORDS = {LOCAL: "the window", ANCHOR: "the anchors", DNA: "rings", NOTE: "notes"}


def shown(token: str) -> str:
    """A token without its surrounding spaces; line breaks and tabs as arrows, and "space" where nothing is left."""
    return token.strip(" ").replace("\n", "↵").replace("\t", "⇥") or "space"


def token_name(tokens: list[str], index: int) -> str:
    """`'soup' (734)`."""
    return f"‘{shown(tokens[index])}’ ({index:,})"


def percent(share: float) -> str:
    """A share in 0..1 as whole per cent."""
    if 0 < share < 0.01:
        return "under 1%"
    return f"{share:.0%}"


def quantity(value: float, unit: str) -> str:
    """`3.2 GFLOP`: three digits and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def duration(seconds: float) -> str:
    """`45 s` or `12 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def listed(words: list[str]) -> str:
    """`7, 19 and 30`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def heads_sentence(view: LayerView, head: int) -> str:
    if view.head_map_kind == "routing weight":
        woke = view.awake.mean(0)
        most = int(woke.argmax())
        other = "no head woke more often" if most == head else f"head {most} woke most often ({percent(woke[most])})"
        said = f"Head {head} woke for {percent(woke[head])} of the tokens; {other}."
        return f"{said} The brighter a cell, the more the head's output counts."
    rows = view.awake & view.kept[:, None]
    away = np.where(rows, view.head_map, 0).sum(0) / np.maximum(rows.sum(0), 1)
    most, least = int(away.argmax()), int(away.argmin())
    return (
        f"Head {head} gives {percent(away[head])} of its attention to keys other than anchors; "
        f"head {most} gives most ({percent(away[most])}), head {least} least ({percent(away[least])})."
    )


def gates_sentence(row: RowView, tokens: list[str]) -> str:
    if row.asleep or not row.gates_opened:
        why = "reads nothing here" if row.asleep else "opened no gate, so it reads no ring"
        return f"The query of {token_name(tokens, row.token)} {why}."
    gates = [str(gate) for gate in row.gates_opened]
    which = f"gate {gates[0]}" if len(gates) == 1 else f"gates {listed(gates)}"
    if len(gates) > NAMED:
        which = f"{len(gates)} gates"
    rings = "its ring" if len(gates) == 1 else "their rings"
    from_rings = int((row.kind == DNA).sum())
    notes = f", and {row.notes_read} notes" if row.notes_read else ""
    keys = f"{from_rings} key" + ("" if from_rings == 1 else "s")
    name = token_name(tokens, row.token)
    return f"The query of {name} opened {which}. It reads {keys} from {rings}{notes}."


def shares(row: RowView) -> str:
    """`86% to rings, 9% to the anchors and 5% to the window`."""
    if row.asleep:
        return "nothing, it sleeps"
    found = [(float(row.weight[row.kind == kind].sum()), word) for kind, word in KIND_WORDS.items()]
    found = sorted((share for share in found if share[0] > 0), reverse=True)
    return listed([f"{percent(share)} to {word}" for share, word in found]) if found else "nothing"


def two_heads_sentence(view: LayerView, other: LayerView) -> str:
    """Which head differs most."""
    apart = np.abs(view.head_map - other.head_map).mean(0)
    most = int(apart.argmax())
    return f"B minus A, for each head: head {most} differs most ({percent(float(apart[most]))} on average)."


def same_heads_sentence(view: LayerView, other: LayerView) -> str:
    """Why B is shown alone, where its heat map less that of A would be empty or would mean nothing."""
    if view.head_map_kind != other.head_map_kind:
        return f"The picture is that of B alone, because that of A shows {other.head_map_kind}."
    if view.head_map_kind == "routing weight":
        return "A and B show the same here: which heads wake does not depend on the keys that are read."
    return "A and B show the same here: their heads give the anchors equal attention."


def row_sentence(row: RowView, tokens: list[str]) -> str:
    name = token_name(tokens, row.token)
    if row.asleep:
        return f"Head {row.head} computed nothing for {name}: the head slept or the token was skipped."
    shares = [(float(row.weight[row.kind == kind].sum()), word) for kind, word in KIND_WORDS.items()]
    shares = sorted((share for share in shares if share[0] > 0), reverse=True)
    most = int(row.weight.argmax())
    where = listed([f"{percent(share)} to {word}" for share, word in shares])
    top = f"{token_name(tokens, most)}, {percent(row.weight[most])}"
    return f"At {name}, head {row.head} gives {where}. The key with most attention is {top}."


def text_sentence(view: LayerView, row: RowView, tokens: list[str]) -> str:
    skipped = int((~view.kept).sum())
    gone = f"{skipped:,} of {len(tokens):,} tokens are skipped (struck through)" if skipped else "No token is skipped"
    read = int(((row.kind > 0) & (row.kind != NOTE)).sum())
    keys = f"{read:,} key" + ("" if read == 1 else "s")
    noted = f" and {row.notes_read} notes" if row.notes_read else ""
    unseen = int((row.kind[: row.token + 1] == 0).sum())
    hidden = f" and does not see {unseen:,}" if unseen else ""
    return (
        f"{gone}; {token_name(tokens, row.token)} reads {keys}{noted} of the {row.token + 1:,} tokens so far{hidden}."
    )
