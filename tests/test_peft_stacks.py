"""Selectors of PEFT models with several stacks, whose base weights train too: ``adapter`` and ``base`` have parts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from hf_unfreeze._adapters import _part, eligible_groups
from hf_unfreeze.errors import ScheduleError
from hf_unfreeze.groups import LayerGroup, layer_groups
from hf_unfreeze.schedule import Selector, parse_schedule, parse_selectors, spec_of


@pytest.fixture(scope="module")
def groups():
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2)
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    model = get_peft_model(T5ForConditionalGeneration(config), lora)
    model.requires_grad_(True)
    return eligible_groups(model, layer_groups(model))


def opened(text, groups):
    return spec_of(parse_schedule(f"{text}@0").phases(groups)[0].trainable, groups)


OPENED = {
    "adapter.block[-1:]": "adapter.encoder.block[2], adapter.decoder.block[1]",
    "adapter.block[0]": "adapter.encoder.block[0], adapter.decoder.block[0]",
    "adapter.decoder.block[-1]": "adapter.decoder.block[1]",
    "adapter.all": "adapter.encoder.block[0:3], adapter.decoder.block[0:2]",
    "adapter.encoder.all": "adapter.encoder.block[0:3]",
    "base.all": "base.embeddings, base.encoder.block[0:3], base.decoder.block[0:2], base.head",
    "base.embeddings": "base.embeddings",
    "block[-1]": "base.encoder.block[2], base.decoder.block[1], adapter.encoder.block[2], adapter.decoder.block[1]",
    "all": "all",
}


@pytest.mark.parametrize("text", OPENED)
def test_a_stack_means_the_stacks_within_it(text, groups):
    assert opened(text, groups) == OPENED[text]


@pytest.mark.parametrize("text", ["adapt.all", "ba.all", "encoder.block", "adapter.decod.all"])
def test_a_part_of_a_name_is_no_stack(text, groups):
    with pytest.raises(ScheduleError, match="matches nothing in this model"):
        opened(text, groups)


def test_the_specs_of_a_set_select_that_set(groups):
    names = ("base.encoder.block[0]", "base.encoder.block[1]", "base.head", "adapter.decoder.block[0]")
    assert set(parse_selectors(spec_of(names, groups)).phases(groups)[0].trainable) == set(names)


NAMES = {
    "one connector": ("embeddings", "vision.block[0]", "connector", "text.block[0]", "head"),
    "two connectors": ("embeddings", "embeddings.connector", "vision.block[0]", "vision.connector", "text.block[0]"),
    "a part of a stack": (
        "embeddings",
        "vision.block[0]",
        "vision.decoder.block[0]",
        "vision.decoder.block[1]",
        "head",
    ),
    "one stack": ("embeddings", "block[0]", "block[1]", "head"),
    "none": ("all_parameters",),
}


def made(names):
    stacks = {name: name.rpartition(".block")[0] or name.removesuffix(".connector") for name in names}
    plain = ("embeddings", "head", "block[0]", "block[1]", "all_parameters")
    return [LayerGroup(name, "" if name in plain else stack, ("weight",)) for name, stack in stacks.items()]


def adapted(names):
    return [_part(group, {"weight"}, part) for part in ("base", "adapter") for group in made(names)]


@pytest.mark.parametrize("case", NAMES)
def test_every_name_selects_exactly_its_group(case, groups):
    names = NAMES[case]
    for several in (made(names), adapted(names), groups):
        for group in several:
            assert Selector.parse(group.name).select(several) == [group.name]


def test_connectors_belong_to_their_part():
    several = adapted(NAMES["one connector"])
    assert Selector.parse("adapter.connector").select(several) == ["adapter.connector"]
    assert Selector.parse("connector").select(several) == ["base.connector", "adapter.connector"]
    assert "adapter.connector" in Selector.parse("adapter.all").select(several)


def test_a_slice_is_of_the_stack_itself_where_it_has_blocks():
    several = made(NAMES["a part of a stack"])
    assert Selector.parse("vision.block[-1]").select(several) == ["vision.block[0]"]
    assert len(Selector.parse("vision.all").select(several)) == 3
