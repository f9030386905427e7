"""Writes a converted model into a folder to keep: slider and adapter alone, or one checkpoint for transformers.

Like a conversion, an export is written under a hidden name and renamed at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from ..common import __version__
from ..common.files import new_folder, write_json, write_text
from . import models
from .fetch import progress_bars
from .healing.plan import Plan
from .own.folder import BASELINE, GATES, PLAN, Folder, open_folder, read_folder
from .own.stanza import ALONE, read_config
from .weights import weights_of

Say = Callable[[str], None]


def export(folder: str | Path, out: str | Path, *, merged: bool = False, say: Say = print) -> Path:
    """Write the folder `out` from a converted one, and return it.

    merged: one checkpoint in the base's dtype, with all weights, gates and the tokenizer, which
    `AutoModelForCausalLM.from_pretrained` opens after `import proteus_playground.hf`, or with `trust_remote_code=True`.
    Otherwise a few megabytes: settings, gates and adapter, which this package opens where the base is. Raises
    `ValueError` for a folder of another kind or where `out` is in use, `OSError`.
    """
    found = read_folder(folder)
    if not merged and found.healed is not None:
        raise ValueError(
            f"merged=False: healing changed all weights of {str(found.path)!r}; only merged=True holds them"
        )
    with new_folder(out, "out") as part:
        _write_merged(found, part) if merged else _write_alone(found, part)
        write_text(part / "README.md", card(found, merged))
    out = Path(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"{out}: {size / 1e6:.1f} MB. {_how(out.name, merged)}")
    return out


def _write_merged(found: Folder, part: Path) -> None:
    from .own.wrapped import with_slider

    weights = weights_of(found.healed or found.base_path())
    slider = open_folder(found.path, dtype=getattr(torch, weights.dtype))
    model = with_slider(slider.model, replace(slider.stanza, base=None), slider.gates)
    with progress_bars(False):
        model.save_pretrained(part)
    slider.tokenizer.save_pretrained(part)


def _write_alone(found: Folder, part: Path) -> None:
    """The stanza, with the base by hash, in a file of its own: this folder is no checkpoint."""
    base = replace(found.stanza.base, copied=False)
    write_json(part / ALONE, replace(found.stanza, base=base).to_dict())
    shutil.copyfile(found.gates_file, part / GATES)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if found.adapter is not None:
            shutil.copyfile(found.adapter / name, part / name)


def card(found: Folder, merged: bool) -> str:
    """The model card: what it is, how it opens, data, stages, figures, licence of the base."""
    base, settings = found.stanza.base, found.stanza.settings
    trained = "with an adapter" if found.adapter else "with all weights trained" if found.healed else "not healed"
    return f"""---
base_model: {base.model}
library_name: transformers
tags: [proteus, sparse-attention]
---

# {found.path.name}

{base.model} with a slider, {trained}. Layers {", ".join(map(str, found.stanza.layers))} read a shortlist of keys; flux
alpha is {settings.flux_alpha:g}, L is {settings.shortlist}, with {settings.gates} gates per KV group. Made by
proteus-playground {__version__} with torch {torch.__version__} and transformers {version("transformers")}.

```python
{_how(found.path.name, merged)}
```

## Licence of the base

{_licence(base.model)}

## Data and stages

{_stages(found)}

## Figures

{_figures(found)}
"""


def _how(name: str, merged: bool) -> str:
    if merged:
        return (
            f'import proteus_playground.hf; model = AutoModelForCausalLM.from_pretrained("{name}"); '
            "model(ids, flux_alpha=0.5)"
        )
    return f'from proteus_playground.hf.own.folder import open_folder; slider = open_folder("{name}")'


def _licence(model: str) -> str:
    pulled = {info.name: info.licence for info in models.list_models()}
    if model in pulled:
        return pulled[model]
    return "The files of the base model do not state it. Look it up where you got them: it holds for this model too."


def _stages(found: Folder) -> str:
    lines = []
    for run in found.runs:
        if (run / PLAN).is_file():
            plan = Plan.read(run / PLAN)
            lines += [f"Run {run.name}, planned on {', '.join(plan.data.sources)}:", ""]
            lines += [f"- stage {s.name}: up to {s.tokens:,} tokens in rows of {max(s.lengths):,}" for s in plan.stages]
        summaries = sorted(run.glob("*.md"))
        lines += ["", *(summary.read_text(encoding="utf-8") for summary in summaries)]
    done = "The lists show what was planned. A summary below a list shows what was done.\n\n"
    return done + "\n".join(lines) if lines else "None: this model was not healed."


def _figures(found: Folder) -> str:
    file = found.path / BASELINE
    sentences = read_config(file).get("sentences", ()) if file.is_file() else ()
    lines = "\n".join(f"- {line}" for line in sentences)
    return f"Measured by `proteus convert`, before healing:\n\n{lines}" if lines else "None were measured."
