"""Keys and stores of the frozen-prefix cache, and the arguments that choose them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import DEVICE, EXAMPLES, hashes, tiny_bert
from test_cache import DOWN, batch_of, both, by_hand, count_rows
from transformers import HfArgumentParser

from hf_unfreeze import FrozenPrefixCache, UnfreezeArguments, UnfreezeCallback, UnfreezeError, Unfreezer, _keys
from hf_unfreeze import _activations as activations_module
from hf_unfreeze._disk import DiskStore
from hf_unfreeze._keys import Unkeyed, fingerprint, read_batch
from hf_unfreeze._slabs import SIZE
from hf_unfreeze._store import MemoryStore
from hf_unfreeze.report import timeline

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
IDS = torch.arange(3, 27).reshape(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])


def keys(ragged=True, **inputs):
    return read_batch({"input_ids": IDS, "attention_mask": MASK} | inputs, ragged).keys


@pytest.fixture(params=["_host_keys", "_device_keys"])
def _hashed(request, monkeypatch):
    """The hash of inputs on the host, and that of a GPU, which runs on a CPU as well."""
    monkeypatch.setattr(_keys, "_host_keys", getattr(_keys, request.param))


@pytest.mark.usefixtures("_hashed")
def test_keys_depend_on_content_and_not_on_batch_or_padding():
    longer = {
        "input_ids": torch.nn.functional.pad(IDS, (0, 4)),
        "attention_mask": torch.nn.functional.pad(MASK, (0, 4)),
    }
    assert keys(**longer)[1:] == keys()[1:]
    other_padding = IDS.clone()
    other_padding[1, 6] = 49
    assert keys(input_ids=other_padding) == keys()
    assert keys(input_ids=IDS.flip(0), attention_mask=MASK.flip(0)) == keys()[::-1]
    assert keys(labels=torch.tensor([1, 2, 3]), num_items_in_batch=torch.tensor(3)) == keys()


@pytest.mark.usefixtures("_hashed")
def test_keys_differ_with_all_that_counts():
    seen = {*keys()}
    for change in (
        {"input_ids": IDS + 1},
        {"input_ids": IDS.flip(1)},
        {"attention_mask": torch.ones_like(MASK)},
        {"token_type_ids": torch.ones_like(IDS)},
        {"position_ids": torch.arange(8)[None] + 1},
    ):
        changed = keys(**change)
        kept = 1 if "attention_mask" in change else 0  # the first example has no padding
        assert len(set(changed) - seen) == 3 - kept, change
    assert len({*keys(), *keys(ragged=False)}) == 5  # padding is part of the key but for the first example
    assert read_batch({"input_ids": IDS, "flag": True}, True).salt != read_batch({"input_ids": IDS}, True).salt


@pytest.mark.usefixtures("_hashed")
def test_many_keys_of_similar_inputs_do_not_collide():
    ids = torch.arange(100_000).reshape(-1, 1) % torch.tensor([[7, 10, 1000, 100_000]])
    assert len(set(read_batch({"input_ids": ids}, True).keys)) == 100_000
    pictures = torch.zeros(64, 64)
    pictures.fill_diagonal_(1e-30)
    assert len(set(read_batch({"pixel_values": pictures}, True).keys)) == 64


def test_inputs_without_content_have_no_key():
    with pytest.raises(Unkeyed, match="the argument extra is a object"):
        keys(extra=object())
    with pytest.raises(Unkeyed, match="a gradient flows into inputs_embeds"):
        keys(inputs_embeds=torch.zeros(3, 8, 4, requires_grad=True))


def test_fingerprint_sees_one_bit_anywhere():
    weight = torch.zeros(3_000_001)
    before = fingerprint([("weight", weight)])
    weight[-1] = 1e-38
    assert fingerprint([("weight", weight)]) != before
    assert fingerprint([("other", torch.zeros(3_000_001))]) != before


def test_memory_keeps_what_was_used_last_within_its_limit():
    store = MemoryStore(3 * 40)
    rows = {bytes([i]): torch.full((10,), float(i)) for i in range(4)}
    store.put(list(rows.items())[:3])
    store.get([b"\x00"])
    store.put([(b"\x03", rows[b"\x03"])])
    assert [row is not None for row in store.get(list(rows))] == [True, False, True, True]
    assert store.nbytes == 120
    store.put([(b"big", torch.zeros(1000))])
    assert store.nbytes == 120


def test_a_cache_too_small_for_the_data_computes_again(make_trainer):
    cache = FrozenPrefixCache(max_bytes=10 * 8 * 16 * 4)
    plain, cached, _ = both(make_trainer, DOWN, cache=cache)
    assert hashes(plain.model) == hashes(cached.model)
    assert cache.stats.misses > EXAMPLES
    assert cache.store.nbytes <= cache.store.max_bytes


def test_beside_the_model_it_takes_a_quarter_of_what_is_free_there(make_trainer, monkeypatch):
    module = torch.get_device_module(torch.device(DEVICE))
    monkeypatch.setattr(module, "mem_get_info", lambda device: (8 << 20, 16 << 20), raising=False)
    plain, cached, cache = both(make_trainer, DOWN, cache=FrozenPrefixCache("device"))
    assert hashes(plain.model) == hashes(cached.model)
    assert cache.stats.misses == EXAMPLES
    assert cache.record()["unfreeze/cache_max_bytes"] == cache.store.max_bytes == 2 << 20


@pytest.mark.parametrize(("store", "expected"), [("device", ["meta", "meta"]), ("memory", None)])
def test_beside_the_model_an_activation_stays_on_its_device(store, expected):
    """On the meta device, from which nothing can be copied."""
    model, cache = tiny_bert(), FrozenPrefixCache(store)
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0", cache=cache)
    unfreezer.step(0)
    batch = batch_of(0, 1)
    model(**batch).loss.backward()
    activations = cache.active._stacks[0].activations
    keyed = activations.read({"input_ids": batch["input_ids"].flip(1)}, False)
    captured = {4: torch.empty(2, 8, 16, device="meta")}
    if expected is None:
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            activations.keep(keyed, range(2), captured)
    else:
        activations.keep(keyed, range(2), captured)
        assert [row.device.type for row in activations._get(keyed, range(2), 4)] == expected
    unfreezer.close()


def test_half_precision_is_near_and_half_the_size(make_trainer):
    plain, cached, cache = both(make_trainer, "head@0", cache=FrozenPrefixCache(dtype="bfloat16"))
    assert sum(row.nbytes for row in cache.store._rows.values()) == EXAMPLES * 8 * 16 * 2
    assert cache.store.nbytes == (EXAMPLES * 8 * 16 * 2 if DEVICE == "cpu" else SIZE)  # a slab
    one, other = ([r["loss"] for r in t.state.log_history if "loss" in r] for t in (plain, cached))
    assert one != other and one == pytest.approx(other, rel=0.05)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a setting of torch 2.9")
def test_the_precision_of_products_is_part_of_the_key(make_trainer, monkeypatch):
    """TrainingArguments(tf32=True) writes this setting, and torch's older question then fails."""
    cache = FrozenPrefixCache()
    make_trainer(UnfreezeCallback("head@0", cache=cache)).train()
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    make_trainer(UnfreezeCallback("head@0", cache=cache)).train()
    assert cache.stats.misses == 2 * EXAMPLES


