"""Lets transformers open exported models: their classes are registered when transformers' auto classes are imported.

transformers is heavy, so it is not imported for this. Where it is in memory already, the classes are registered now.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

REGISTER = {  # after which module, which function of which module of `hf.own`
    "transformers.models.auto.configuration_auto": ("config", "register_config"),
    "transformers.models.auto.modeling_auto": ("wrapped", "register_model"),
}


class _After(MetaPathFinder):
    """Finds the modules of `REGISTER` as the other finders do, and registers when they have been run."""

    def find_spec(self, name, path=None, target=None):
        if name not in REGISTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                _register(name)

            spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Register now what is in memory, and the rest when it comes. A second call does nothing."""
    if not any(isinstance(finder, _After) for finder in sys.meta_path):
        sys.meta_path.insert(0, _After())
        for name in REGISTER:
            if name in sys.modules:
                _register(name)


def _register(name: str) -> None:
    module, function = REGISTER[name]
    getattr(import_module(f"proteus_playground.hf.own.{module}"), function)()
