"""The workbench takes a model of one's own by its path, and offers it beside the known ones."""

import pytest
import tiny_llama

pytest.importorskip("transformers")
from proteus_playground.widgets import apps  # noqa: E402
from proteus_playground.widgets.parts.controls import ModelChoice  # noqa: E402
from proteus_playground.widgets.parts.state import PlayState, check  # noqa: E402

from proteus_playground.hf.convert import convert  # noqa: E402 -- after the skip


def test_a_folder_is_a_model_of_the_workbench(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_llama.build()
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    own = str(convert(str(tmp_path / "base"), tmp_path / "mine", say=lambda sentence: None).path)
    state = PlayState()
    choice = ModelChoice(state)
    state.restore({"model": own, "length": 128})
    assert choice.buttons.value == own and ("mine", own) in choice.buttons.options
    assert len(choice.buttons.options) == len(choice.buttons.tooltips) == 1 + len(ModelChoice.NAMES)
    source = {"model": own, "text": "humble token", "pasted": "", "question": "", "length": 128, "shelf": 1}
    probe, why = apps.make_probe(source | {"settings": state.settings()}, lambda: False, lambda *_: None)
    assert (why, probe.name, probe.n_layers, len(probe.tokens)) == ("", "mine", 3, 128)
    assert probe.view(0, state.settings()).layer == 0
    choice.buttons.value = "random"
    assert state.model == "random" and state.length == 128 and len(choice.buttons.options) == 1 + len(ModelChoice.NAMES)
    other = {**source, "model": "someone/tiny", "settings": state.settings()}
    assert (
        "someone/tiny is not on this machine: run “proteus models pull someone/tiny”"
        in apps.make_probe(other, lambda: False, lambda *_: None)[1]
    )
    with pytest.raises(ValueError, match="model='gpt9': allowed is 'shelf-mini'.* a hub id such as owner/name"):
        check("model", "gpt9")
