"""What a choice of gates, keys and notes costs: the gap to the dense pass, and the reads that are counted beside it."""

import json

import pytest
import torch
from proteus_playground.experiments.quality import choice
from tiny_llama import WORDS, build

from proteus_playground.hf import models
from proteus_playground.hf.source import ModelSource


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("transformers")
    return build()


@pytest.fixture
def books(tmp_path):
    paths = {}
    for seed, name in enumerate(("judged", "fitted")):
        picks = torch.randint(len(WORDS), (700,), generator=torch.Generator().manual_seed(seed))
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(" ".join(WORDS[i] for i in picks))
    return {name: str(path) for name, path in paths.items()}


def test_a_shortlist_that_holds_everything_has_no_gap_and_a_smaller_one_reads_less(net, books):
    source = ModelSource(*net, "tiny")
    ids = choice.passages(source, books["judged"], 200, 3)
    assert [len(one) for one in ids] == [200] * 3 and not torch.equal(ids[0], ids[2])
    gates = choice.fit_gates(source, choice.keys_of(source, [books["fitted"]], 600), 16)
    dense = source.nll(ids[0], 100, {})
    fields = choice.Choice("16", {"gates_per_group": 16, "probes": 4, "max_notes": 4})
    whole, all_reads = choice.gap(source, ids[0], dense, gates, choice.config_of(source, 200, fields))
    less, reads = choice.gap(source, ids[0], dense, gates, choice.config_of(source, 32, fields))
    assert abs(whole) < 1e-4 and all_reads == pytest.approx(100.5)
    assert abs(less) > 1e-4 and 16 < reads <= 32


def test_the_command_writes_one_row_per_choice_and_text(run, net, books, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name, device, dtype=None: net)
    monkeypatch.setattr(choice, "choices", lambda L: [choice.Choice("few", {"gates_per_group": 8, "probes": 2})])
    code, out, _ = run(
        "choice", "--text", books["judged"], "--calibrate", books["fitted"], "--tokens", "128", "--passages", "2",
        "--shortlist", "32", "--out", "report.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    [row] = report["rows"]
    assert code == 0 and len(row["gaps"]) == 2 and f"({row['reads']:.0f})" in out
    assert report["calibrated_on"] == [books["fitted"]] and report["tokens"] == 128


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "said"),
    [({"--calibrate": "judged"}, "is judged and calibrated on"), ({"--tokens": "5000"}, "must have at least")],
)
def test_what_cannot_be_judged_is_refused(run, net, books, monkeypatch, options, said):
    monkeypatch.setattr(models, "load", lambda name, device, dtype=None: net)
    given = {"--text": "judged", "--calibrate": "fitted"} | options
    words = [word for name, value in given.items() for word in (name, books.get(value, value))]
    code, _, err = run("choice", *words)
    assert code == 2 and said in " ".join(err.split()).replace("│ ", "")


def test_every_choice_is_a_config_of_its_own(net):
    source = ModelSource(*net, "tiny")
    for shortlist in (32, 128, 512):
        every = choice.choices(shortlist)
        configs = {str(choice.config_of(source, shortlist, one)) for one in every}
        assert len(configs) == len(every) == len({one.name for one in every})
