"""What the notebooks' exercises are made of: a guess that is compared later, a check that says what is wrong, hints.

A cell that still holds `...` raises `NotYet`, which a notebook shows as one sentence instead of a traceback.
"""

from __future__ import annotations

from ..common.checks import whole_number
from .exercises import EXERCISES, Exercise

_GUESSES: dict[str, float] = {}


class NotYet(Exception):
    """Nothing is filled in, or the answer is not right; the message says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [str(self)]


def predict(what: str, value) -> None:
    """Keeps a guess for `compare`. Raises `NotYet` while `value` is `...` or no number."""
    if value is ...:
        raise NotYet(f"Guess first: replace the ... by a number for “{what}”, and run this cell again.")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NotYet(f"The guess for “{what}” is {value!r}: write a number, for instance 100.")
    print(f"Written down: {value:,.6g} for “{what}”.")
    _GUESSES[what] = value


def compare(what: str, measured: float | None, instead: str = "") -> None:
    """Prints the guess of `what` beside the measurement, and how far they are apart. `NotYet` where one is missing.

    instead: a sentence in place of the measurement where one was made but gave no number; "" for none.
    """
    if what not in _GUESSES:
        raise NotYet(f"You have not guessed “{what}” yet: fill in the cell with predict(...) above, and run it.")
    if not measured and measured != 0:
        if instead:
            print(f"{what}\n  your guess: {_GUESSES[what]:,.6g}\n  measured:   {instead}")
            return
        raise NotYet(f"Nothing is measured yet for “{what}”: use the panel above first, then run this cell again.")
    guess = _GUESSES[what]
    print(f"{what}\n  your guess: {guess:,.6g}\n  measured:   {measured:,.6g}")
    ratio = max(guess / measured, measured / guess) if guess * measured > 0 else float("inf")
    if guess == measured or ratio <= 1.25:
        print("  Your guess was close.")
    elif ratio <= 3:
        print(f"  Your guess was {'high' if guess > measured else 'low'}, by a factor of {ratio:.1f}.")
    else:
        print("  The guess and the measurement are far apart: which assumption was wrong?")


def check(name: str, answer) -> None:
    """Says that `answer` solves the exercise `name`, or raises `NotYet` with what is wrong."""
    exercise = _exercise(name)
    if answer is ...:
        raise NotYet(f"{exercise.task}\nReplace the ... by your answer. hint({name!r}, 1) gives a first hint.")
    try:
        wrong = exercise.wrong(answer)
    except NotImplementedError:
        wrong = "the function is not written yet."
    except Exception as err:  # the visitor's own function, or an answer of another kind
        wrong = f"it stopped with {type(err).__name__}: {err}"
    if wrong:
        raise NotYet(f"Not yet: {wrong} hint({name!r}, 1) gives a hint.")
    print(f"Right. {exercise.because}")


def hint(name: str, number: int = 1) -> None:
    """Prints a hint of an exercise, from 1 on; a number larger than the number of hints prints a solution, 0 nothing.

    Raises `ValueError` for an unknown exercise or a number below 0, `TypeError` for another kind of number.
    """
    exercise = _exercise(name)
    whole_number("number", number, 0)
    hints = exercise.hints
    if number == 0:
        return
    if number > len(hints):
        print(f"A solution:\n\n{exercise.solution}")
        return
    after = "a solution" if number == len(hints) else "the next hint"
    print(f"Hint {number} of {len(hints)}: {hints[number - 1]}\nhint({name!r}, {number + 1}) gives {after}.")


def _exercise(name: str) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"name={name!r}: allowed is {', '.join(EXERCISES)}")
    return EXERCISES[name]
