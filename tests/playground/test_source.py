"""Random layers, shelf models and transformers models offer the same things to the playground."""

import pytest
import torch
from tiny_llama import build as build_llama
from tiny_shelf import build as build_shelf

from proteus_playground.attention.calibration import KeySource
from proteus_playground.playground.random_source import RandomSource
from proteus_playground.playground.shelf_source import ShelfSource
from proteus_playground.playground.source import Source

MEMBERS = {*KeySource.__annotations__, *Source.__annotations__}
MEMBERS |= {name for kind in (KeySource, Source) for name in vars(kind) if not name.startswith("_")}


def random_layer(_):
    return RandomSource()


def shelf_model(folder):
    return ShelfSource(*build_shelf(folder), "tiny")


def transformers_model(_):
    pytest.importorskip("transformers")
    from proteus_playground.hf.source import ModelSource

    return ModelSource(*build_llama(), "tiny")


@pytest.fixture(params=[random_layer, shelf_model, transformers_model], ids=lambda make: make.__name__)
def source(request, tmp_path) -> Source:
    return request.param(tmp_path)


def test_a_source_has_every_member(source):
    assert len(MEMBERS) == 20
    assert {name for name in MEMBERS if not hasattr(source, name)} == set()


def test_a_source_records_what_the_protocol_says(source):
    ids = source.ids(source.encode("the humble token waited on page five"))
    shape, layer, (T,) = source.shape, source.full_layers[-1], ids.shape
    seen = source.capture(ids)[layer]
    assert seen.q.shape == (T, shape.n_heads, shape.head_dim) and seen.k.shape == (T, shape.n_groups, shape.head_dim)
    assert seen.dense.shape == (T, source.width) and seen.q.dtype == torch.float16
    out = torch.zeros(T, shape.n_heads * shape.head_dim, dtype=source.dtype)
    assert source.project(layer, out).shape == (T, source.width)
    only_keys = source.capture(ids, keys_only=True)[layer]
    assert only_keys.q is None and torch.equal(only_keys.k, seen.k)
