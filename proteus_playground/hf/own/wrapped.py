"""A model with its slider as a class of transformers: `AutoModelForCausalLM.from_pretrained` opens exported folders.

One class serves every family: it is a subclass, made when a model is loaded, of the base's own class, with the gates as
one more module. So names of weights, `generate`, and everything else are the base's. Its passes run through the slider
at the config's flux alpha, or at that of one call: `model(ids, flux_alpha=0.5)`, `model.generate(ids, flux_alpha=0)`.
"""

from __future__ import annotations

import inspect
import json
from functools import cache, wraps
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .config import BASE_TYPE, TYPE, ProteusConfig

MODULE = "modeling_proteus"
CODE = '''"""Opens this model with trust_remote_code=True. It needs `pip install 'proteus-playground[hf]'`."""

from proteus_playground.hf.own.wrapped import ProteusConfig, ProteusForCausalLM  # noqa: F401
'''
AUTO_MAP = {"AutoConfig": f"{MODULE}.ProteusConfig", "AutoModelForCausalLM": f"{MODULE}.ProteusForCausalLM"}
FLOATS = r"proteus\.\d+\.(?!alive|head_of_gate)"  # buffers of gates that stay float32 in a model of half precision
CONFIGURED = object()  # flux_alpha of a call that names none


class ProteusForCausalLM(PreTrainedModel):
    """The class that transformers opens; what it returns is of a subclass of the base's own class."""

    config_class = ProteusConfig

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **how):
        """The model in an exported folder. Arguments are those of transformers' own `from_pretrained`."""
        config = ProteusConfig.from_pretrained(path) if config is None else config
        base = config.base()
        return _class_of(base).from_pretrained(path, *args, config=base, **how)

    @classmethod
    def _from_config(cls, config, **how):
        base = config.base()
        return _class_of(base)._from_config(base, **how)


def with_slider(model, stanza, gates: dict) -> PreTrainedModel:
    """`model` itself, changed in place: of the subclass, with these gates of its layers."""
    model.config.proteus_attention = stanza.to_dict()
    model.config.proteus_gates = {
        str(at): [its.n_groups, its.gates_per_group, its.head_dim, int(its.head_of_gate.max()) + 1]
        for at, its in gates.items()
    }
    model.__class__ = _subclass(type(model))
    model.proteus = nn.ModuleDict({str(at): its for at, its in gates.items()})
    return model


def _class_of(base) -> type:
    from transformers import AutoModelForCausalLM

    return _subclass(AutoModelForCausalLM._model_mapping[type(base)])


@cache
def _subclass(base: type) -> type:
    """The class of models of the class `base` with a slider."""

    def forward(self, *args, flux_alpha=CONFIGURED, **kwargs):
        from ..patch import CACHE_NAMES, is_patched

        kept = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if hasattr(kept, "run_pass") or self._dense(flux_alpha) or is_patched(self):
            return base.forward(self, *args, **kwargs)
        with self.slider(flux_alpha).patched():
            return base.forward(self, *args, **kwargs)

    given = inspect.signature(base.forward)
    parameters = list(given.parameters.values())
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(last, inspect.Parameter("flux_alpha", inspect.Parameter.KEYWORD_ONLY, default=CONFIGURED))
    forward = wraps(base.forward)(forward)
    forward.__signature__ = given.replace(parameters=parameters)
    kept = [*(getattr(base, "_keep_in_fp32_modules_strict", None) or ()), FLOATS]
    # It keeps the base's name, because transformers looks up older names of weights by it.
    body = {"forward": forward, "_keep_in_fp32_modules_strict": kept, "__module__": base.__module__}
    return type(base.__name__, (_Slider, base), body)


class _Slider:
    """What a model with a slider can do besides what its base can."""

    def __init__(self, config, *args, **kwargs):
        from ...attention import Gates

        super().__init__(config, *args, **kwargs)
        self.proteus = nn.ModuleDict({at: Gates(*sizes) for at, sizes in config.proteus_gates.items()})

    @property
    def flux_alpha(self) -> float | None:
        """Flux alpha of calls that name none; None follows the length."""
        stanza = self.config.proteus_attention
        return None if stanza.get("schedule") else stanza["settings"]["flux_alpha"]

    @flux_alpha.setter
    def flux_alpha(self, alpha: float | None) -> None:
        self.config.proteus_attention = self.slider(alpha).stanza.to_dict()

    def _dense(self, flux_alpha) -> bool:
        """Whether a call at this flux alpha runs the base's own attention in all layers."""
        if flux_alpha is not CONFIGURED:
            return flux_alpha == 0
        overrides = self.config.proteus_attention.get("overrides", {}).values()
        return self.flux_alpha == 0 and not any("flux_alpha" in its for its in overrides)

    def slider(self, flux_alpha=CONFIGURED):
        """The model as a `SliderModel`, at the config's flux alpha or at this one."""
        from .folder import SliderModel
        from .stanza import Stanza

        stanza = Stanza.from_dict(self.config.proteus_attention)
        stanza = stanza if flux_alpha is CONFIGURED else stanza.with_alpha(flux_alpha)
        return SliderModel(self, None, stanza, {int(at): its for at, its in self.proteus.items()}, TYPE)

    def generate(self, *args, flux_alpha=CONFIGURED, **kwargs):
        """transformers' `generate`; above flux alpha 0 with a `ProteusCache`, unless another cache is given."""
        from ..patch import CACHE_NAMES, handed

        if not self._dense(flux_alpha) and not any(kwargs.get(name) is not None for name in CACHE_NAMES):
            kwargs |= handed(self, self.slider(flux_alpha).cache())
        alpha = self.flux_alpha if flux_alpha is CONFIGURED else flux_alpha
        return super().generate(*args, flux_alpha=alpha, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers' own, so that the folder opens again with the slider."""
        from ...common.files import write_json, write_text

        super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / "config.json"
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields |= {BASE_TYPE: fields["model_type"], "model_type": TYPE, "auto_map": AUTO_MAP}
        write_json(file, fields | {"architectures": ["ProteusForCausalLM"]})
        write_text(Path(save_directory) / f"{MODULE}.py", CODE)


def register_model() -> None:
    """Let `AutoModelForCausalLM` open exported folders."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(ProteusConfig, ProteusForCausalLM, exist_ok=True)
