"""A folder of one's own: its stanza, its base, its gates, and the model that opens with a slider."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
import tiny_llama  # noqa: E402 -- after the skip
from test_patch import SIZES, VOCABULARY  # noqa: E402

from proteus_playground.attention.settings import Settings  # noqa: E402
from proteus_playground.hf.fetch import sha256_of  # noqa: E402
from proteus_playground.hf.own.folder import GATES, is_own, open_folder, read_folder  # noqa: E402
from proteus_playground.hf.own.stanza import Base, Schedule, Stanza, read_stanza, write_stanza  # noqa: E402
from proteus_playground.hf.patch import find_decoder, full_attention_layers, layer_shape  # noqa: E402
from proteus_playground.hf.shipped_gates import write_gates  # noqa: E402

SLIDING = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16}
FAMILIES = {
    "llama": {}, "qwen3": {}, "gemma3_text": SLIDING, "mistral": {"sliding_window": None}, "gpt_neox": {},
}  # fmt: skip
SETTINGS = Settings(shortlist=24, gates=6, probes=3)


def save(kind, into):
    """A tiny model of a family, and a tokenizer, as a folder."""
    model = tiny_llama.family(kind, **SIZES | FAMILIES[kind])
    model.save_pretrained(into)
    tiny_llama.build()[1].save_pretrained(into)
    return model


def scaffold(base, into):
    """The folder that `convert` makes of `base`, with gates fitted to noise."""
    from transformers import AutoModelForCausalLM

    from proteus_playground.attention import Gates

    model = AutoModelForCausalLM.from_pretrained(base)
    layers = full_attention_layers(model)
    shape = layer_shape(model, layers[0])
    gates = {}
    for at in layers:
        gates[at] = Gates(shape.n_groups, 6, shape.head_dim, shape.n_heads // shape.n_groups)
        gates[at].fit(torch.randn(200, shape.n_groups, shape.head_dim))
    into.mkdir()
    (into / "config.json").write_text((base / "config.json").read_text())
    hashes = {name: sha256_of(base / name) for name in ("config.json", "model.safetensors")}
    write_stanza(into / "config.json", Stanza(SETTINGS, layers, Base(str(base), hashes)))
    write_gates(into / GATES, find_decoder(model), gates, {})
    tiny_llama.build()[1].save_pretrained(into)
    return into


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    model = save(request.param, place / "base")
    return model, place / "base", scaffold(place / "base", place / "own")


IDS = torch.randint(1, VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(1))


def test_a_folder_opens_with_a_slider(family):
    native, _, own = family
    slider = open_folder(own)
    wanted = native(IDS).logits
    assert torch.equal(slider.model(IDS).logits, wanted)
    with slider.patched():
        assert not torch.allclose(slider.model(IDS).logits, wanted, atol=1e-3)
    slider.alpha = 0.0
    with slider.patched():
        assert_close(slider.model(IDS).logits, wanted, atol=2e-4 * wanted.abs().max().item(), rtol=0)
    slider.alpha = None
    assert slider.stanza.schedule == Schedule()


def test_a_changed_base_is_refused(tmp_path):
    save("llama", tmp_path / "base")
    own = scaffold(tmp_path / "base", tmp_path / "own")
    assert is_own(own) and not is_own(tmp_path / "base") and not is_own(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model.safetensors has changed since .*own' was converted"):
        open_folder(own)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors is gone since"):
        open_folder(own)


def test_a_stanza_comes_back_and_a_bad_one_is_named(tmp_path):
    stanza = Stanza(SETTINGS, (0, 2), Base("/m", {"model.safetensors": "0"}), {2: {"shortlist": 48}}, Schedule(64, 256))
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama"}')
    write_stanza(file, stanza)
    assert read_stanza(file) == stanza and json.loads(file.read_text())["model_type"] == "llama"
    assert stanza.settings_of(2).shortlist == 48
    with pytest.raises(ValueError, match="flux_alpha=2"):
        stanza.with_alpha(2)
    good = stanza.to_dict()
    for change, error in (
        ({"version": 9}, "version=9: allowed is 1"),
        ({"layers": []}, r"layers=\[\]: must be a list"),
        ({"layers": [0, -1]}, "layers=-1"),
        ({"layers": [0]}, "overrides has key 2"),
        ({"colour": 1}, "has 'colour': allowed is"),
        ({"settings": {"shortlist": 0}}, "shortlist=0"),
        ({"settings": None}, "settings=None: must be a JSON object"),
        ({"overrides": {"x": {}}}, "overrides="),
        ({"overrides": {"2": {"L": 3}}}, "overrides.2 has 'L'"),
        ({"base": {"model": 3, "files": {}}}, "base="),
        ({"schedule": {"dense_below": 9, "shortlist_from": 9}}, "shortlist_from=9"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            Stanza.from_dict(good | change)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        read_stanza(file)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder; `proteus convert"):
        read_folder(tmp_path / "none")
    save("llama", tmp_path / "base")
    with pytest.raises(ValueError, match="has no 'proteus_attention'"):
        read_folder(tmp_path / "base")
    own = scaffold(tmp_path / "base", tmp_path / "own")
    exported = replace(read_stanza(own / "config.json"), base=None)
    (own / GATES).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a file that proteus convert wrote"):
        open_folder(own)
    write_stanza(own / "config.json", exported)
    with pytest.raises(ValueError, match="an exported model"):
        read_folder(own)
