"""Really quantised layers: what torch.ao.quantization, torchao and bitsandbytes make of weights never opens."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import BertForSequenceClassification

from hf_unfreeze import Unfreezer, layer_groups, set_trainable
from hf_unfreeze._probe import Probe
from hf_unfreeze.errors import EnvironmentRefused, ScheduleError

NAMES = ["embeddings", "block[0]", "block[1]", "block[2]", "block[3]", "head"]
PROBE = Probe(lambda model, batch: model(**batch).loss, list, list, per_step=1000)


def homes(model: nn.Module) -> dict[str, str]:
    return {name: group.name for group in layer_groups(model) for name in group.parameter_names}


def names(model: nn.Module) -> list[str]:
    return [group.name for group in layer_groups(model)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in tiny_data()[:4]]) for key in tiny_data()[0]}
    model(**batch).loss.backward()
    optimizer.step()


def dynamic(model: nn.Module, kinds: set) -> nn.Module:
    """What torch.ao.quantization makes of a model, less its warnings of deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)


def test_a_dynamically_quantised_model_is_mapped_and_refused():
    model = dynamic(tiny_bert(), {nn.Linear})
    assert names(model) == NAMES
    assert homes(model)["bert.encoder.layer.2.output.LayerNorm.bias"] == "block[2]"
    for start in (lambda: set_trainable(model, "all"), lambda: Unfreezer(model, sgd(model), "gradual")):
        with pytest.raises(EnvironmentRefused, match=r"no gradient flows through .* up to classifier[.]"):
            start()


def test_a_head_above_dynamically_quantised_layers_trains():
    model = tiny_bert()
    model.bert.encoder = dynamic(model.bert.encoder, {nn.Linear})
    with pytest.warns(UserWarning, match="no gradient flows through 24 layers"):
        set_trainable(model, "head")
    before = hashes(model)
    train(model, sgd(model))
    assert {name for name, digest in hashes(model).items() if digest != before[name]} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_a_block_of_dynamically_quantised_layers_keeps_its_number():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(4))
    model.layers[1] = dynamic(model.layers[1], {nn.Linear})
    model.head = nn.Linear(3, 1)
    assert names(model) == NAMES
    assert homes(model)["layers.3.0.bias"] == "block[3]"


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights, the quantised ones as numbers."""
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    return {name: tensor.dequantize() if hasattr(tensor, "qdata") else tensor.clone() for name, tensor in named}


def test_the_weights_of_torchao_stay_frozen():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_bert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    packed = {name for name, module in model.named_parameters() if not module.requires_grad}
    assert len(packed) == 26
    assert names(model) == NAMES
    assert homes(model)["bert.encoder.layer.2.attention.self.query.weight"] == "block[2]"
    with pytest.warns(UserWarning, match="26 weights of BertForSequenceClassification are quantised"):
        engine = Unfreezer(model, sgd(model), "all@0")
    engine.step(0, 0.0)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == packed
    before = values(model)
    train(model, engine.optimizer)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert "bert.encoder.layer.2.attention.self.query.bias" in moved and not moved & packed
    engine.close()


@pytest.mark.filterwarnings("ignore:.* of BertForSequenceClassification are quantised:UserWarning")
@pytest.mark.parametrize("spec", ["auto(fisher, every=1step)", "freeze_converged(every=1step)"])
def test_no_criterion_measures_quantised_blocks(spec):
    model = tiny_bert()
    for parameter in model.bert.encoder.parameters():
        parameter.requires_grad_(False).data = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ScheduleError, match="has no block to measure: all weights of the blocks are quantised"):
        Unfreezer(model, sgd(model), spec, probe=PROBE)


@pytest.mark.parametrize("spec", ["auto(fisher, every=1step)", "auto(cka, every=1step)", "learn_rates(every=1step)"])
def test_no_criterion_measures_weights_without_values(spec):
    with torch.device("meta"):
        model = BertForSequenceClassification(tiny_bert().config)
    with pytest.raises(EnvironmentRefused, match="is on the meta device"):
        Unfreezer(model, sgd(model), spec, probe=PROBE)


def test_bytes_are_quantised_weights():
    model = tiny_bert()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match="1 weights"):
        set_trainable(model, "head")
    assert model.classifier.bias.requires_grad and not model.classifier.weight.requires_grad
    for parameter in model.parameters():
        parameter.requires_grad_(False).data = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ScheduleError, match="every parameter of BertForSequenceClassification is quantised"):
        set_trainable(model, "all")


def test_a_frozen_weight_that_is_sharded_is_not_taken_for_a_quantised_one():
    """FSDP2's parameters are made of a part and a mesh of devices, which has no dtype."""
    model = tiny_bert()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model.classifier.weight.requires_grad_(False)
        fully_shard(model, mesh=mesh)
        assert homes(model).keys() == dict(model.named_parameters()).keys()
        set_trainable(model, "head")
        assert model.classifier.weight.requires_grad
    finally:
        torch.distributed.destroy_process_group()
