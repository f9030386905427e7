"""The course's notebooks in a real browser: cells run, one thing is moved, an exercise is wrong, then right."""

from __future__ import annotations

import driver
import pytest

from proteus_playground.playground.exercises import EXERCISES

pytestmark = pytest.mark.slow
READY_MS = 120_000
DONE = """() => document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status === 'idle'
  && ![...document.querySelectorAll('.jp-InputPrompt')].some((e) => e.textContent.includes('*'))"""
SMALL = {  # notebook -> (in the source, in the test)
    "01_the_wall": ("wall_panel()", 'wall_panel(device="cpu", lengths=[128, 256], limit_s=0.5)'),
    "05_needles": ("needle_panel()", 'needle_panel("layer")'),
    "06_your_own_model": ('("tiny-english", "quick", 180)', '("tiny-english", "quick", 1)'),
    "07_write_your_own_selector": ("cases=20", "cases=1"),
}
WRONG = {"wall": "answer = 32768", "selector": "def mine(sight, rows):\n    return sight.window(rows + 1, 4)"}


@pytest.fixture(scope="module", params=SMALL)
def notebook(request, lab, folder):
    """(page, its name), with a smaller panel, after every cell has run."""
    book, (old, new) = folder / "notebooks" / f"{request.param}.ipynb", SMALL[request.param]
    text = book.read_text(encoding="utf-8")
    old, new = (words.replace('"', '\\"') for words in (old, new))
    assert old in text
    book.write_text(text.replace(old, new), encoding="utf-8")
    page, address = lab
    driver.start_all(page, address, f"notebooks/{book.name}")
    page.wait_for_function(DONE, timeout=READY_MS)
    return page, request.param


def panel(page, name: str):
    """Starts a panel, waits for its end, and returns its readout."""
    page.locator(f'.pp-{name} button:has-text("Start")').click()
    page.wait_for_selector(f".pp-{name} .pp-done", timeout=READY_MS)
    return page.locator(f".pp-{name} .pp-readout")


def run(page, cell, code: str) -> str:
    """Replaces the code of a cell, runs it, and returns what it prints."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    page.wait_for_function(DONE, timeout=READY_MS)
    page.wait_for_timeout(300)
    return cell.locator(".jp-OutputArea").inner_text()


def test_a_notebook_of_the_course(notebook, shots):
    page, name = notebook
    said = page.locator(".jp-Notebook").inner_text()  # cells with ... say what to do, and nothing else went wrong
    assert "Guess first: replace the ..." in said and "hint(" in said and "Traceback" not in said
    if name == "01_the_wall":
        assert "256" in panel(page, "wall").inner_text() and "Proteus" in page.locator(".pp-wall").inner_text()
        before = page.locator(".pp-wall .pp-readout").inner_text()
        page.locator(f".pp-wall .pp-knob-shortlist {driver.HANDLE}").focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("(old) => document.querySelector('.pp-wall .pp-readout').innerText !== old", arg=before)
        page.wait_for_selector(".pp-wall .pp-done", timeout=READY_MS)
        page.locator(".pp-wall").screenshot(path=shots / "wall.png")
    elif name == "05_needles":
        assert "24" in panel(page, "needles").inner_text()
        page.locator(".pp-needles").screenshot(path=shots / "needles-live.png")
    elif name == "06_your_own_model":
        assert "equal logits: True" in said and "gap" in panel(page, "healing").inner_text()
        assert "nats per token before healing and is" in page.locator(".pp-healing .pp-said").inner_text()
        page.locator(".pp-healing").screenshot(path=shots / "healing.png")
    exercise = {"01_the_wall": "wall", "05_needles": "needles", "06_your_own_model": "own"}.get(name, "selector")
    cell = page.locator(".jp-CodeCell").filter(has_text=f'check("{exercise}"').last
    start = "from proteus_playground.playground.course import check, hint\n"
    solution = EXERCISES[exercise].solution
    made = "answer" if exercise in ("wall", "own") else "mine"
    if exercise in WRONG:
        assert "Not yet" in run(page, cell, f'{start}{WRONG[exercise]}\n\ncheck("{exercise}", {made})')
    assert "Right." in run(page, cell, f'{start}{solution}\n\ncheck("{exercise}", {made})')
    assert page.complaints == []
