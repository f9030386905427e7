"""`proteus convert` and `proteus export` on a tiny model, and what they refuse."""

from functools import partial

import pytest
import tiny_llama
from helpers import run_command

pytest.importorskip("transformers")


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_llama.build()
    model.save_pretrained("base"), tokenizer.save_pretrained("base")
    return partial(run_command, capfd)


def test_the_way_from_a_checkpoint_to_an_export(run, tmp_path):
    code, out, _ = run("convert", "base", "--out", "mine")
    assert code == 0
    for word in (
        "No weight is changed",
        "3 of 3 layers get the slider",
        "nats per token dense",
        "minutes here",
        "Took",
    ):
        assert word in out, word
    assert run("convert", "base", "--out", "mine")[1].count("nothing to do") == 1
    code, out, _ = run("quality", "mine", "--lengths", "128", "--shares", "8", "--passages", "1", "--cases", "0",
                       "--arms", "ours,local")  # fmt: skip
    assert code == 0 and "; mine, judged on" in out
    assert run("export", "mine", "--out", "small")[0] == 0
    assert "from_pretrained" in run("export", "mine", "--merged", "--out", "whole")[1]
    sizes = {name: sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("small", "whole")}
    assert sizes["small"] < sizes["whole"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("convert gpt9 --out mine", "name='gpt9' is not a known model"),
        ("convert someone/tiny --out mine", "is not pulled: run `proteus models pull someone/tiny` first"),
        ("convert base --out mine --preset huge", "--preset"),
        ("convert base --out mine --dtype int8", "--dtype"),
        ("convert base --out base", "out='"),
        ("convert base", "--out"),
        ("export base --out mine", "has no 'proteus_attention'"),
        ("export nowhere --out mine", "no such folder"),
    ],
)
@pytest.mark.bad_input
def test_a_wrong_command_is_refused_in_words(run, tmp_path, command, error):
    code, _, err = run(*command.split())
    assert code in (1, 2) and error in err and "Traceback" not in err
    assert not (tmp_path / "mine").exists()
