"""What a notebook calls before its first panel: it lets widgets draw in Colab and checks what is installed."""

from __future__ import annotations

from importlib import import_module

import torch

from proteus_playground.common.versions import installed, judge

CHECKED = ("ipywidgets", "plotly", "anywidget")


def setup_colab() -> None:
    """In Colab, enable widgets that come from packages; anywhere, print device and versions in one line.

    Raises `ImportError` with the command to run if a version does not work.
    """
    try:
        output = import_module("google.colab.output")
    except ImportError:  # not in Colab
        advice = ""
    else:
        output.enable_custom_widget_manager()
        advice = " (Runtime, Change runtime type, T4 GPU)"
    for package in CHECKED:
        if not (finding := judge(package, installed(package))).ok:
            raise ImportError(f"{package} {finding.found}. {finding.meaning}, then restart the runtime")
    versions = ", ".join(f"{package} {installed(package)}" for package in ("torch", *CHECKED))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GB; {versions}.")
    else:
        print(f"No GPU{advice}, {torch.get_num_threads()} CPU threads; {versions}.")
