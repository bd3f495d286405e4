"""A store on the disk behind one in memory, as a GPU has it, and what is fetched for the batch to come.

Here plain memory takes the place of page-locked one; on a GPU the same runs have the real one.
"""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from conftest import DEVICE, EXAMPLES, hashes
from hypothesis import given
from hypothesis import strategies as st
from test_cache import DOWN, both, losses, pad, ragged_data

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback
from hf_unfreeze import _disk as disk_module
from hf_unfreeze import _store as store_module
from hf_unfreeze import cache as cache_module
from hf_unfreeze._coming import Coming
from hf_unfreeze._disk import DiskStore
from hf_unfreeze._store import MemoryStore
from hf_unfreeze._tiers import Tiers

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
SIZE = 8 * 16 * 4  # bytes of a row of the tiny model


@pytest.fixture(autouse=True)
def _as_of_a_gpu(monkeypatch):
    monkeypatch.setattr(store_module, "of_gpu", lambda activations: True)


@pytest.fixture
def read(monkeypatch):
    """Rows that came from the disk, by who read them: the run itself, or a thread meanwhile."""
    counts: Counter = Counter()
    own = DiskStore.get

    def get(store, keys, *room):
        rows = own(store, keys, *room)
        meanwhile = threading.current_thread() is not threading.main_thread()
        counts["meanwhile" if meanwhile else "waiting"] += sum(row is not None for row in rows)
        return rows

    monkeypatch.setattr(DiskStore, "get", get)
    return counts


def rows_of(count, **options):
    return {bytes([key]): torch.full((key + 1,), float(key), **options) for key in range(count)}


def tiers(folder, max_bytes=1 << 20):
    return Tiers(MemoryStore(max_bytes), DiskStore(folder, 1 << 24))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 3}, {"dataloader_num_workers": 1}, {"eval_strategy": "epoch"}],
    ids=["", "accumulation", "worker", "eval"],
)
@pytest.mark.parametrize("room", [4 << 20, 4 * 16 * SIZE], ids=["room for all", "little room"])
def test_runs_have_the_bits_of_one_without_and_fetch_ahead(make_trainer, tmp_path, monkeypatch, read, room, arguments):
    monkeypatch.setattr(cache_module, "free_memory", lambda *device: room)
    cache = FrozenPrefixCache("disk", folder=tmp_path / "cache")
    plain, cached, _ = both(make_trainer, DOWN, cache=cache, num_train_epochs=4, **arguments)
    assert cache.active.off == "" and losses(plain) == losses(cached) and hashes(plain.model) == hashes(cached.model)
    if room == 4 << 20:
        assert not +read
    again = FrozenPrefixCache("disk", folder=tmp_path / "cache")
    read.clear()
    trainer = make_trainer(UnfreezeCallback("head@0", cache=again), num_train_epochs=2, **arguments)
    trainer.train()
    assert again.stats.misses == 0
    steps = EXAMPLES // trainer.args.train_batch_size
    if room == 4 << 20:  # once; the first batch is checked, and no later one is known while it runs
        assert sum(read.values()) == EXAMPLES * (2 if "eval_strategy" in arguments else 1)
        assert read["meanwhile"] == EXAMPLES - 2 * trainer.args.train_batch_size
    else:
        assert read["meanwhile"] > (steps - 2) * trainer.args.train_batch_size


def test_nothing_is_fetched_that_memory_has(make_trainer, tmp_path, monkeypatch):
    asked = []
    own = Coming.like
    monkeypatch.setattr(Coming, "like", lambda self, inputs: (asked.append(inputs), own(self, inputs))[1])
    make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}")).train()
    assert not asked
    make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}")).train()
    assert len(asked) == EXAMPLES // 4 - 1  # in the first epoch, but for its first batch, which is checked


def test_padding_of_the_batch_to_come_is_not_part_of_its_keys(make_trainer, tmp_path, monkeypatch, read):
    monkeypatch.setattr(cache_module, "free_memory", lambda *device: 4 * 16 * SIZE)

    def run():
        trainer = make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}"), num_train_epochs=2)
        trainer.train_dataset, trainer.data_collator = ragged_data(), pad
        trainer.train()

    run()
    read.clear()
    run()
    in_turn = read["waiting"] - EXAMPLES  # all are looked up once before, by the pass that sorts by length
    assert read["meanwhile"] > EXAMPLES > 4 * in_turn


def test_looking_at_the_loader_changes_no_random_number(make_trainer, tmp_path):
    def corrupt(rows):
        batch = pad(rows)
        return batch | {"labels": torch.randint(3, batch["labels"].shape)}

    drawn = {"data": ragged_data(), "collator": corrupt, "num_train_epochs": 3}
    for _ in range(2):
        cache = FrozenPrefixCache("disk", folder=tmp_path / "cache")
        plain, cached, _ = both(make_trainer, "head@0", cache=cache, **drawn)
        assert losses(plain) == pytest.approx(losses(cached), rel=1e-5)


