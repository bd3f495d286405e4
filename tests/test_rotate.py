"""A few blocks at a time, in turns: what the schedule says, and that the Trainer does it."""

from __future__ import annotations

import pytest
import torch
from conftest import hashes, tiny_bert
from test_schedule import plan, single, towers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
)

from hf_unfreeze import UnfreezeCallback, Unfreezer, layer_groups, parse_schedule, rotate
from hf_unfreeze._plan import plan_rows, plan_table
from hf_unfreeze.errors import ScheduleError, UnfreezeError
from hf_unfreeze.optim import OffloadState

SPEC = "rotate(blocks=1, every=3step)"


def turns(spec, groups, **length):
    """The blocks of each turn, as sets of names."""
    return [
        {name for name in phase.trainable if "block" in name} for phase in parse_schedule(spec).phases(groups, **length)
    ]


def test_the_spec_is_the_function():
    assert rotate(blocks=1, every="3step") == parse_schedule(SPEC)
    schedule = rotate(3, "0.5ep", seed=7, order="ascending", embeddings=False, head=False)
    assert parse_schedule(str(schedule)) == schedule


@pytest.mark.parametrize("blocks", [1, 2, 3, 12])
def test_every_round_visits_each_block_once(blocks):
    per_round = -(-12 // blocks)
    seen = turns(f"rotate(blocks={blocks}, every=1step)", single(12), total_steps=10 * per_round)
    if blocks == 12:
        assert seen == [{f"block[{i}]" for i in range(12)}]  # no change, no phase
        return
    rounds = [seen[i : i + per_round] for i in range(0, len(seen), per_round)]
    for drawn in rounds[:3]:  # equal neighbours at the border of two rounds would be one phase
        assert sorted(name for turn in drawn for name in turn) == sorted(f"block[{i}]" for i in range(12))
    assert len({tuple(map(frozenset, drawn)) for drawn in rounds}) > 1, "each round is drawn anew"


def test_connectors_train_with_the_head():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    images, texts = CLIPVisionConfig(**small, image_size=8, patch_size=4), LlamaConfig(**small, vocab_size=9)
    with torch.device("meta"):
        groups = layer_groups(LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=texts)))
    for head in (True, False):
        phases = rotate(blocks=1, every="1step", head=head).phases(groups, total_steps=8)
        assert {"connector" in phase.trainable for phase in phases} == {head}


def test_seeds_draw_differently_and_each_always_alike():
    drawn = [str(turns(f"rotate(every=1step, seed={seed})", single(12), total_steps=6)) for seed in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3
    assert plan("rotate(blocks=1, every=10%)")[:3] == [
        (0, "embeddings, block[2], head"),
        (7, "embeddings, block[0], head"),
        (14, "embeddings, block[1], head"),
    ]  # written down, so that another Python or release that draws differently is found


ORDERS = {
    "rotate(order=ascending, every=1ep, head=false)": [(0, "embeddings, block[0:2]"), (7, "embeddings, block[2:4]")],
    "rotate(order=descending, blocks=3, every=7step, embeddings=false)": [
        (0, "block[1:4], head"),
        (7, "block[0], head"),
    ],
    "rotate(order=ascending, blocks=2, every=40%, embeddings=false, head=false)": [
        (0, "block[0:2]"),
        (6, "block[2:4]"),
        (12, "block[0:2]"),
    ],
}


@pytest.mark.parametrize("spec", ORDERS)
def test_orders_and_what_trains_beside(spec):
    assert plan(spec, total_steps=14) == ORDERS[spec]


def test_stacks_take_turns_as_one_list():
    seen = turns("rotate(order=ascending, every=1step)", towers(), total_steps=3)
    assert seen == [
        {"encoder.block[0]", "encoder.block[1]"},
        {"encoder.block[2]", "decoder.block[0]"},
        {"decoder.block[1]"},
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rotate(order=randm)", "order=randm is none of random, ascending, descending. Did you mean 'random'"),
        ("rotate(blocks=0)", "blocks must be more than 0"),
        ("rotate(every=0)", "every must be more than 0"),
        ("rotate(seed=-1)", "whole number"),
        ("rotate(sed=1)", "Did you mean 'seed'"),
    ],
)
def test_bad_arguments(spec, message):
    with pytest.raises(ScheduleError, match=message):
        plan(spec)


def test_the_run_must_have_a_length_and_the_model_blocks():
    with pytest.raises(ScheduleError, match=r"Pass total_steps"):
        plan("rotate", total_steps=None)
    with pytest.raises(ScheduleError, match="this model has none"):
        plan("rotate", [single()[0], single()[-1]])


def test_exactly_the_blocks_of_the_turn_move(make_trainer):
    steps = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            steps.append(hashes(model))

    trainer = make_trainer(UnfreezeCallback(SPEC), Look())
    trainer.train()
    steps.append(hashes(trainer.model))
    groups = {g.name: set(g.parameter_names) for g in layer_groups(trainer.model)}
    phases = parse_schedule(SPEC).phases(layer_groups(trainer.model), total_steps=21)
    assert len(phases) == 7
    for step in range(21):
        open_now = max((phase for phase in phases if phase.start <= step), key=lambda phase: phase.start).trainable
        moved = {name for name, value in steps[step].items() if value != steps[step + 1][name]}
        assert moved == set().union(*(groups[name] for name in open_now)), step


