"""What only a GPU can show. Skipped but with TEST_DEVICE=cuda, which also sends every other training there."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from conftest import DEVICE, EXAMPLES, hashes, tiny_bert
from test_cache import DOWN, both, losses
from transformers import GPT2Config, GPT2LMHeadModel

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, Unfreezer, layer_groups, parse_schedule
from hf_unfreeze._plan import plan_rows

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and TEST_DEVICE=cuda"),
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
]
PRECISIONS = {"fp32": {}, "tf32": {"tf32": True}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
FUSED = {"fp16": True, "optim": "adamw_torch_fused"}  # the scaler is inside of the optimizer's kernel


@pytest.fixture(autouse=True)
def _products_as_before():
    """``tf32=True`` is a setting of the process, which the next test would inherit."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return PRECISIONS[request.param]


@pytest.mark.parametrize("arguments", [*PRECISIONS.values(), FUSED], ids=[*PRECISIONS, "fp16 fused"])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.8, "pull": 0.1, "offload_state": True}], ids=["", "options"])
def test_a_run_resumes_in_the_same_bits(make_trainer, tmp_path, arguments, options):
    def run(name, resume=None, **more):
        callback = UnfreezeCallback("head@0, block[-1]@2step, all@5step, -block[-1]@9step", **options)
        trainer = make_trainer(callback, output_dir=str(tmp_path / name), max_steps=12, **arguments, **more)
        trainer.train(resume_from_checkpoint=resume)
        assert next(trainer.model.parameters()).device.type == "cuda"
        return hashes(trainer.model)

    whole = run("run", save_strategy="steps", save_steps=2)
    for step in (2, 4, 6, 10):
        assert run("again", str(tmp_path / "run" / f"checkpoint-{step}")) == whole, f"resumed at step {step}"


def test_the_cache_changes_no_bit(make_trainer, precision):
    plain, cached, cache = both(make_trainer, DOWN, num_train_epochs=4, eval_strategy="epoch", **precision)
    checked = 2 * (cached.args.train_batch_size + cached.args.eval_batch_size)  # in full, when the boundary has moved
    assert cache.active.off == "" and cache.stats.hits == 3 * cache.stats.misses - checked
    assert losses(plain) == losses(cached)
    assert hashes(plain.model) == hashes(cached.model)


def test_a_store_on_the_card_changes_no_bit(make_trainer, precision):
    cache = FrozenPrefixCache("device")
    plain, cached, cache = both(make_trainer, DOWN, cache=cache, num_train_epochs=4, **precision)
    checked = 2 * cached.args.train_batch_size
    assert cache.active.off == "" and cache.stats.hits == 3 * cache.stats.misses - checked
    assert {row.device.type for row in cache.store._rows.values()} == {"cuda"}
    assert losses(plain) == losses(cached)
    assert hashes(plain.model) == hashes(cached.model)


def test_each_precision_has_activations_of_its_own(make_trainer):
    cache = FrozenPrefixCache()
    for count, arguments in enumerate(({}, {"bf16": True}, {"fp16": True}), 1):
        make_trainer(UnfreezeCallback("head@0", cache=cache), **arguments).train()
        assert cache.stats.misses == count * EXAMPLES


def synchronisations(model, size):
    """How often the host waits for the GPU in a forward whose examples are all stored."""
    batch = {"input_ids": torch.arange(1, size + 1)[:, None].repeat(1, 8), "attention_mask": torch.ones(size, 8).long()}
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    for _ in range(3):
        model(**batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        model(**batch)
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("store", ["memory", "device"])
def test_the_host_waits_once_for_a_batch_and_not_for_each_example(store):
    model = tiny_bert().cuda()
    own = synchronisations(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezer = Unfreezer(model, optimizer, "head@0", cache=store)
    unfreezer.step(0)
    assert synchronisations(model, 4) == synchronisations(model, 32) <= own + 2
    unfreezer.close()


def peak(spec, **options):
    """Peak of a run with hardly any activations, less the weights: (measured, planned)."""
    config = GPT2Config(n_layer=8, n_embd=512, n_head=8, vocab_size=2000, n_positions=8)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).cuda()
    groups = layer_groups(model)
    rows = plan_rows(model, groups, parse_schedule(spec).phases(groups, 61))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    unfreezer = Unfreezer(model, optimizer, spec, total_steps=61, **options)
    ids = torch.arange(8).cuda()[None]
    model(input_ids=ids, labels=ids).loss.backward()  # the first product of a process takes room to work in, for good
    model.zero_grad()
    gc.collect()  # what ran before in this process is not to be let go while this is measured
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for step in range(61):
        unfreezer.step(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = torch.cuda.max_memory_allocated() - before
    unfreezer.close()  # which brings back what was taken off
    return used, max(row.gradient_bytes + row.optimizer_bytes for row in rows)


@pytest.mark.parametrize("option", ["drop_state", "offload_state"])
def test_lisa_takes_off_the_card_what_the_plan_says(option):
    full, everything = peak("all_at_once")
    lisa, planned = peak("rotate(blocks=2, every=20step)", **{option: True})
    assert full - lisa == pytest.approx(everything - planned, rel=0.05)
