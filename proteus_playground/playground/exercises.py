"""The exercises of the notebooks, one each: what is asked, what is wrong with an answer, hints, a solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isclose, sqrt

import torch

from ..attention.selectors import Selector, check_selector

TOKENS, T4_BYTES = 4096, 15e9


@dataclass(frozen=True)
class Exercise:
    """wrong(answer): "" for a right answer, else a sentence that says what is wrong. because: why it is right."""

    task: str
    wrong: Callable[[object], str]
    because: str
    hints: tuple[str, ...]
    solution: str


def _start(answer) -> str:
    right = TOKENS * (TOKENS + 1) // 2
    return {
        right: "",
        TOKENS**2: "a word reads only the words up to itself, so about half of these.",
        TOKENS * (TOKENS - 1) // 2: "a word reads itself too.",
        TOKENS: "that is what the last word reads; add up all words.",
    }.get(answer, f"{answer!r} is not the sum 1 + 2 + ... + {TOKENS:,}.")


def _wall(answer) -> str:
    if not isinstance(answer, int) or answer < 1 or answer & (answer - 1):
        return f"{answer!r} is no power of two, such as 1024 or 2048."
    table = 8 * answer**2 * 2
    if table > T4_BYTES:
        return f"8 x {answer:,} x {answer:,} scores of 2 bytes are {table / 1e9:.1f} GB, more than the T4's 15 GB."
    if 4 * table <= T4_BYTES:
        return f"the table of {answer:,} tokens has {table / 1e9:.2f} GB; one of twice as many still fits."
    return ""


def _duel(function) -> str:
    if not callable(function):
        return f"{function!r} is no function of a list of losses."
    found, right = float(function([1.0, 3.0])), exp(2)
    if isclose(found, right):
        return ""
    if isclose(found, (exp(1) + exp(3)) / 2):
        return "take the mean of the losses first and the exponential of the mean, not the mean of exponentials."
    if isclose(found, 2.0):
        return "this is the mean loss; the perplexity is its exponential."
    return f"for losses 1 and 3 it gives {found:.3f}; the perplexity is e to the mean loss."


def _gates(function) -> str:
    keys = torch.tensor([[3.0, 0.1], [0.5, 0.4], [-0.2, 1.0]])
    prototypes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    found = torch.as_tensor(function(keys, prototypes))
    if tuple(found.shape) != (3,):
        return (
            f"for 3 keys and 3 prototypes the result has shape {tuple(found.shape)}; it must be one gate per key, (3,)."
        )
    if found.dtype.is_floating_point:
        return "the result holds similarities; a gate is the number of the most similar prototype, a whole number."
    if found.tolist() == (keys @ prototypes.T).argmin(-1).tolist():
        return "it takes the least similar prototype."
    if found.tolist() == (keys @ prototypes.T).argmax(0).tolist():
        return "it finds the best key of each prototype; it must find the best prototype of each key."
    if found.tolist() != [1, 1, 0]:
        return f"the keys (3, 0.1), (0.5, 0.4), (-0.2, 1) go to gates 1, 1, 0; the function says {found.tolist()}."
    return ""


def _million(function) -> str:
    scores = torch.tensor([0.1, 0.7, 0.3, 0.8, 0.9])
    found = torch.as_tensor(function(scores, 3)).tolist()
    if len(found) != 3:
        return f"a buffer of 3 tokens must hold 3 positions; it holds {len(found)}."
    if set(found) == {0, 1, 2}:
        return "these are the first tokens, not those with the best scores."
    if set(found) != {1, 3, 4}:
        return f"of the scores 0.1, 0.7, 0.3, 0.8, 0.9 the best three are at 1, 3, 4; the function says {found}."
    if found != [1, 3, 4]:
        return "the right tokens, but in order of score: the model reads the buffer in the order of the document."
    return ""


def _needles(answer) -> str:
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        return "three texts are needed: fact, question, answer."
    fact, question, word = (str(text).strip() for text in answer)
    if not (fact and question and word):
        return "one of the three texts is empty."
    if word.lower() not in fact.lower():
        return f"the fact does not contain the answer {word!r}."
    if word.lower() in question.lower():
        return f"the question gives the answer {word!r} away."
    shared = sorted({w for w in _words(fact) & _words(question) if len(w) > 3})
    if shared:
        return f"fact and question share {', '.join(shared)}: a search for equal words finds it. Use other words."
    return ""


def _words(text: str) -> set[str]:
    return {"".join(c for c in word if c.isalnum()) for word in text.lower().split()}


def _own(answer) -> str:
    if not isinstance(answer, dict):
        return f"{answer!r} is no dictionary of layers."
    if any(not isinstance(layer, str) for layer in answer):
        return 'JSON has no whole numbers as keys: write the layers as texts, such as "0".'
    if set(answer) != {"0", "1"}:
        return f"the layers are {sorted(answer)}; they must be 0 and 1."
    wrong = {layer: settings for layer, settings in answer.items() if settings != {"shortlist": 512}}
    return f"layer {min(wrong)} has {wrong[min(wrong)]!r}; it must be {{'shortlist': 512}}." if wrong else ""


def _selector(function) -> str:
    chosen = function if isinstance(function, Selector) else Selector("yours", function, "yours")
    try:
        check_selector(chosen)
    except (TypeError, ValueError) as err:
        return f"{err}."
    return ""


def _evidence(function) -> str:
    low, high = (float(x) for x in function(60, 100))
    spread = 1.96 * sqrt(0.6 * 0.4 / 100)
    if low > high:
        return "the lower end comes first."
    if isclose(high - low, 2 * 1.96 * sqrt(0.24), rel_tol=1e-3):
        return "the interval gets narrower with more questions: divide p (1 - p) by their number under the root."
    if isclose(high - low, 2 * sqrt(0.24 / 100), rel_tol=0.02):
        return "this is one standard error to each side; a 95% interval takes 1.96 of them."
    if isclose(high - low, 2 * 1.96 * 0.24 / 100, rel_tol=0.02):
        return "the square root is missing."
    if not (isclose(low, 0.6 - spread, abs_tol=2e-3) and isclose(high, 0.6 + spread, abs_tol=2e-3)):
        return f"for 60 of 100 right it gives {low:.3f} to {high:.3f}; 0.504 to 0.696 is expected."
    return ""


def _int8(function) -> str:
    rows = torch.tensor([[1.0, -2.0, 0.5, 127.0], [0.01, -0.02, 0.0, 0.005]])
    stored, scale = function(rows)
    if tuple(stored.shape) != (2, 4) or stored.dtype != torch.int8:
        return (
            f"the stored rows have shape {tuple(stored.shape)} and type {stored.dtype}; (2, 4) and torch.int8 are due."
        )
    if scale.numel() == 1:
        return "one scale for all rows: the second row becomes 0. Each row needs a scale of its own."
    if scale.numel() != 2:
        return f"there are {scale.numel()} scales for 2 rows; one per row is due."
    if not torch.allclose(scale.flatten(), torch.tensor([1.0, 0.02 / 127])):
        return "a row's scale is its largest absolute value / 127, so that this value is stored as 127 or -127."
    if (stored.float() * scale.reshape(2, 1) - rows).abs().div(scale.reshape(2, 1)).max() > 0.501:
        return "an entry is off by more than half a scale: round to the nearest whole number before the conversion."
    return ""


EXERCISES: dict[str, Exercise] = {
    "start": Exercise(
        f"In dense attention, how many keys do all {TOKENS:,} words of a text read together?", _start,
        "A text twice as long takes four times as many reads; with a shortlist of L, at most L per word.",
        ("The first word reads 1 key, its own. How many does the second one read?",
         "The sum 1 + 2 + ... + n is n (n + 1) / 2."),
        "answer = 4096 * 4097 // 2",
    ),
    "wall": Exercise(
        "8 heads store one score of 2 bytes for each pair of tokens. Which power of two is the longest text whose "
        "table of scores fits into a T4's 15 GB?", _wall,
        "Twice the length needs four times the memory, 17.2 GB, which a T4 does not have.",
        ("The table has 8 x T x T scores.", "Solve 8 x T x T x 2 bytes <= 15e9 bytes for T, and round down to 2^n."),
        "answer = 16384",
    ),
    "duel": Exercise(
        "Write perplexity(losses): the perplexity of a text from the loss of each of its tokens.", _duel,
        "A perplexity of 7 means: as unsure as a choice among 7 equally probable tokens.",
        ("The loss of a token is the negative natural logarithm of its probability.",
         "Perplexity is e to the mean loss."),
        "from math import exp\n\n\ndef perplexity(losses):\n    return exp(sum(losses) / len(losses))",
    ),
    "gates": Exercise(
        "Write lure(keys, prototypes): for each key (T, d) the number of the most similar prototype (C, d).", _gates,
        "Prototypes have length 1, so the largest product is the largest cosine, however long a key is.",
        ("keys @ prototypes.T holds each key's similarity to each prototype, shape (T, C).",
         "argmax(-1) gives the number of the largest entry of each row."),
        "def lure(keys, prototypes):\n    return (keys @ prototypes.T).argmax(-1)",
    ),
    "million": Exercise(
        "Write keep(scores, size): positions of the `size` best scores, in the order of the document.", _million,
        "The buffer has a fixed size, so memory does not grow; the order of the document is kept, so it can be read.",
        ("scores.topk(size).indices gives the best positions, best first.", "Sort them."),
        "def keep(scores, size):\n    return scores.topk(size).indices.sort().values",
    ),
    "needles": Exercise(
        "Write a fact, a question in other words, and the answer.", _needles,
        "No word of more than three letters is shared, so a search for equal words misses this fact.",
        ("The answer stands in the fact and not in the question.",
         "Replace each noun and verb of the question by another word for the same thing."),
        'mine = (\n    "Old Tobias keeps his silver trumpet under the kitchen stairs.",\n'
        '    "Where does the aged musician hide an instrument of precious metal?",\n    "under the kitchen stairs",\n)',
    ),
    "own": Exercise(
        "Write the overrides that give the layers 0 and 1 a shortlist of 512 keys.", _own,
        "All other layers keep the settings of the stanza.",
        ("The keys of the dictionary are layer numbers as texts.",
         "The value of a layer is a dictionary from setting to number."),
        'answer = {"0": {"shortlist": 512}, "1": {"shortlist": 512}}',
    ),
    "selector": Exercise(
        "Write mine(sight, rows): a mask (B, H, R, T), True where a row reads a key, at most L of them.",
        _selector, "It reads no later key and at most L keys, and its choice is always the same.",
        ("A score for each key is enough: sight.best(score, rows) adds the window and keeps within the budget.",
         "sight.q[:, :, rows] @ sight.k.transpose(-1, -2) is the likeness of queries and keys before RoPE."),
        "def mine(sight, rows):\n    return sight.best(sight.q[:, :, rows] @ sight.k.transpose(-1, -2), rows)",
    ),
    "int8": Exercise(
        "Write store(x): the rows x (n, d) as int8 and one scale per row (n,), so that their product is near x.", _int8,
        "No entry is off by more than half a scale, and one large row does not spoil the others.",
        ("The scale of a row is its largest absolute value / 127.", "(x / scale[:, None]).round() are whole numbers."),
        "import torch\n\n\ndef store(x):\n    scale = x.abs().amax(-1) / 127\n"
        "    return (x / scale[:, None]).round().to(torch.int8), scale",
    ),
    "evidence": Exercise(
        "Write interval(right, asked): lower and upper end of the 95% interval of a share of right answers.", _evidence,
        "With 100 questions the share is known to about ±0.10; a difference of 0.05 shows nothing yet.",
        ("The standard error of a share p of n answers is the square root of p (1 - p) / n.",
         "A 95% interval reaches 1.96 standard errors to each side."),
        "def interval(right, asked):\n    p = right / asked\n    spread = 1.96 * (p * (1 - p) / asked) ** 0.5\n"
        "    return p - spread, p + spread",
    ),
}  # fmt: skip