@pytest.mark.parametrize("drop_state", [False, True])
def test_resume_is_exact(make_trainer, tmp_path, drop_state):
    def run(name, **arguments):
        callback = UnfreezeCallback(SPEC, drop_state=drop_state)
        return make_trainer(callback, output_dir=str(tmp_path / name), max_steps=9, **arguments)

    whole = run("run", save_strategy="steps", save_steps=2)
    whole.train()
    for step in (4, 6):
        again = run(f"again{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert hashes(again.model) == hashes(whole.model), step


def state_bytes(optimizer, device="cpu"):
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.device.type == device]
    return sum(value.numel() * value.element_size() for value in tensors)


def test_gradients_and_state_never_exceed_the_turn():
    """BAdam: without head and embeddings, and with drop_state, they are what the plan says of one block."""
    spec = "rotate(blocks=1, every=2step, embeddings=false, head=false)"
    model = tiny_bert()
    groups = layer_groups(model)
    rows = {row.start_step: row for row in plan_rows(model, groups, parse_schedule(spec).phases(groups, 16))}
    (everything,) = plan_rows(model, groups, parse_schedule("all@0").phases(groups))
    optimizer = torch.optim.AdamW(model.parameters())
    unfreezer = Unfreezer(model, optimizer, spec, total_steps=16, drop_state=True)
    for step in range(16):
        unfreezer.step(step)
        row = rows[step - step % 2]
        model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
        assert sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) == row.gradient_bytes
        optimizer.step()
        optimizer.zero_grad()
        counts = 4 * len(optimizer.state)  # of steps, one number for each tensor
        assert state_bytes(optimizer) - counts == row.optimizer_bytes == 2 * row.gradient_bytes
        assert state_bytes(optimizer) == pytest.approx(row.optimizer_bytes, rel=0.05)
    unfreezer.close()
    assert everything.optimizer_bytes > 7 * row.optimizer_bytes


SMALL = [
    GPT2Config(n_layer=8, n_embd=32, n_head=2, vocab_size=100, n_positions=8),
    LlamaConfig(num_hidden_layers=8, hidden_size=32, intermediate_size=88, num_attention_heads=2, vocab_size=100),
]


def bytes_held(config, spec, **options):
    """The most that gradients and Adam's state take at a step of a run, after a look at each: (measured, planned)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    groups = layer_groups(model)
    rows = plan_rows(model, groups, parse_schedule(spec).phases(groups, 61))
    optimizer = torch.optim.AdamW(model.parameters())
    unfreezer = Unfreezer(model, optimizer, spec, total_steps=61, **options)
    held = []
    for step in range(61):
        unfreezer.step(step)
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        row = [row for row in rows if row.start_step <= step][-1]
        held.append((gradients + state_bytes(optimizer), row.gradient_bytes + row.optimizer_bytes))
        assert held[-1][0] == pytest.approx(held[-1][1], rel=0.05), step
    unfreezer.close()
    return tuple(map(max, zip(*held, strict=True)))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.model_type)
def test_lisa_as_published_saves_the_memory_that_the_plan_says(config):
    """Two blocks, every 20 steps, embeddings and head all the time (arXiv 2403.17919): four turns."""
    (lisa, planned), (full, everything) = (
        bytes_held(config, "rotate(blocks=2, every=20step)", drop_state=True), bytes_held(config, "all_at_once")
    )  # fmt: skip
    assert full - lisa == pytest.approx(everything - planned, rel=0.05)
    assert lisa < 0.5 * full


def test_offloaded_state_leaves_the_device_and_comes_back():
    """On torch's lazy device, whose tensors are apart from those of the CPU."""
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    layers = [torch.nn.Linear(3, 3).to("lazy") for _ in range(2)]
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    offload = OffloadState(optimizer, parameters)
    moments = 2 * 4 * 12  # bytes of a layer
    for turn, away in ((0, 0), (1, moments), (0, moments)):
        for number, layer in enumerate(layers):
            layer.requires_grad_(number == turn)
        offload.update()
        layers[1](layers[0](torch.ones(2, 3, device="lazy"))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = 4 * len(optimizer.state)
        assert state_bytes(optimizer, "lazy") == moments
        assert state_bytes(optimizer) - counts == away
    offload.close()
    assert state_bytes(optimizer, "lazy") == 2 * moments
    saved = optimizer.state_dict()["state"]
    assert [float(saved[number]["step"]) for number in range(4)] == [2, 2, 1, 1]


def test_state_is_dropped_or_offloaded(make_trainer):
    with pytest.raises(UnfreezeError, match="exclude each other"):
        UnfreezeCallback(SPEC, drop_state=True, offload_state=True)
    weights = []
    for offload in (False, True):
        trainer = make_trainer(UnfreezeCallback(SPEC, offload_state=offload), max_steps=9)
        trainer.train()
        weights.append(hashes(trainer.model))
    assert weights[0] == weights[1]


def test_a_long_plan_is_cut_for_people():
    model = tiny_bert()
    groups = layer_groups(model)
    rows = plan_rows(model, groups, rotate(1, "1step").phases(groups, total_steps=500))
    table = plan_table(rows, "rotate")
    assert table.row_count == 50 and table.caption == f"and {len(rows) - 50} more phases"
