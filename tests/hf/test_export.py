"""What healing left of a converted folder is exported and opens again, bit for bit."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from test_own import FAMILIES, IDS, save, scaffold  # noqa: E402 -- after the skip
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from proteus_playground.hf import opening  # noqa: E402
from proteus_playground.hf.cache import ProteusCache  # noqa: E402
from proteus_playground.hf.export import export  # noqa: E402
from proteus_playground.hf.own.folder import ADAPTER, HEALED, open_folder  # noqa: E402


def adapt(own):
    """Put an adapter into a folder, as healing does."""
    from peft import LoraConfig, get_peft_model

    slider, plan = open_folder(own), json.loads(next(own.glob("runs/*/plan.json")).read_text())
    targets = plan["adapter"]["targets"]
    model = get_peft_model(slider.model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if ".lora_B" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(own / ADAPTER)


def logits(model, **how):
    with torch.no_grad():
        return model(IDS, **how).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_exported_model_is_the_healed_one_bit_for_bit(kind, tmp_path, capfd):
    native = save(kind, tmp_path / "base")
    own = scaffold(tmp_path / "base", tmp_path / "own")
    adapt(own)
    slider = open_folder(own)
    slider.alpha = 1.0
    dense = logits(slider.model)
    with slider.patched():
        sparse = logits(slider.model)
    assert not torch.allclose(dense, logits(native), atol=1e-3)
    beside = open_folder(own, merge=False)
    torch.testing.assert_close(logits(beside.model), dense, atol=1e-3, rtol=1e-4)
    with beside.model.disable_adapter():
        assert torch.equal(logits(beside.model), logits(native))

    alone = open_folder(export(own, tmp_path / "alone", say=lambda sentence: None))
    with alone.patched():
        assert torch.equal(logits(alone.model), sparse)
    assert not list((tmp_path / "alone").glob("model*"))

    merged = export(own, tmp_path / "merged", merged=True, say=lambda sentence: None)
    remote = {"trust_remote_code": True} if kind == "llama" else {}
    model = AutoModelForCausalLM.from_pretrained(merged, **remote).eval()
    assert AutoConfig.from_pretrained(merged).model_type == "proteus" and isinstance(model, type(native))
    assert torch.equal(logits(model), sparse) and torch.equal(logits(model, flux_alpha=0.0), dense)
    bank = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(bank.past_key_values, ProteusCache) and bank.sequences.shape == (1, IDS.shape[1] + 3)
    plain = model.generate(IDS, max_new_tokens=3, do_sample=False, flux_alpha=0)
    assert torch.equal(plain, slider.model.generate(IDS, max_new_tokens=3, do_sample=False))

    with pytest.raises(ValueError, match="flux_alpha=2"):
        model(IDS, flux_alpha=2)
    half = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and logits(half).isfinite().all()  # through the slider
    kept = {name: buffer.dtype for name, buffer in half.proteus["0"].named_buffers()}
    assert kept == {name: buffer.dtype for name, buffer in slider.gates[0].named_buffers()}
    model.flux_alpha = 0.5
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.flux_alpha == 0.5 and torch.equal(logits(again), logits(model))
    assert torch.equal(logits(opening.load(str(merged))[0]), dense)
    source = opening.load_source(str(merged))
    assert source.nll(IDS[0], 50, {}) == slider.source().nll(IDS[0], 50, {})  # the dense pass of both
    assert {at for at, _ in source.own_gates} == set(slider.gates)


def test_what_cannot_be_exported_is_refused_and_the_card_says_what_it_is(tmp_path):
    save("llama", tmp_path / "base")
    own = scaffold(tmp_path / "base", tmp_path / "own", measure=lambda source: {"sentences": ["It can count."]})
    for folder, place, error in (
        (tmp_path / "base", tmp_path / "new", "has no 'proteus_attention'"),
        (own, own, "is a folder with other files"),
        (tmp_path / "none", tmp_path / "new", "no such folder"),
    ):
        with pytest.raises(ValueError, match=error):
            export(folder, place)
    said = []
    merged = export(own, tmp_path / "merged", merged=True, say=said.append)
    assert "from_pretrained" in said[0]
    text = (merged / "README.md").read_text()
    for word in ("not healed", "It can count.", "The files of the base model", "stage B", str(tmp_path / "base")):
        assert word in text
    with pytest.raises(ValueError, match="an exported model. Open it with transformers"):
        export(merged, tmp_path / "new")
    save("llama", own / HEALED)
    with pytest.raises(ValueError, match="only merged=True holds them"):
        export(own, tmp_path / "new")
    assert not (tmp_path / "new").exists()
