"""A probe with other selectors and with something taken away, and the next token after one changed row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_shelf
import torch
from tiny_llama import WORDS, build

from proteus_playground.attention.selectors.way import Way, Without
from proteus_playground.attention.settings import Settings
from proteus_playground.common.progress import Stopped
from proteus_playground.common.texts import Text
from proteus_playground.hf.source import ModelSource
from proteus_playground.playground.next_token import compare
from proteus_playground.playground.probe import LayerProbe
from proteus_playground.playground.shelf_source import ShelfSource

HERE = Settings(shortlist=24, gates=8, probes=2, nearest_gates=False)


@pytest.fixture(scope="module", params=["llama", "shelf"])
def probe(request, tmp_path_factory):
    if request.param == "llama":
        body = " ".join(np.random.default_rng(0).choice(WORDS, 120))
        source = ModelSource(*build(), "tiny")
    else:
        source = ShelfSource(*tiny_shelf.build(tmp_path_factory.mktemp("model")), "tiny")
        from proteus_playground.lm.shelf import shelf

        body = shelf(3, 12).text
    other = Text("other", body[::-1], "test")
    return LayerProbe(source, Text("a tale", body, "test"), max_tokens=120, calibration=other, calibration_tokens=100)


def whole(probe, token: int) -> np.ndarray:
    """Log-probabilities after `token` of an ordinary dense pass."""
    ids, model = probe._ids[None, : token + 1], probe._source._model
    with torch.no_grad():
        if isinstance(probe._source, ShelfSource):
            logits = probe._source._twin({}).hidden(ids)[0, -1] @ model.embed.weight.T
        else:
            logits = model(ids).logits[0, -1]
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("token", [0, 5, 80])
def test_one_dense_row_predicts_what_a_dense_pass_predicts(probe, token):
    want = whole(probe, token)
    np.testing.assert_allclose(probe.next_logprobs(token, None), want, atol=5e-3)
    dense = Settings(flux_alpha=0.0, gates=8, probes=2)
    for way in (Way(), Way("quest")):  # with alpha 0 every selector reads everything
        np.testing.assert_allclose(probe.next_logprobs(token, dense, way), want, atol=5e-3)


def test_what_is_taken_away_changes_what_comes_next(probe):
    token = len(probe.tokens) - 1
    whole = probe.next_logprobs(token, HERE)
    changed = [probe.next_logprobs(token, HERE, Way(without=Without.parse(text)))
               for text in ("rings", "head 0:1", f"key {token - 1}")]  # fmt: skip
    changed.append(probe.next_logprobs(token, HERE, Way("random keys")))
    assert all(np.abs(one - whole).max() > 1e-4 for one in changed)
    np.testing.assert_array_equal(whole, probe.next_logprobs(token, HERE, Way(without=Without.parse("head 9:1"))))
    bars = compare(whole, changed[0], probe.words_of, ("all", "less"))
    assert len(bars.words) == 10 and bars.kl > 0 and (np.diff(bars.before) <= 0).all()
    p, q = np.exp(whole), np.exp(changed[0])
    assert bars.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-3)
    with pytest.raises(Stopped):
        probe.next_logprobs(token, HERE, stop=lambda: True)


def test_views_and_rows_of_a_way_agree(probe):
    for way in (Way("quest"), Way("oracle"), Way(without=Without.parse("notes, key 3"))):
        view = probe.view(1, HERE, way=way)
        row = probe.row(1, HERE, 80, 1, way)
        read = int((np.isin(row.kind, (1, 2, 3))).sum()) + row.notes_read
        assert view.way == way and view.reads[80, 1] == read and view.error > 0
        assert row.weight.sum() == pytest.approx(1, abs=1e-3)
    routed = replace(HERE, route_heads=True)
    ours, quest = probe.view(1, routed), probe.view(1, routed, way=Way("quest"))
    assert ours.head_map_kind == "routing weight" and not ours.awake.all()
    np.testing.assert_allclose(quest.head_map, ours.head_map, atol=1e-6)  # which heads wake does not depend on the keys
    plain, same = probe.view(1, HERE), probe.view(1, HERE, way=Way(without=Without.parse("head 0:0")))
    assert same.error == pytest.approx(plain.error, rel=1e-3) and (same.reads == plain.reads).all()
    np.testing.assert_allclose(same.head_map, plain.head_map, atol=2e-3)


def test_a_layer_of_random_weights_predicts_nothing():
    random = LayerProbe.random_layer(Text("a", "one two three " * 20, "test"), max_tokens=40)
    assert not random.predicts
    with pytest.raises(ValueError, match="model='random layer'"):
        random.next_logprobs(3, None)
