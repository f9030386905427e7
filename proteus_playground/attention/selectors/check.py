"""Whether a function keeps to the rules of selectors, by small random texts; functions from files."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from ..config import AttentionConfig
from ..gates import Gates
from ..rope import rope_frequencies
from .attend import choose
from .protocol import SELECTORS, Choice, Selector, Sight

TOKENS, CUT = 83, 61  # of the texts, and how many of them are the same in all
SHORTLISTS = (12, 25)  # L
CLOSE = 1e-9  # relative; the texts are in float64


@torch.no_grad()
def check_selector(selector: Selector, seed: int = 0) -> None:
    """Raise `TypeError` or `ValueError` that says which rule the selector breaks, and where.

    The rules: a bool mask that broadcasts to (B, H, R, T), with at least one and at most L reads per row, stand-ins
    included, and no later key; the same choice at every call, whichever rows are asked for together; and no choice that
    changes when later tokens change or are left out. `choose` tests the first ones again at every real use.
    """
    for L in SHORTLISTS:
        sights = [_sight(seed, L, tail, tokens) for tail, tokens in ((0, TOKENS), (1, TOKENS), (0, CUT))]
        rows = torch.arange(TOKENS)
        choose(selector, sights[0], rows[:CUT])  # fewer rows than keys, so that axes in another order do not fit
        whole = choose(selector, sights[0], rows)
        sights[0].kept.clear()
        _same(selector, whole, choose(selector, sights[0], rows), rows, "another choice at a second call")
        for part in (rows[7:8], rows[20:50:3], rows[-1:]):
            found = choose(selector, sights[0], part)
            _same(selector, _some(whole, part), found, part, "another choice when other rows are asked for with it")
        early = rows[:CUT]
        for sight, what in zip(sights[1:], ("change", "are left out"), strict=True):
            found = choose(selector, sight, early)
            _same(selector, _some(whole, early), found, early, f"another choice when tokens from {CUT} on {what}")


def _sight(seed: int, shortlist: int, tail: int, tokens: int) -> Sight:
    """2 texts of `tokens` tokens, 4 heads over 2 groups. tail: number of the tokens from `CUT` on."""
    H, G, d = 4, 2, 8
    head, end = (torch.Generator().manual_seed(number) for number in (seed, seed + 1 + tail))
    x = torch.cat([
        torch.randn(2, count, H + 2 * G, d, generator=each, dtype=torch.float64)
        for count, each in ((CUT, head), (TOKENS - CUT, end))
    ], 1)[:, :tokens]  # fmt: skip
    config = AttentionConfig(
        d_model=H * d, n_heads=H, n_kv_heads=G, head_dim=d, shortlist=shortlist, dna_fraction=0.6, gates_per_group=6,
        probes=2, n_anchors=2, route_heads=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        gates = Gates(G, config.gates_per_group, d).eval()
    freq = rope_frequencies(d, 10_000.0)
    return Sight.of(*x.split((H, G, G), dim=2), config, inv_freq=freq, gates=gates)


def _some(choice: Choice, rows: Tensor) -> Choice:
    notes = choice.stand_ins
    return Choice(choice.keys[:, :, rows], None if notes is None else type(notes)(*(x[:, :, rows] for x in notes)))


def _same(selector: Selector, one: Choice, two: Choice, rows: Tensor, what: str) -> None:
    """Raise `ValueError` at the first row whose two choices differ."""
    T = min(one.keys.shape[-1], two.keys.shape[-1])
    differ = (one.keys[..., :T] != two.keys[..., :T]).flatten(0, 1)  # (B H, R, T)
    spot = differ.any(0).nonzero()
    if len(spot):
        row, key = spot[0].tolist()
        raise ValueError(f"selector {selector.name!r}: row {int(rows[row])} makes {what} (the first such key is {key})")
    sums = [_sums(choice, one.keys.shape[:3]) for choice in (one, two)]
    apart = ((sums[0] - sums[1]).abs() > CLOSE * (1 + sums[0].abs())).flatten(0, 1).any(-1).any(0).nonzero()
    if len(apart):
        raise ValueError(f"selector {selector.name!r}: row {int(rows[apart[0, 0]])} makes {what} (of stand-ins)")


def _sums(choice: Choice, shape: torch.Size) -> Tensor:
    """Numbers that tell stand-ins apart, whatever their order: sums of count, count x key and count x value."""
    if choice.stand_ins is None:
        return torch.zeros(*shape, 1, dtype=torch.float64)
    key, value, count = (x.double() for x in choice.stand_ins)
    return torch.cat((count[..., None], count[..., None] * key, count[..., None] * value), dim=-1).sum(-2)


def load_selector(place: str) -> Selector:
    """The selector of "FILE.py:NAME", checked. NAME is a function of a Sight and rows, or the name it registers.

    The file is run as a Python program would be. Raises `ValueError` for a place without such a function, and as
    `check_selector`.
    """
    file, colon, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not colon or path.suffix != ".py" or not path.is_file():
        raise ValueError(f"selector={place!r}: must be FILE.py:NAME, with a Python file that is there")
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as err:
        raise ValueError(f"selector={place!r}: the file cannot be run ({type(err).__name__}: {err})") from err
    made = [one for one in SELECTORS.values() if getattr(one.choose, "__globals__", None) is vars(module)]
    choose_keys = getattr(module, name, None)
    found = next((one for one in made if one.name == name or one.choose is choose_keys), None)
    if found is None:
        if not callable(choose_keys):
            raise ValueError(f"selector={place!r}: {path.name} has no function {name!r}")
        found = Selector(name, choose_keys, (choose_keys.__doc__ or name).strip().split("\n")[0])
    check_selector(found)
    return found
