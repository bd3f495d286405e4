"""What frozen modules do besides not moving: statistics at rest, no dropout, no layers left out, no masks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import tiny_bert
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_unfreeze import UnfreezeCallback, Unfreezer, layer_groups

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic",
                          num_labels=3)  # fmt: skip
    return ResNetForImageClassification(config)


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(28)]


def wav2vec2(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
             "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2,
             "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
             "num_labels": 3, "vocab_size": 20}  # fmt: skip
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**(sizes | config)))


def speech():
    generator = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(320, generator=generator), "labels": i % 3} for i in range(28)]


def train(make_trainer, model, data, callback, **arguments):
    trainer = make_trainer(callback, model=model, **arguments)
    trainer.train_dataset = data
    trainer.train()
    return trainer


def statistics(model):
    """The running statistics of each BatchNorm, by the group its weight is in."""
    homes = {name: group.name for group in layer_groups(model) for name in group.parameter_names}
    return {
        (homes[f"{name}.weight"], name): (module.running_mean.cpu().clone(), module.num_batches_tracked.item())
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }


@pytest.mark.parametrize("frozen_eval", [True, False])
def test_running_statistics_of_frozen_blocks(make_trainer, frozen_eval):
    model = resnet()
    before = statistics(model)
    train(make_trainer, model, images(), UnfreezeCallback("head@0, block[-1]@0", frozen_eval=frozen_eval), max_steps=4)
    top = layer_groups(model)[-2].name
    seen = set()
    for (group, name), (mean, batches) in statistics(model).items():
        rests = frozen_eval and group != top
        seen.add(rests)
        assert batches == (0 if rests else 4), name
        assert torch.equal(mean, before[group, name][0]) is rests, name
    assert seen == ({True, False} if frozen_eval else {False})


def test_running_statistics_begin_to_move_when_the_block_opens(make_trainer):
    model = resnet()
    train(make_trainer, model, images(), UnfreezeCallback("head@0, block[-1]@2step, all@5step"), max_steps=7)
    top = layer_groups(model)[-2].name
    counts = {group: batches for (group, _), (_, batches) in statistics(model).items()}
    assert counts.pop(top) == 5
    assert set(counts.values()) == {2}


class Calls(TrainerCallback):
    """How often each block of the encoder ran in training."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.counts = [0] * len(model.wav2vec2.encoder.layers)
        for index, block in enumerate(model.wav2vec2.encoder.layers):
            block.register_forward_hook(lambda *_, index=index: self.count(index))

    def count(self, index):
        self.counts[index] += 1


def test_layerdrop_goes_by_the_mode_of_the_encoder(make_trainer):
    """Every block of a frozen encoder runs; once a block is open the encoder may leave out any, frozen ones too."""
    counts = {}
    for schedule in ("head@0", "head@0, block[-1]@0", "all@0"):
        calls = Calls()
        model = wav2vec2(layerdrop=0.5)
        trainer = make_trainer(calls, model=model, max_steps=7)
        trainer.train_dataset = speech()
        trainer.add_callback(UnfreezeCallback(schedule))
        trainer.train()
        counts[schedule] = calls.counts
    assert counts["head@0"] == [7, 7, 7]
    assert sum(counts["all@0"]) < 21
    assert sum(counts["head@0, block[-1]@0"][:2]) < 14


def test_a_dropped_block_keeps_its_weights_and_the_run_goes_on(make_trainer):
    model = wav2vec2(layerdrop=0.5)
    trainer = train(make_trainer, model, speech(), UnfreezeCallback("gradual(every=2step)"), max_steps=10)
    assert trainer.state.global_step == 10
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(("schedule", "masked"), [("head@0", False), ("all@0", True)])
def test_specaugment_masks_only_where_the_features_train(make_trainer, monkeypatch, schedule, masked):
    """Time masks are drawn where the model itself is in train mode: not while everything below the head is frozen."""
    model = wav2vec2(apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=2, mask_time_min_masks=1)
    drawn = []
    original = model.wav2vec2._mask_hidden_states

    def mask(hidden, *args, **kwargs):
        before = hidden.detach().clone()
        result = original(hidden, *args, **kwargs)
        drawn.append(not torch.equal(before, result))
        return result

    monkeypatch.setattr(model.wav2vec2, "_mask_hidden_states", mask)
    train(make_trainer, model, speech(), UnfreezeCallback(schedule), max_steps=3)
    assert drawn == [masked] * 3


class Stubborn(nn.Module):
    """Keeps part of itself in eval mode by a ``train`` of its own, as many detectors do with their BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()) for _ in range(3))
        self.out = nn.Linear(8, 2)
        self.trained = 0

    def train(self, mode=True):
        super().train(mode)
        self.trained += 1
        for block in self.blocks:
            block[1].eval()
        return self


def test_a_train_method_of_ones_own_is_called_and_obeyed():
    model = Stubborn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezer = Unfreezer(model, optimizer, "head@0, block[-1]@1step")
    for step in range(2):
        unfreezer.step(step)
        before = model.trained
        assert model.train() is model and model.trained == before + 1
        assert not any(block[1].training for block in model.blocks)
        assert [block[2].training for block in model.blocks] == [False, False, step == 1]
        model.eval()
        assert not any(module.training for module in model.modules())
    unfreezer.close()
    assert "train" not in vars(model)
    model.train()
    assert all(block[2].training for block in model.blocks) and not any(block[1].training for block in model.blocks)


def test_a_train_method_on_the_instance_is_put_back():
    model = tiny_bert()
    seen = []

    def own(mode=True):
        seen.append(mode)
        return type(model).train(model, mode)

    model.train = own
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0")
    unfreezer.step(0)
    model.train()
    assert seen and not model.bert.encoder.training and model.classifier.training
    unfreezer.close()
    assert vars(model)["train"] is own


def test_a_mode_that_was_changed_in_between_is_set_again():
    model = tiny_bert()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0")
    unfreezer.step(0)
    for _ in range(2):
        model.train()
        assert model.classifier.training and not any(module.training for module in model.bert.encoder.modules())
        model.bert.encoder.layer[0].train()
        model.classifier.eval()
    unfreezer.close()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_frozen(copied):
    model = tiny_bert()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), "head@0")
    unfreezer.step(0)
    model.train()
    other = copied(model)
    assert other.train() is other and all(module.training for module in other.modules())
    assert not model.bert.encoder.training, "and the original still is"
    unfreezer.close()