def test_the_loader_is_left_as_it_was(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback("head@0", cache=f"disk:{tmp_path}"))
    seen = []

    def loader_of(*args, own=trainer.get_train_dataloader):
        seen.append(own(*args))
        return seen[-1]

    trainer.get_train_dataloader = loader_of
    trainer.train()
    assert [vars(loader.base_dataloader).get("__iter__") for loader in seen] == [None]


def test_an_unknown_batch_to_come_is_not_fetched():
    batches = [{"input_ids": torch.ones(2, 3)}, [torch.ones(2, 3)], {"input_ids": torch.ones(2, 3)}]
    coming = Coming(torch.utils.data.DataLoader(batches, batch_size=None), dict, 1)
    loader = iter(coming._base.__iter__())
    given = next(loader)
    next(loader)
    coming.begin(given)
    assert coming.like(given) is None, "a list, which has no names"
    next(loader)
    coming.begin(given)
    assert coming.like({"input_ids": given["input_ids"] + 1}) is None, "made by the model"
    assert torch.equal(coming.like({**given, "flag": True})["input_ids"], batches[2]["input_ids"])
    coming.begin(given)
    assert coming.like(given) is None, "the last"
    assert len([*loader]) == 0 and len([*coming._base.__iter__()]) == 3
    assert len(coming._fetched) == 2, "no more are held, where no model is given them"


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), max_size=20), st.integers(64, 2000))
def test_what_was_put_is_found_whatever_memory_holds(tmp_path_factory, puts, max_bytes):
    rows, store = rows_of(41), tiers(tmp_path_factory.mktemp("tiers"), max_bytes)
    known = set()
    for keys in puts:
        keys = [bytes([key]) for key in keys]
        store.put((key, rows[key]) for key in keys)
        known.update(keys)
        store.expect(lambda keys=keys: keys)
        wanted = [*rows, *keys]
        for key, row in zip(wanted, store.get(wanted), strict=True):
            assert (row is not None) == (key in known) and (row is None or torch.equal(row, rows[key]))
        assert store._near.nbytes <= max_bytes


def test_a_row_that_is_damaged_on_the_disk_does_not_get_into_memory(tmp_path):
    tiers(tmp_path).put(rows_of(3).items())
    store = tiers(tmp_path)
    harm(store._far, b"\x01", -1)
    for _ in range(2):
        assert [row is None for row in store.get([*rows_of(3)])] == [False, True, False]
    store.put([(b"\x01", rows_of(2)[b"\x01"])])
    assert store.get([b"\x01"])[0].tolist() == [1, 1]


def harm(store, key, place):
    with store._env.begin(write=True) as transaction:
        value = bytearray(transaction.get(key))
        value[place] ^= 1
        transaction.put(key, bytes(value))


@pytest.mark.parametrize("place", [0, 1, 2, 4, 8, 9, 12], ids=lambda place: f"byte {place}")
def test_a_damaged_header_is_a_miss(tmp_path, place):
    """Version, dtype, dimensions, checksum, shape, and the payload."""
    store = DiskStore(tmp_path, 1 << 24)
    store.put(rows_of(2).items())
    harm(store, b"\x01", place)
    assert [row is None for row in store.get([*rows_of(2)])] == [False, True]


def test_what_a_thread_could_not_fetch_is_told(tmp_path, monkeypatch):
    tiers(tmp_path).put(rows_of(3).items())
    store = tiers(tmp_path)
    store.get([b"\x00"])
    store.expect(lambda: [b"\x01"])
    assert store.get([b"\x01"])[0] is not None

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(DiskStore, "get", fail)
    store.expect(lambda: [b"\x02"])
    with pytest.raises(MemoryError, match="no room"):
        store.get([b"\x02"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_long_rows(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(disk_module, "SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    rows = rows_of(20, dtype=dtype)
    who = set()
    crc = disk_module.zlib.crc32
    monkeypatch.setattr(disk_module.zlib, "crc32", lambda data: (who.add(threading.get_ident()), crc(data))[1])
    store = DiskStore(tmp_path, 1 << 24)
    store.put(rows.items())
    harm(store, b"\x05", -1)
    found = store.get([*rows])
    assert found.pop(5) is None
    rows.pop(b"\x05")
    assert all(torch.equal(row, expected) for row, expected in zip(found, rows.values(), strict=True))
    assert threading.get_ident() not in who


def test_memory_is_page_locked_where_there_is_a_gpu(tmp_path):
    store = tiers(tmp_path)
    store.put((key, row.to(DEVICE)) for key, row in rows_of(3).items())
    assert [row.is_pinned() for row in store.get([*rows_of(3)])] == [DEVICE == "cuda"] * 3
