"""A model opens by a hub id, a folder or a GGUF file; what cannot open is refused with a way out."""

import math
import shutil
from collections import namedtuple

import pytest
import tiny_llama
import tiny_model
import torch

pytest.importorskip("transformers")
from proteus_playground.hf import fetch, models, opening, weights  # noqa: E402 -- after the skip

NAME = "someone/tiny"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache, and a folder that a hub on localhost can serve."""
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    tiny_model.save(tmp_path / "hub")
    return tmp_path


def pulled(place, monkeypatch, name=NAME, **how):
    said = []
    with tiny_model.fake_hub(place / "hub", **how) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        try:
            models.pull(name, progress=False, say=said.append)
        finally:
            said = "\n".join(said)
    return said


def test_a_hub_id_is_pulled_in_shards_and_opens_by_the_same_name(place, monkeypatch):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(place / "hub")
    (place / "hub" / "model.safetensors").unlink()
    whole.save_pretrained(place / "hub", max_shard_size="4KB")
    assert len(list((place / "hub").glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match="'someone/tiny' is not pulled: run `proteus models pull someone/tiny`"):
        opening.load(NAME)
    said = pulled(place, monkeypatch)
    assert "bytes in float32" in said and "licence mit" in said
    model, tokenizer = opening.load(NAME)
    ids = torch.tensor([tokenizer("potato soup").input_ids])
    assert torch.equal(model(ids).logits, whole.eval()(ids).logits)
    assert opening.load_source(NAME).name == opening.title(NAME) == NAME
    (info,) = models.list_models()
    assert info.name == NAME and models.remove(NAME) == info.bytes and not models.is_pulled(NAME)


@pytest.mark.parametrize(
    ("how", "name", "error"),
    [
        ({"gated": True}, NAME, "accept the terms at https://huggingface.co/someone/tiny, then run `hf auth login`"),
        ({}, "someone/else", "no such model, or a private one"),
    ],
)
def test_a_repository_that_does_not_open_says_why(place, monkeypatch, how, name, error):
    with pytest.raises(models.Unreachable, match=error):
        pulled(place, monkeypatch, name, **how)
    assert models.list_models() == []


def test_a_repository_of_another_format_says_what_to_do(place, monkeypatch):
    (place / "hub" / "model.safetensors").rename(place / "hub" / "tiny.Q4_1.gguf")
    with pytest.raises(models.Unreachable, match="has no model.safetensors; it has GGUF files: download one"):
        pulled(place, monkeypatch)


def test_a_full_disk_and_a_model_larger_than_memory_are_noticed_before(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
        with pytest.raises(OSError, match="needs .* of disk, and .* has 100 bytes free: make room.*PROTEUS_CACHE"):
            pulled(place, monkeypatch)
    monkeypatch.setattr(weights, "_free", lambda device: (4000, "this machine"))
    with pytest.raises(MemoryError, match="need .* as float32, and this machine has .* free: dtype bfloat16 needs"):
        opening.load(str(place / "hub"))


def test_a_folder_opens_where_it_is_and_a_gguf_after_it_was_converted(place, monkeypatch):
    said = []
    models.pull(str(place / "hub"), progress=False, say=said.append)
    assert "is a folder on this machine" in said[0] and "in float32" in said[0]
    assert opening.title(str(place / "hub")) == "hub"
    with pytest.raises(ValueError, match="a folder of yours: only pulled models are removed"):
        models.remove(str(place / "hub"))

    from gguf import GGUFWriter

    file = place / "mine.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("output.weight", torch.zeros(4, 8).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(ValueError, match="cannot convert this GGUF"):
        models.pull(str(file), progress=False)
    monkeypatch.setattr(fetch, "convert", lambda gguf, into, progress: tiny_model.save(into))
    with pytest.raises(ValueError, match="is not pulled"):
        opening.load(str(file))
    said.clear()
    models.pull(str(file), progress=False, say=said.append)
    assert "128 bytes" in said[0] and opening.load(str(file))[0].config.model_type == "llama"
    (place / "other.gguf").write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match="is no readable GGUF"):
        models.pull(str(place / "other.gguf"), progress=False)
    with pytest.raises(ValueError, match=r"it holds mine.gguf, other.gguf; name one"):
        models.pull(str(place), progress=False)
    for bad in ("", "two words", "../nowhere", "a/b/c", str(tiny_llama.__file__), "x" * 300):
        with pytest.raises(ValueError, match="allowed is"):
            models.find(bad)


def test_the_small_model_of_the_package_opens_by_its_name_and_stays():
    place = models.find("tiny-english")
    assert models.is_pulled("tiny-english") and place.mine and place.label == opening.title("tiny-english")
    said = []
    assert models.pull("tiny-english", progress=False, say=said.append) == place.home
    assert said == ["tiny-english is a folder on this machine, 1M parameters in float16: there is nothing to fetch."]
    source = opening.load_source("tiny-english")
    assert (source.name, source.n_layers, source.context, source.vocabulary) == ("tiny-english", 4, 1024, 2048)
    ids = torch.tensor(source.encode("In the beginning God created the heaven and the"))
    assert source.nll(ids, 1, {}) < 5 < math.log(source.vocabulary)  # it has learned something
    with pytest.raises(ValueError, match="name='tiny-english' comes with the package and is not removed"):
        models.remove("tiny-english")
    assert "tiny-english" not in {info.name for info in models.list_models()}
