"""The table of docs/reliability.md: run the tests of each promise, and print how many cases passed.

python tests/reliability.py                                # prints the table
python tests/reliability.py --page docs/reliability.md     # and puts it between the page's marks
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from proteus_playground.common.files import write_text
from proteus_playground.common.machine import environment, markdown

ROOT = Path(__file__).parent.parent
STREAM, STORES, TRAINING = (f"tests/{name}.py" for name in ("streaming/test_stream", "streaming/test_stores_stopped",
                                                            "lm/test_training"))  # fmt: skip
OUTPUTS, INPUT = "tests/common/test_outputs.py", "tests/cli/test_bad_input.py"
HF = [f"tests/hf/test_{name}.py" for name in ("families", "patch", "patch_limits", "cache_limits")]
LIFE = "tests/attention/test_module_life.py"
PROMISES = {
    "50 kills of a stream, then the same buffer": [f"{STREAM}::test_fifty_kills_leave_the_same_buffer"],
    "20 kills of a training, then the same bits": [f"{TRAINING}::test_twenty_kills_at_random_moments_change_nothing"],
    "20 kills of each kind of resumable rows": ["tests/common/test_runs.py", "-k", "kills"],
    "A kill in the middle of a write": [STREAM, STORES, TRAINING, "-k", "kill and not fifty and not twenty"],
    "A full disk": [OUTPUTS, STORES, "-k", "full_disk or half_way or nothing_can_be_written"],
    "Truncated and damaged files of a run": [INPUT, "-k", "truncated or damaged or lost_steps or log_of_events"],
    "Outputs that are no plain file": [OUTPUTS, "-k", "plain_file or refuse or no_file or looked_through"],
    "Links": [OUTPUTS, "-k", "link"],
    "Control tokens in a document or a question": ["tests/hf/test_plain_text.py"],
    "Encodings": ["tests/common/test_encodings.py"],
    "Other people's models, served exactly or refused": [*HF, "-k", "not compiled"],
    "Compiled models, copies and pickles of patched ones": ["tests/hf", "-k", "compiled or copy or pickle or export"],
    "NaN and infinite values": [LIFE, "-k", "bad or finite or hold_anything"],
    "Positions far along, and float64": [LIFE, "-k", "shifted or far_along or float64 or gradcheck"],
    "Compilers and transforms": ["tests/attention/test_compilers.py"],
    "A module's life": [LIFE],
    "Bad input, all together": ["tests", "-m", "bad_input"],
    "Bad input without the two tests that go through all options": [
        "tests",
        "-m",
        "bad_input",
        "-k",
        "not what_is_no_number and not what_is_no_plain_file",
    ],
}


def passed(arguments: list[str]) -> tuple[int, str]:
    """Number of cases that passed, and the seconds. Raises `RuntimeError` where one failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(r"(\d+) passed.* in ([\d.]+)s", last)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(arguments)}: {last}\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    return int(found[1]), found[2]


def put(page: Path, mark: str, text: str) -> None:
    """Writes `text` between the marks `mark` of a Markdown page."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    head, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    rows = []
    for promise, arguments in PROMISES.items():
        cases, seconds = passed(arguments)
        rows.append([promise, f"{cases:,}", seconds, f"`{shlex.join(arguments)}`"])
        print(promise, cases, flush=True, file=sys.stderr)
    on = environment(torch.device("cpu"))
    text = markdown(["what", "cases passed", "s", "arguments of pytest"], rows)
    text += f"\n\n{on['device']}, threads: {on['threads']}, torch {on['torch']}, Python {on['python']}, {on['date']}."
    print(text)
    if "--page" in sys.argv:
        put(Path(sys.argv[sys.argv.index("--page") + 1]), "reliability", text)


if __name__ == "__main__":
    main()
