"""The config of an exported model: the base's own under a type of ours, with the stanza and the sizes of the gates."""

from __future__ import annotations

from transformers import PretrainedConfig

TYPE, BASE_TYPE = "proteus", "base_model_type"
LEFT_OUT = ("model_type", "auto_map", "transformers_version", "architectures")


class ProteusConfig(PretrainedConfig):
    """Fields of the base's config; `base_model_type` names its type."""

    model_type = TYPE

    def base(self) -> PretrainedConfig:
        """The config of the base's own class; the slider's fields travel in it."""
        from transformers import AutoConfig

        fields = self.to_dict()
        return AutoConfig.for_model(fields.pop(BASE_TYPE), **{k: v for k, v in fields.items() if k not in LEFT_OUT})


def register_config() -> None:
    """Let `AutoConfig` open exported folders."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(TYPE, ProteusConfig, exist_ok=True)
