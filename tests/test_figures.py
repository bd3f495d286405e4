"""The timeline, the heat map of a criterion, and what TensorBoard is given: their data, not their pixels."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import tiny_bert, tiny_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_unfreeze import UnfreezeCallback, UnfreezeError
from hf_unfreeze.report import heatmap, timeline


def trainable(record):
    return {"unfreeze/phase": 0, "unfreeze/trainable_params": 1, **record}


def cells(figure, rows):
    """Rates by group, bottom → top; None where it is grey."""
    mesh = figure.axes[0].collections[0]
    return [[None if value is None else round(value, 9) for value in row]
            for row in mesh.get_array().reshape(rows, -1).tolist()]  # fmt: skip


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_what_trains_after_the_last_log_is_not_grey():
    history = [
        trainable({"unfreeze/trainable": "head", "step": 0}),
        {"lr/block[0]": 0.0, "lr/block[1]": 0.0, "lr/head": 0.4, "loss": 1.0, "step": 4},
        trainable({"unfreeze/trainable": "block[1], head", "step": 6}),
        {"eval_loss": 1.0, "step": 9},
    ]
    figure = timeline(history)
    assert figure.axes[0].collections[0].get_coordinates()[0, :, 0].tolist() == [0, 4, 6, 9]
    assert cells(figure, 3) == [[None, None, None], [None, None, 0.4], [0.4, 0.4, 0.4]]


def test_what_the_next_log_finds_frozen_has_the_nearest_rate_of_its_own():
    history = [
        trainable({"unfreeze/trainable": "block[0:2]", "step": 0}),
        {"lr/block[0]": 0.1, "lr/block[1]": 0.2, "lr/head": 0.0, "loss": 1.0, "step": 2},
        trainable({"unfreeze/trainable": "head", "step": 3}),
        trainable({"unfreeze/trainable": "block[1]", "step": 5}),
        {"lr/block[0]": 0.0, "lr/block[1]": 0.3, "lr/head": 0.0, "loss": 1.0, "step": 6},
    ]
    assert cells(timeline(history), 3) == [[0.1, 0.1, None, None], [0.2, 0.3, None, 0.3], [None, None, 0.3, None]]


def test_before_the_first_transition_of_a_run_all_trained():
    history = [
        {"lr/block[0]": 0.1, "lr/head": 0.2, "loss": 1.0, "step": 2},
        trainable({"unfreeze/trainable": "head", "step": 4}),
        {"lr/block[0]": 0.0, "lr/head": 0.3, "loss": 1.0, "step": 6},
    ]
    assert cells(timeline(history), 2) == [[0.1, 0.1, None], [0.2, 0.3, 0.3]]


def test_every_data_set_of_a_dict_has_a_line(make_trainer):
    trainer = make_trainer(UnfreezeCallback("head@0"), max_steps=14, eval_strategy="epoch")
    trainer.eval_dataset = {"old": tiny_data(1), "new": tiny_data(2)}
    trainer.compute_metrics = lambda prediction: {"accuracy": float((prediction.label_ids == 0).mean())}
    trainer.train()
    bottom = timeline(trainer).axes[1]
    assert bottom.get_ylabel() == "accuracy (evaluation)"
    assert [text.get_text() for text in bottom.get_legend().get_texts()] == ["old", "new"]
    wanted = [
        [r[key] for r in trainer.state.log_history if key in r] for key in ("eval_old_accuracy", "eval_new_accuracy")
    ]
    assert [line.get_ydata().tolist() for line in bottom.lines] == wanted
    assert timeline(trainer, "eval_new_loss").axes[1].get_ylabel() == "new_loss (evaluation)"


def test_the_embeddings_are_lowest_and_a_connector_lies_between_its_stacks():
    names = ["embeddings", "vision.block[0]", "vision.block[1]", "connector", "text.block[2]", "text.block[10]", "head"]
    for keys in (names, sorted(names)):  # as logged, and as saved
        assert labels(timeline([{**{f"lr/{name}": 0.1 for name in keys}, "loss": 1.0, "step": 1}])) == names
    peft = [f"{part}.{name}" for part in ("base", "adapter") for name in names]
    for keys in (peft, sorted(peft)):
        assert labels(timeline([{**{f"lr/{name}": 0.1 for name in keys}, "loss": 1.0, "step": 1}])) == peft
    encoder_decoder = ["embeddings", "encoder.block[0]", "connector", "decoder.block[0]", "head"]
    assert labels(timeline([{f"lr/{name}": 0.1 for name in encoder_decoder} | {"step": 1}])) == encoder_decoder
    assert labels(timeline([{f"lr/{name}": 0.1 for name in sorted(encoder_decoder)} | {"step": 1}]))[0] == "embeddings"


def test_how_far_each_group_has_gone(make_trainer):
    model = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(UnfreezeCallback("head@0, block[3]@0"), model=model, max_steps=3)
    trainer.train()
    model.cpu()
    gone = [bar.get_width() for bar in timeline(trainer, pretrained=before).axes[1].patches]
    assert gone[:4] == [0.0] * 4 and min(gone[4:]) > 0
    head = [(p.detach() - before[name]).square().sum() for name, p in model.named_parameters() if "layer" not in name]
    assert gone[5] == pytest.approx(float(torch.stack(head).sum().sqrt()), rel=1e-5)
    assert timeline(trainer, pretrained=model).axes[1].patches[5].get_width() == 0.0
    with pytest.raises(UnfreezeError, match="give the Trainer as run"):
        timeline(trainer.state.log_history, pretrained=before)
    with pytest.raises(UnfreezeError, match="none of the weights"):
        timeline(trainer, pretrained=torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
def test_the_heat_map_shows_what_was_measured_and_chosen(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback("auto(fisher, every=3step, batches=2)"), max_steps=12)
    trainer.train()
    trainer.save_state()
    saved = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    for run in (trainer, saved):
        figure = heatmap(run)
        axes = figure.axes[0]
        mesh, dots = axes.collections
        worth = mesh.get_array().reshape(4, -1)
        assert labels(figure) == [f"block[{index}]" for index in range(4)]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "6", "9"]
        assert (~worth.mask).sum(axis=0).tolist() == [4, 3, 2]  # what is open is not measured again
        assert len(dots.get_offsets()) == 3
        for x, y in dots.get_offsets():
            assert worth[int(y), int(x)] == worth[:, int(x)].max()
        assert axes.get_title().startswith("fisher")


@pytest.mark.filterwarnings("ignore:.* measures on .* batches at each choice:UserWarning")
def test_the_heat_map_shows_what_was_frozen(make_trainer):
    trainer = make_trainer(UnfreezeCallback("freeze_converged(every=3step, batches=2)"), max_steps=9)
    trainer.train()
    figure = heatmap(trainer)
    frozen = [record for record in trainer.state.log_history if record.get("unfreeze/reason")]
    assert frozen and len(figure.axes[0].collections[1].get_offsets()) >= len(frozen)


def test_nothing_measured_is_an_error():
    with pytest.raises(UnfreezeError, match="no choice of a criterion"):
        heatmap([{"loss": 1.0, "step": 1}])


def test_tensorboard_gets_phases_rates_and_the_timeline(make_trainer, tmp_path):
    trainer = make_trainer(UnfreezeCallback("head@0, all@3step"), max_steps=5, report_to="tensorboard")
    trainer.train()
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(f"train/{name}")] for name in
               ("unfreeze/phase", "lr/head", "lr/block[0]")}  # fmt: skip
    assert scalars["unfreeze/phase"] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]
    assert [value > 0 for _, value in scalars["lr/block[0]"]] == [False, False, False, True, True]
    assert scalars["lr/head"][0] == (1, pytest.approx(0.01))
    (image,) = events.Images("unfreeze/timeline")
    assert image.step == 5 and image.width > 500 and image.encoded_image_string.startswith(b"\x89PNG")
