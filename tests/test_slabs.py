"""Activations of a GPU in slabs of main memory; here by plain memory in their place, on a GPU by page-locked one."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, EXAMPLES, hashes
from hypothesis import given
from hypothesis import strategies as st
from test_cache import DOWN, assert_close_weights, both, losses

from hf_unfreeze import FrozenPrefixCache
from hf_unfreeze import _store as store_module
from hf_unfreeze._store import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")


@pytest.fixture(autouse=True)
def _as_of_a_gpu(monkeypatch):
    monkeypatch.setattr(store_module, "of_gpu", lambda activations: True)


@pytest.mark.parametrize("max_bytes", [1 << 20, 1 << 13])
def test_a_run_has_the_same_bits(make_trainer, max_bytes):
    plain, cached, cache = both(make_trainer, DOWN, cache=FrozenPrefixCache(max_bytes=max_bytes), num_train_epochs=4)
    assert cache.active.off == ""
    if DEVICE == "cpu" or max_bytes == 1 << 20:  # on a GPU the last bits go by how many are missing of a batch
        assert losses(plain) == losses(cached) and hashes(plain.model) == hashes(cached.model)
    assert_close_weights(plain, cached, atol=1e-5)
    assert (cache.stats.misses == EXAMPLES) == (max_bytes == 1 << 20)
    assert 0 < cache.store.nbytes <= max_bytes
    rows = cache.store._rows.values()
    assert len({row.untyped_storage().data_ptr() for row in rows}) < len(rows)
    assert all(row.is_pinned() == (DEVICE == "cuda") for row in rows)


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), max_size=30), st.integers(64, 2000))
def test_slabs_hold_what_was_put_and_no_more_than_the_limit(puts, max_bytes):
    store = MemoryStore(max_bytes)
    for keys in puts:
        store.put([(bytes([key]), torch.full((key + 1,), float(key))) for key in keys])
        slabs = {id(slab): slab for slab in store._slabs.values()}
        assert store._slabs.keys() == store._rows.keys()
        assert store.nbytes == sum(slab.nbytes for slab in slabs.values()) <= max_bytes
        for key, row in enumerate(store.get([bytes([key]) for key in range(41)])):
            assert row is None or row.tolist() == [key] * (key + 1)


def test_the_slab_of_what_was_used_last_stays():
    store = MemoryStore(1 << 9)  # slabs of 64 bytes
    for key in range(8):
        store.put([(bytes([key]), torch.full((16,), float(key)))])
    store.get([b"\x00"])
    store.put([(b"new", torch.zeros(16))])
    assert [key[0] for key in store._rows] == [2, 3, 4, 5, 6, 7, 0, b"new"[0]]
    store.put([(b"long", torch.zeros(100))])  # in one of its own, for which others go
    assert store.get([b"long"])[0] is not None and store.nbytes == 1 << 9


def test_a_slab_that_is_larger_than_the_limit_goes_at_once():
    store = MemoryStore(100)
    store.put([(b"a", torch.zeros(20))])  # in 128 bytes, which is more than the limit
    assert store.nbytes == 0 and store.get([b"a"]) == [None]
