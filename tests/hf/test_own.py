"""A folder of one's own: its stanza, its base, its gates, and the model that opens with a slider."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
import tiny_llama  # noqa: E402 -- after the skip
from tiny_decoders import SIZES, VOCABULARY  # noqa: E402

from proteus_playground.attention.settings import Settings  # noqa: E402
from proteus_playground.hf import convert as converting  # noqa: E402
from proteus_playground.hf import opening  # noqa: E402
from proteus_playground.hf.convert import convert  # noqa: E402
from proteus_playground.hf.healing.plan import Plan  # noqa: E402
from proteus_playground.hf.own.folder import GATES, is_own, open_folder, read_folder  # noqa: E402
from proteus_playground.hf.own.stanza import Base, Schedule, Stanza, read_stanza, write_stanza  # noqa: E402

SLIDING = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16}
FAMILIES = {
    "llama": {}, "qwen3": {}, "gemma3_text": SLIDING, "mistral": {"sliding_window": None}, "gpt_neox": {},
}  # fmt: skip
SETTINGS = Settings(shortlist=24, gates=64, probes=3)


def save(kind, into):
    """A tiny model of a family, and a tokenizer, as a folder."""
    model = tiny_llama.family(kind, **SIZES | FAMILIES[kind])
    model.save_pretrained(into)
    tiny_llama.build()[1].save_pretrained(into)
    return model


def scaffold(base, into, **how):
    """The folder that `convert` makes of `base`."""
    return convert(str(base), into, say=lambda sentence: None, **how).path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    model = save(request.param, place / "base")
    return model, place / "base", scaffold(place / "base", place / "own")


IDS = torch.randint(1, VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(1))


def test_a_folder_opens_with_a_slider(family):
    native, _, own = family
    assert json.loads((own / "config.json").read_text())["model_type"] == native.config.model_type
    slider = open_folder(own)
    assert slider.stanza.layers == ((0, 2) if native.config.model_type == "gemma3_text" else (0, 1, 2))
    wanted = native(IDS).logits
    assert torch.equal(slider.model(IDS).logits, wanted)
    slider.stanza = replace(slider.stanza, settings=SETTINGS)
    slider.alpha = 1.0
    with slider.patched():
        assert not torch.allclose(slider.model(IDS).logits, wanted, atol=1e-3)
    slider.alpha = 0.0
    with slider.patched():
        assert_close(slider.model(IDS).logits, wanted, atol=2e-4 * wanted.abs().max().item(), rtol=0)
    slider.alpha = None
    assert slider.stanza.schedule == Schedule()
    plan = Plan.read(read_folder(own).runs[0] / "plan.json")
    linear = {name.rpartition(".")[2] for name, part in native.named_modules() if isinstance(part, torch.nn.Linear)}
    assert set(plan.adapter.targets) <= linear and {n for s in plan.stages for n in s.lengths} == {512}
    model, _ = opening.load(str(own))
    assert torch.equal(model(IDS).logits, wanted)
    source = opening.load_source(str(own))
    assert source.name == "own" and {at for at, _ in source.own_gates} == set(slider.stanza.layers)


def test_a_conversion_is_whole_and_does_nothing_twice(tmp_path, monkeypatch):
    save("llama", tmp_path / "base")
    said, out = [], tmp_path / "own"
    copied = scaffold(tmp_path / "base", tmp_path / "copied", copy=True)

    def killed(*_):
        assert not out.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(converting, "write_stanza", killed)
        scaffold(tmp_path / "base", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copied"]
    scaffold(tmp_path / "base", out, measure=lambda source: {"sentences": ["It can count."]})
    assert "It can count." in (out / "README.md").read_text() and not list(out.glob("*.safetensors.*"))
    assert [path.name for path in out.glob("*.safetensors")] == [GATES]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert(str(tmp_path / "base"), out, say=said.append)
    assert "nothing to do" in said[-1] and before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert(str(tmp_path / "base"), out, kind="small", say=said.append)
    assert "The plan 'small' was added" in said[-1]
    assert [run.name for run in read_folder(out).runs] == ["001-try", "002-small"]
    for model, place, how, error in (
        ("base", out, {"copy": True}, "without a copy'?: must be a new folder"),
        ("base", tmp_path, {}, "is a folder with other files"),
        ("own", tmp_path / "new", {}, "is a converted folder already"),
        ("base", tmp_path / "new", {"kind": "huge"}, "preset='huge': must be one of quick, try, small, guide"),
        ("nothing", tmp_path / "new", {}, "nothing' is not a known model"),
    ):
        with pytest.raises(ValueError, match=error):
            convert(str(tmp_path / model), place, say=said.append, **how)
    save("mistral", tmp_path / "base")
    with pytest.raises(ValueError, match="config.json has changed since"):
        convert(str(tmp_path / "base"), out, say=said.append)
    assert open_folder(copied).model.config.model_type == "llama"


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