def test_a_wrong_activation_is_found(monkeypatch):
    monkeypatch.setattr(activations_module, "CHECK_EVERY", 4)
    model, cache = tiny_bert(), FrozenPrefixCache()
    unfreezer = by_hand(model, cache)
    model(**batch_of(0, 1))
    model(**batch_of(0, 1))
    for row in cache.store._rows.values():
        row[0, 0] += 1
    with pytest.raises(UnfreezeError, match="is off by 1 when it is computed again"):
        for _ in range(4):
            model(**batch_of(0, 1))
    unfreezer.close()


def disk(tmp_path, **options):
    return FrozenPrefixCache("disk", folder=tmp_path / "cache", **options)


def test_runs_share_the_disk(make_trainer, tmp_path):
    first = disk(tmp_path)
    plain, cached, _ = both(make_trainer, DOWN, cache=first)
    assert hashes(plain.model) == hashes(cached.model)
    second = disk(tmp_path)
    again = make_trainer(UnfreezeCallback(DOWN, cache=second))
    again.train()
    assert hashes(again.model) == hashes(plain.model)
    assert second.stats.misses == 0
    other = disk(tmp_path)
    make_trainer(UnfreezeCallback("head@0", cache=other), model=tiny_bert(seed=1), num_train_epochs=1).train()
    assert other.stats.misses == EXAMPLES


