"""Which versions of the packages around the playground work, and what to install where one does not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

WIDGET_STACK = {  # name: (first version that works, first that does not, what it is for)
    "ipywidgets": ("7.7", "9", "the sliders"),
    "plotly": ("6.1", None, "the pictures (5 and 6.0 fail beside other widgets)"),
    "anywidget": ("0.9.13", None, "plotly's figures"),
    "jupyterlab": ("4.2", None, "proteus play; not needed in Colab"),
    "voila": ("0.5.7", None, "proteus play --app"),
    "transformers": ("5.15", "6", "real models"),
}
OPTIONAL = {"jupyterlab": "lab", "voila": "lab", "transformers": "hf"}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. `ok` is False only if the playground cannot work with it."""

    topic: str
    found: str
    meaning: str = ""
    ok: bool = True


def judge(package: str, found: str | None) -> Finding:
    """Whether a version of a package in WIDGET_STACK works. found: None means that it is not installed."""
    low, high, purpose = WIDGET_STACK[package]
    wanted = f"{package}>={low}" + (f",<{high}" if high else "")
    extra = OPTIONAL.get(package)
    if found is None:
        remedy = f"pip install 'proteus-playground[{extra}]'" if extra else f"pip install '{wanted}'"
        return Finding(package, "not installed", f"For {purpose}: {remedy}", ok=bool(extra))
    release = Version(found).release
    fits = Version(low).release <= release and (high is None or release < Version(high).release)
    remedy = "." if fits else f": pip install '{wanted}'"
    return Finding(package, found, f"For {purpose}{remedy}", fits)


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
