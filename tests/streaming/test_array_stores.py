"""Arrays and generated rows as documents."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from proteus_playground.streaming import generated, open_document


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">u2", "<u4"])
@pytest.mark.parametrize("limit", [None, 0])
def test_token_arrays(tmp_path, dtype, limit):
    ids = np.random.default_rng(0).integers(0, 60_000, 1000).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    store = open_document(tmp_path / "ids.npy", ram_limit=limit)
    assert (len(store), store.kind, store.mode, store.nbytes) == (1000, "tokens", "disk" if limit == 0 else "ram", 4000)
    got = store.read(10, 990)
    assert got.dtype == np.int32 and (got == ids[10:990]).all()
    assert pickle.loads(pickle.dumps(store)).read(3, 3).shape == (0,)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "bfloat16"])
@pytest.mark.parametrize("limit", [None, 0])
def test_embeddings(tmp_path, dtype, limit):
    import torch
    from safetensors.torch import save_file

    rows = np.random.default_rng(0).standard_normal((300, 7)).astype("<f4")
    if dtype == "bfloat16":
        path = tmp_path / "rows.safetensors"
        save_file({"x": torch.from_numpy(rows).to(torch.bfloat16)}, path)
        rows = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    else:
        path = tmp_path / "rows.npy"
        rows = rows.astype(dtype)
        np.save(path, rows)
    store = open_document(path, ram_limit=limit)
    got = store.read(5, 299)
    assert (store.kind, store.width, len(store)) == ("embeddings", 7, 300)
    assert got.dtype == (np.float16 if dtype == "<f2" else np.float32) and got.nbytes == store.nbytes * 294 // 300
    assert (got == rows[5:299].astype(got.dtype)).all()


@pytest.mark.parametrize("width", [None, 1, 6, 512])
def test_generated_rows_are_the_same_in_any_slice(width):
    store = generated(10_000, seed=3, width=width, vocabulary=500)
    whole = store.read(0, 10_000)
    for start, stop in [(0, 1), (1023, 1025), (1024, 2048), (777, 5000), (9_999, 10_000), (4, 4)]:
        assert (store.read(start, stop) == whole[start:stop]).all()
    longer = generated(10**9, seed=3, width=width, vocabulary=500)
    assert (longer.read(0, 10_000) == whole).all() and longer.mode == "generated"
    assert len(np.unique(longer.read(10**9 - 2000, 10**9), axis=0)) > 470
    assert (generated(10_000, seed=4, width=width, vocabulary=500).read(0, 99) != whole[:99]).any()
    if width is None:
        assert (whole.min(), whole.max()) == (0, 499)
    else:
        assert abs(whole.mean()) < 0.05 and abs(whole.var() - 1) < 0.05
        assert abs(np.corrcoef(whole[:-1, 0], whole[1:, 0])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("options", "error"),
    [({"tokens": 0}, ValueError), ({"tokens": 1.5}, TypeError), ({"tokens": 9, "width": 0}, ValueError)]
    + [({"tokens": 9, "seed": -1}, ValueError), ({"tokens": 9, "vocabulary": True}, TypeError)],
)
@pytest.mark.bad_input
def test_what_cannot_be_generated(options, error):
    with pytest.raises(error, match=f"{list(options)[-1]}="):
        generated(**options)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array(["a"], object), "Python objects in dtype"),
        (np.zeros((2, 3, 4)), r"float64 of shape \(2, 3, 4\)"),
        (np.zeros(4), r"float64 of shape \(4,\)"),
        (np.zeros((4, 4), int), r"int64 of shape \(4, 4\)"),
        (np.zeros(0, int), r"shape \(0,\)"),
        (np.zeros((5, 4), order="F"), "column after column"),
        (np.zeros(4, bool), "bool"),
    ],
)
@pytest.mark.bad_input
def test_arrays_that_are_no_document(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=said):
        open_document(tmp_path / "a.npy")


def test_broken_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, -1, 7]))
    with pytest.raises(ValueError, match="token 1 is -1: allowed are ids from 0"):
        open_document(tmp_path / "a.npy")
    raw = (tmp_path / "a.npy").read_bytes()
    for torn in (raw[:-4], raw[:20], b"hello"):
        (tmp_path / "a.npy").write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read as .npy"):
            open_document(tmp_path / "a.npy")
        (tmp_path / "a.safetensors").write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            open_document(tmp_path / "a.safetensors")
    from safetensors.numpy import save_file

    for tensors in ({"a": np.zeros(3)}, {"a": np.zeros((3, 3), "f4"), "b": np.zeros((3, 3), "f4")}):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="allowed is one tensor"):
            open_document(tmp_path / "a.safetensors")


def test_an_array_that_changes_afterwards(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1000))
    memory, store = open_document(path), open_document(path, ram_limit=0)
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="a.npy shrank"):
        store.read(0, 10)
    assert memory.read(990, 1000).tolist() == list(range(990, 1000))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.npy"):
        store.read(0, 10)