ROW = [(b"k" * 32, torch.arange(12.0).reshape(3, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_disk_gives_back_the_bits(tmp_path, dtype):
    store = DiskStore(tmp_path, 1 << 24)
    store.put([(key, row.to(dtype)) for key, row in ROW])
    (row,) = store.get([ROW[0][0]])
    assert row.dtype == dtype and torch.equal(row, ROW[0][1].to(dtype))
    assert store.get([b"other"]) == [None]


@pytest.mark.parametrize("harm", ["garbage", "cut short"])
def test_a_damaged_file_is_begun_again(tmp_path, harm):
    import lmdb

    folder = tmp_path / "v1"
    folder.mkdir()
    env = lmdb.open(str(folder), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        for i in range(100):
            transaction.put(bytes([i]) * 16, bytes(5000))
    env.close()
    file = folder / "data.mdb"
    file.write_bytes(b"\x01" * 9000 if harm == "garbage" else file.read_bytes()[:20_000])
    with pytest.warns(UserWarning, match="begun again"):
        store = DiskStore(tmp_path, 1 << 24)
    store.put(ROW)
    assert torch.equal(store.get([ROW[0][0]])[0], ROW[0][1])


def test_a_damaged_row_is_a_miss(tmp_path):
    store = DiskStore(tmp_path, 1 << 24)
    store.put(ROW)
    with store._env.begin(write=True) as transaction:
        value = bytearray(transaction.get(ROW[0][0]))
        value[-1] ^= 1
        transaction.put(ROW[0][0], bytes(value))
    assert store.get([ROW[0][0]]) == [None]


def test_a_full_disk_ends_the_writing_and_not_the_run(make_trainer, tmp_path):
    cache = disk(tmp_path, max_bytes=1)
    with pytest.warns(UserWarning, match="writes no more to"):
        cache.store.put((bytes([i]) * 32, torch.zeros(25_000)) for i in range(100))
    trainer = make_trainer(UnfreezeCallback("head@0", cache=cache), num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 7 and cache.stats.misses == EXAMPLES


def test_the_newest_limit_of_a_shared_file_holds(tmp_path):
    first, second = DiskStore(tmp_path, 1 << 24), DiskStore(tmp_path, 1 << 23)
    assert first.max_bytes == second.max_bytes == DiskStore(tmp_path).max_bytes == 1 << 23


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnfreezeError, match=r"cannot hold a cache: .*file.*Give another folder"):
        DiskStore(tmp_path / "file")


def test_arguments(tmp_path, monkeypatch):
    parser = HfArgumentParser(UnfreezeArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--cache", "memory"])
    json.dumps(vars(arguments))
    assert isinstance(UnfreezeCallback.from_arguments(arguments).cache.store, MemoryStore)
    assert UnfreezeCallback("gradual").cache is None
    cache = FrozenPrefixCache()
    assert UnfreezeCallback(cache=cache).cache is cache
    for wrong, message in (
        ({"cache": "memori"}, "Did you mean 'memory'"),
        ({"cache": 3}, "a cache is 'memory', 'device', 'disk', 'disk:FOLDER'"),
    ):
        with pytest.raises(UnfreezeError, match=message):
            UnfreezeCallback(**wrong)
    for wrong, message in (
        ({"dtype": "bfloat61"}, "Did you mean 'bfloat16'"),
        ({"max_bytes": 0}, "above 0"),
        ({"max_bytes": "4GB"}, "max_bytes='4GB': write a number of bytes above 0"),
        ({"folder": "x"}, "folder is for the disk store"),
    ):
        with pytest.raises(UnfreezeError, match=message):
            FrozenPrefixCache(**wrong)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UnfreezeError, match=r"pip install 'hf-unfreeze\[cache\]'"):
        FrozenPrefixCache("disk", folder=tmp_path)


@pytest.mark.parametrize("callback", [UnfreezeCallback, lambda: UnfreezeCallback.from_arguments(UnfreezeArguments())])
def test_without_a_schedule_the_upper_part_trains_over_a_cache(make_trainer, monkeypatch, callback):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    trainer = make_trainer(callback(), num_train_epochs=2, dataloader_pin_memory=False)
    trainer.train()
    (phase,) = [record for record in trainer.state.log_history if "unfreeze/phase" in record]
    assert phase["unfreeze/trainable"] == "block[2:4], head"
    (recommended,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, UnfreezeCallback)]
    assert (recommended.cache.stats.hits, recommended.cache.stats.misses) == (EXAMPLES, EXAMPLES)
    assert UnfreezeCallback(cache="off").cache is None


def test_without_a_schedule_a_gpu_gets_no_cache_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert UnfreezeCallback().cache is None
    assert UnfreezeCallback(cache="memory").cache is not None


def test_a_loop_without_a_schedule_has_the_same(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model = tiny_bert()
    counts = count_rows(model)
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        unfreezer.step(step)
        model(**batch_of(0, 1)).loss.backward()
    assert counts[0] == counts[1] == 2 + 1, "rows, in three steps, and one alone to check"
    assert unfreezer.transition.trainable == "block[2:4], head"
    unfreezer.close()


def test_logs_and_timeline_say_what_the_cache_did(make_trainer):
    trainer = make_trainer(UnfreezeCallback("head@0", cache="memory"))
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    examples = len(trainer.train_dataset)
    counted = [(r["unfreeze/cache_hits"], r["unfreeze/cache_misses"]) for r in (logs[0], logs[6], logs[-1])]
    assert counted == [(0, 4), (0, examples), (2 * examples, examples)]
    held = examples * 8 * 16 * 4 if DEVICE == "cpu" else SIZE  # a slab
    assert logs[-1]["unfreeze/cache_bytes"] == held < logs[-1]["unfreeze/cache_max_bytes"]
    assert 0 == logs[0]["unfreeze/cache_seconds_saved"] < logs[-1]["unfreeze/cache_seconds_saved"]
    assert timeline(trainer).axes[0].get_title("right").startswith("cache: 67% found, ")
