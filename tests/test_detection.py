"""Detection: the same answer as the rows, a partition of every model of transformers, and models of nobody's.

CI sweeps every model at one of two depths; both: ``SWEEP=all pytest tests/test_detection.py -m slow`` (minutes).
"""

from __future__ import annotations

import os
import re

import model_zoo
import pytest
import torch
from torch import nn

from hf_unfreeze import layer_groups
from hf_unfreeze._rows import match_row
from hf_unfreeze._trace import first_use
from hf_unfreeze.architectures import find_architecture
from hf_unfreeze.detection import detect
from hf_unfreeze.groups import explain_groups

SHARDS = 8
# one pair of each class under a model type: the others build the same model
MODELS = list({(pair.model_type, pair.class_name): pair for pair in model_zoo.pairs()}.values())
REGISTERED = [pair for pair in MODELS if find_architecture(pair.model_type)]


def faults(model: nn.Module) -> list[str]:
    """What is wrong with the groups of a model, whatever it is: the first wrong parameter or group."""
    groups = layer_groups(model)
    owned = [name for group in groups for name in group.parameter_names]
    found = []
    if sorted(owned) != sorted(name for name, _ in model.named_parameters()):
        found.append("no partition")
    if len(groups) > 1 and (groups[0].name, groups[-1].name) != ("embeddings", "head"):
        found.append("ends are no embeddings and head")
    if any("block[" in group.name and not group.parameter_names for group in groups):
        found.append("a block without parameters")
    seen: dict[str, int] = {}
    for group in groups:
        match = re.fullmatch(r"(?:(.+)\.)?block\[(\d+)\]", group.name)
        if match and int(match[2]) != seen.setdefault(group.stack, 0):
            found.append(f"{group.name} out of order")
        if match:
            seen[group.stack] += 1
    tops = {group.stack: group.level for group in groups if "block[" in group.name}
    for group in groups:
        if group.name.endswith("connector") and group.level in [g.level for g in groups if g is not group]:
            found.append(f"{group.name} beside another group")
        if group.name.endswith(".connector") and group.level <= tops[group.stack]:
            found.append(f"{group.name} below its stack")
    return found


def swept(pairs, layers: int) -> tuple[int, dict[str, list[str]]]:
    tried, wrong = 0, {}
    for pair in pairs:
        model = model_zoo.try_build(pair, layers)
        if model is None:
            continue
        tried += 1
        found = faults(model)
        if found:
            wrong[str(pair)] = found
    return tried, wrong


@pytest.mark.parametrize("layers", [3, 12])
def test_a_sample_of_all_models(layers):
    tried, wrong = swept(MODELS[layers::60], layers)
    assert tried > 10
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 12])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_all_models(shard, layers):
    models = MODELS[shard::SHARDS]
    chosen = models if os.environ.get("SWEEP") == "all" else models[layers == 3 :: 2]
    tried, wrong = swept(chosen, layers)
    assert tried > len(chosen) / 2
    assert wrong == {}


def differences(pairs) -> dict[str, str]:
    """Pairs whose row and detection disagree, with the first parameter they differ in."""
    wrong = {}
    for pair in pairs:
        model = model_zoo.try_build(pair, 3)
        if model is None:
            continue
        layout, failed = match_row(model, find_architecture(pair.model_type))
        other = detect(model)
        if layout is None or layout.tiers != other.tiers:
            wrong[str(pair)] = failed or "stacks"
            continue
        for name, place in layout.places.items():
            if (place.stack, place.index) != (other.places[name].stack, other.places[name].index):
                wrong[str(pair)] = f"{name}: row {place}, detected {other.places[name]}"
                break
    return wrong


def test_one_class_of_each_row_is_detected_alike():
    first = {pair.model_type: pair for pair in reversed(REGISTERED)}
    assert len(first) >= 43
    assert differences(first.values()) == {}


@pytest.mark.slow
def test_every_class_of_each_row_is_detected_alike():
    assert differences(REGISTERED) == {}


class Nested(nn.Module):
    """Two stages of two blocks, a norm that runs first although it is registered last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2)) for _ in range(2)
        )
        self.out = nn.Linear(4, 2)
        self.entry = nn.LayerNorm(4)

    def forward(self, x):
        x = self.entry(self.stem(x))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.out(x)


def test_nested_lists_number_their_blocks_through():
    groups = layer_groups(Nested())
    assert [group.name for group in groups] == ["embeddings", *(f"block[{i}]" for i in range(4)), "head"]
    assert all(name.startswith("stages.1.0.") for name in groups[3].parameter_names)


def test_inputs_place_what_names_and_positions_cannot():
    model = Nested().train()
    state = torch.random.get_rng_state()
    home = {
        name: group.name for group in layer_groups(model, {"x": torch.zeros(1, 2, 4)}) for name in group.parameter_names
    }
    assert home["entry.weight"] == "embeddings"
    assert home["out.weight"] == "head"
    assert model.training and model.stages[0][0].training
    assert torch.equal(state, torch.random.get_rng_state())


def test_first_use_is_in_the_order_of_execution():
    order = first_use(Nested(), {"x": torch.zeros(1, 2, 4)})
    assert order["stem.weight"] < order["entry.weight"] < order["stages.0.0.norm1.weight"] < order["out.weight"]


def test_a_sequential_is_split_at_its_run_of_like_layers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert [(g.name, g.parameter_names) for g in layer_groups(model)] == [
        ("embeddings", ("0.weight", "0.bias")),
        ("block[0]", ("2.weight", "2.bias")),
        ("block[1]", ("4.weight", "4.bias")),
        ("head", ("5.weight", "5.bias")),
    ]


def test_equal_values_are_not_ties():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert sum(len(group.parameter_names) for group in layer_groups(model)) == 8
    model[3].weight = nn.Parameter(torch.zeros(2, 4))
    model[2].weight = model[1].weight
    groups = {group.name: group.parameter_names for group in layer_groups(model)}
    assert groups["block[0]"] == ("1.weight", "1.bias") and groups["block[1]"] == ("2.bias",)


def test_explanations_say_why():
    reasons = explain_groups(Nested())
    assert reasons["stem.weight"] == "stem (stem)"
    assert reasons["stages.0.0.norm1.weight"] == "block list stages"
    assert set(reasons) == {name for name, _ in Nested().named_parameters()}
