"""Exercises of the notebooks: empty cells say what to do, each usual mistake is named, each solution is right."""

from __future__ import annotations

import pytest
import torch

from proteus_playground.playground.course import NotYet, check, compare, hint, predict
from proteus_playground.playground.exercises import EXERCISES

SAID = {  # exercise -> code of a wrong answer -> what the check says about it
    "start": {"4096**2": "about half", "4096 * 4095 // 2": "itself", "7": "is not the sum"},
    "wall": {"32768": "17.2 GB", "8192": "twice as many", "10_000": "no power of two"},
    "duel": {"lambda x: sum(map(exp, x)) / len(x)": "mean of the losses first", "lambda x: 1 / 0": "ZeroDivisionError"},
    "gates": {"lambda k, p: (k @ p.T).argmax(0)": "must find the best prototype",
              "lambda k, p: (k @ p.T).max(-1).values": "whole",
              "lambda k, p: k @ p.T": "(3, 3)", "lambda k, p: (k @ p.T).argmin(-1)": "least similar"},
    "million": {"lambda s, n: s.topk(n).indices": "order of score", "lambda s, n: [0, 1, 3]": "best three",
                "lambda s, n: s > 0": "holds 5", "lambda s, n: [0, 1, 2]": "first tokens"},
    "needles": {"('The cat sleeps here.', 'Where is the cat sleeping? here', 'here')": "gives the answer",
                "('Grandma hides money.', 'Who hides cash?', 'Grandma')": "share hides", "('', 'a', 'b')": "empty"},
    "own": {"{0: {'shortlist': 512}}": "as texts", "{'0': {'shortlist': 512}}": "must be 0 and 1",
            "512": "no dictionary", "{'0': 512, '1': 512}": "layer 0 has 512"},
    "selector": {"lambda s, r: s.window(r + 1, 3)": "later", "lambda s, r: s.window(r, 10**6)": "reads"},
    "int8": {"lambda x: (x.to(torch.int8), x.abs().max() / 127)": "one scale for all rows",
             "lambda x: ((x / (s := x.amax(-1) / 127)[:, None]).to(torch.int8), s)": "largest absolute value",
             "lambda x: ((x / (s := x.abs().amax(-1) / 127)[:, None]).to(torch.int8), s)": "round to the nearest",
             "lambda x: (x, x[:, 0])": "torch.int8 are due"},
    "evidence": {"lambda r, n: (r / n, r / n)": "expected", "lambda r, n: (0.551, 0.649)": "1.96"},
}  # fmt: skip


def value(code: str):
    """What an answer's code gives: its value, or the last thing that it defines."""
    from math import exp

    names = {"exp": exp, "torch": torch}
    if "\n" in code or code.split(" ")[0] in ("answer", "mine"):
        exec(code, names)
        return list(names.values())[-1]
    return eval(code, names)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_says_what_is_wrong_and_when_it_is_right(name, capsys):
    with pytest.raises(NotYet, match=r"Replace the \.\.\.") as empty:
        check(name, ...)
    assert empty.value._render_traceback_() == [str(empty.value)]  # one sentence and no traceback
    for code, said in SAID[name].items():
        with pytest.raises(NotYet) as wrong:
            check(name, value(code))
        assert said in str(wrong.value), wrong.value
    check(name, value(EXERCISES[name].solution))
    assert capsys.readouterr().out.startswith("Right. ")
    last = len(EXERCISES[name].hints)
    for number in range(1, last + 1):
        hint(name, number)
        shown = capsys.readouterr().out
        assert shown.startswith(f"Hint {number} of {last}") and EXERCISES[name].solution not in shown
        assert f"hint({name!r}, {number + 1}) gives {'a solution' if number == last else 'the next'}" in shown
    hint(name, last + 1)
    assert EXERCISES[name].solution in capsys.readouterr().out
    hint(name, 0)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="number=-1"):
        hint(name, -1)


def test_a_guess_is_kept_and_compared(capsys):
    for blank, said in ((..., "Guess first"), ("many", "write a number"), (True, "write a number")):
        with pytest.raises(NotYet, match=said):
            predict("keys", blank)
    with pytest.raises(NotYet, match="have not guessed “queries”"):
        compare("queries", 3)
    predict("keys", 100)
    with pytest.raises(NotYet, match="Nothing is measured yet"):
        compare("keys", None)
    capsys.readouterr()
    for measured, said in ((110, "close"), (50, "high, by a factor of 2.0"), (1000, "far apart"), (-1, "far apart")):
        compare("keys", measured)
        assert said in capsys.readouterr().out
    compare("keys", None, instead="Never, up to 512.")
    assert capsys.readouterr().out == "keys\n  your guess: 100\n  measured:   Never, up to 512.\n"


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="name='x': allowed is start, wall"):
        check("x", 1)
