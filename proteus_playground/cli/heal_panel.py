"""The panel of `proteus heal`: one frame in the terminal, redrawn in place. Without a terminal, a line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import exp
from time import monotonic

from ..hf.healing.history import gap_of
from ..hf.healing.plan import spoken
from ..hf.healing.session import gate_entropy
from ..hf.healing.training import Step, Training

LINE_SECONDS = 10.0  # between two lines where there is no terminal


class Panel:
    """Shows steps inside a `with` block. over: whether its `seconds` have passed."""

    def __init__(self, training: Training, seconds: float | None = None, console=None):
        from rich.console import Console

        self.training, self.console = training, console or Console()
        self._ends, self._line_at = None if seconds is None else monotonic() + seconds, 0.0
        self._live, self._gap, self._speed = None, None, 0.0

    @property
    def over(self) -> bool:
        return self._ends is not None and monotonic() >= self._ends

    def __enter__(self) -> Panel:
        from rich.live import Live

        if self.console.is_terminal and self.training.accelerator.is_main_process:
            self._live = Live(console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No panel meanwhile, so that a menu can ask."""
        if self._live is not None:
            self._live.stop()
        yield
        if self._live is not None:
            self._live.start()

    def show(self, step: Step) -> None:
        """Draw a step."""
        if not self.training.accelerator.is_main_process:
            return
        self._gap = gap_of(step) if step.held_out else self._gap
        self._speed = step.tokens_per_second if not self._speed else 0.9 * self._speed + 0.1 * step.tokens_per_second
        if self._live is not None:
            self._live.update(self._frame(step))
        elif step.held_out or monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = monotonic()
            self.console.print(
                ", ".join(f"{name} {value}" for name, value in self.values(step).items()), soft_wrap=True
            )

    def _frame(self, step: Step):
        from rich.panel import Panel as Frame
        from rich.table import Table

        table = Table.grid(padding=(0, 3))
        cells = [f"[bold]{value}[/] {name}" for name, value in self.values(step).items()]
        for i in range(0, len(cells), 3):
            table.add_row(*cells[i : i + 3])
        return Frame(table, title="proteus heal", subtitle="Ctrl-C: menu")

    def values(self, step: Step) -> dict[str, str]:
        """What the panel says of a step, by name."""
        training = self.training
        layer = next(iter(training.student.layers.values()))
        at, heads = training.position, layer.config.n_heads
        shown = {
            "stage": step.stage, "step": f"{step.step:,}", "of the stage": f"{at.tokens / training.stage.tokens:.0%}",
            "tokens a row": f"{step.length:,}", "tokens/s": f"{step.tokens_per_second:,.0f}",
            "loss": f"{step.loss:.4f}", "KL": f"{step.kl:.4f}",
            "perplexity": f"{exp(min(50.0, step.cross_entropy)):.2f}" if step.cross_entropy else "-",
            "flux alpha": f"{step.alpha:.2f}, at most {step.ceiling:.2f}", "reads per query": f"up to {step.reads:.0f}",
            "heads awake": f"{'some' if layer.config.route_heads else heads} of {heads}",
            "gate entropy": f"{gate_entropy(training.student.layers):.2f}",
            "time left": spoken(training.left / max(1e-9, self._speed) / 60),
        }  # fmt: skip
        return shown | ({} if self._gap is None else {"held-out gap": f"{self._gap:.4f}"})
