"""Adapters: they open block by block, the base never by itself, and what is trained merges."""

from __future__ import annotations

import pytest
import torch
from conftest import hashes, tiny_bert, tiny_data
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from test_cache import batch_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback, Unfreezer, set_trainable
from hf_unfreeze.errors import ScheduleError, StructureError, UnfreezeError

BERT = {"task_type": "SEQ_CLS"}  # PEFT then trains the classifier too
LORA = {**BERT, "target_modules": ["query", "value"], "lora_dropout": 0.1}
METHODS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora with biases": LoraConfig(**LORA, use_rslora=True, bias="all"),
    "ia3": IA3Config(**BERT, target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["classifier", "pooler"]),
}


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(tiny_bert(), config)


def moved(before, model):
    return {name for name, value in hashes(model).items() if value != before[name]}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_open_block_by_block(make_trainer, method):
    model = adapted(METHODS[method])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = hashes(model)
    make_trainer(UnfreezeCallback("head@0, block[-1]@3step, block[-2:]@6step"), model=model, num_train_epochs=2).train()
    opened = {name for name in trainable if "layer.2." in name or "layer.3." in name or "encoder.layer" not in name}
    opened -= {name for name in trainable if ".embeddings." in name}
    assert moved(before, model) == opened != trainable
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("method", METHODS)
def test_all_at_once_is_bit_identical_to_no_callback(make_trainer, method):
    models = [adapted(METHODS[method]), adapted(METHODS[method])]
    make_trainer(UnfreezeCallback("all_at_once"), model=models[0], num_train_epochs=1).train()
    make_trainer(model=models[1], num_train_epochs=1).train()
    assert hashes(models[0]) == hashes(models[1])


def disabled_before(model, loss):
    with torch.no_grad(), model.disable_adapter():
        model(**batch_of(0, 1))
    return loss()


def disabled_after(model, loss):
    own = loss()
    with torch.no_grad(), model.disable_adapter():
        model(**batch_of(0, 1))
    return own


def changed_twice(model, loss):
    model.set_adapter("other")
    model.set_adapter("default")
    return loss()


@pytest.mark.filterwarnings("ignore:.*it costs .* more than:UserWarning")
@pytest.mark.parametrize("way", [disabled_before, disabled_after, changed_twice])
@pytest.mark.parametrize(
    ("schedule", "cache"),
    [("head@0, block[-1]@3step", None), ("head@0, block[-1]@3step", "memory"), ("auto(fisher, every=3step)", None)],
)
def test_flags_stay_where_peft_opens_every_adapter(make_trainer, way, schedule, cache):
    """What preference training does for its reference: the model without its adapters, or with others."""

    def trained(way, cache):
        quiet = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = get_peft_model(quiet, LoraConfig(**LORA | {"lora_dropout": 0.0}))
        model.add_adapter("other", LoraConfig(**LORA))
        trainer = make_trainer(UnfreezeCallback(schedule, cache=cache), model=model, max_steps=6)
        own = trainer.compute_loss
        if way is not None:
            trainer.compute_loss = lambda model, *args, **kwargs: way(model, lambda: own(model, *args, **kwargs))
        trainer.train()
        return hashes(model)

    assert trained(way, cache) == trained(None, None)


def test_prompts_open_with_the_embeddings(make_trainer):
    model = adapted(PromptTuningConfig(**BERT, num_virtual_tokens=3))
    before = hashes(model)
    make_trainer(UnfreezeCallback("head@0, embeddings@3step"), model=model, num_train_epochs=1).train()
    names = moved(before, model)
    assert "prompt_encoder.default.embedding.weight" in names
    assert {name.partition(".modules_to_save.")[0] for name in names if "prompt" not in name} == {
        "base_model.classifier"
    }


def test_merged_afterwards(make_trainer):
    model = adapted(METHODS["lora"])
    trainer = make_trainer(UnfreezeCallback("gradual(every=2step)"), model=model, num_train_epochs=2)
    trainer.train()
    model.cpu().eval()
    inputs = {"input_ids": torch.stack([example["input_ids"] for example in tiny_data()])}
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = model.merge_and_unload()
        assert type(merged) is type(tiny_bert())
        torch.testing.assert_close(merged(**inputs).logits, expected)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                         num_key_value_heads=2, num_hidden_layers=3, pad_token_id=0)  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0)
    return get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    )


DROPOUTS = {
    "bert": (lambda: adapted(METHODS["lora"]), ".layer.3."),
    "bert, not in every block": (lambda: adapted(LoraConfig(**LORA, layers_to_transform=[0, 3])), ".layer.3."),
    "gpt2": (gpt2, ".h.3."),
}
BELOW = (".embeddings.", ".layer.0.", ".layer.1.", ".layer.2.", ".transformer.drop", ".h.0.", ".h.1.", ".h.2.")


@pytest.mark.parametrize("name", DROPOUTS)
def test_the_base_below_frozen_adapters_has_no_dropout_and_is_cached(make_trainer, name):
    make, top = DROPOUTS[name]
    model, cache = make(), FrozenPrefixCache()
    trainer = make_trainer(UnfreezeCallback("block[-1]@0, all@11step", cache=cache), model=model, num_train_epochs=3)
    noisy = []
    training_step = trainer.training_step

    def watched(model, *args, **kwargs):
        loss = training_step(model, *args, **kwargs)
        noisy.append({n for n, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training})
        return loss

    trainer.training_step = watched
    if name == "gpt2":
        trainer.train_dataset = [{**example, "labels": example["input_ids"]} for example in tiny_data()]
    trainer.train()
    assert cache.stats.hits > 0
    assert any(top in module for module in noisy[0])
    assert not any(part in module for module in noisy[0] for part in BELOW)
    assert noisy[-1] == {n for n, module in model.named_modules() if isinstance(module, nn.Dropout)}


def phases_of(model, schedule):
    unfreezer = Unfreezer(model, torch.optim.AdamW(model.parameters()), schedule)
    seen = []
    for step in range(12):
        transition = unfreezer.step(step)
        if transition:
            names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            seen.append((transition.trainable, names))
    unfreezer.close()
    return seen


def test_an_empty_block_is_refused_with_one_that_has_adapters():
    model = adapted(LoraConfig(**LORA, layers_to_transform=[0, 1]))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UnfreezeError, match=r"for instance head@0 or (block\[1\]@0)\.$") as refused:
        Unfreezer(model, optimizer, "block[-1]@0")
    unfreezer = Unfreezer(model, optimizer, refused.value.args[0].rpartition(" or ")[2].rstrip("."))
    assert unfreezer.step(0).trainable == "block[1]"
    unfreezer.close()


def test_gradual_without_a_head_begins_with_the_top_adapter():
    seen = phases_of(llama(), "gradual(every=1step)")
    assert [spec for spec, _ in seen] == ["block[2]", "block[1:3]", "all"]
    assert all("lora_" in name for _, names in seen for name in names)


def test_the_base_opens_after_the_adapters_where_it_is_trainable():
    model = llama()
    model.requires_grad_(True)
    seen = phases_of(model, "adapter.block[-1]@0, adapter.all@1step, base.block[-2:]@2step, all@3step")
    assert [spec for spec, _ in seen] == [
        "adapter.block[2]",
        "adapter.block[0:3]",
        "base.block[1:3], adapter.block[0:3]",
        "all",
    ]
    assert all("lora_" in name for name in seen[1][1])
    base = {name for name in seen[2][1] if "lora_" not in name}
    assert base and all(".layers.1." in name or ".layers.2." in name for name in base)
    assert [spec for spec, _ in phases_of(model, "gradual(every=1step)")][:4] == [
        "adapter.block[2]",
        "adapter.block[1:3]",
        "adapter.block[0:3]",
        "base.head, adapter.block[0:3]",
    ]


def test_the_base_trains_in_a_real_run(make_trainer):
    model = adapted(METHODS["lora"])
    model.base_model.model.bert.encoder.layer[3].requires_grad_(True)
    before = hashes(model)
    schedule = "adapter.all@0, base.block[-1]@3step"
    make_trainer(UnfreezeCallback(schedule, layer_decay=0.9), model=model, num_train_epochs=1).train()
    names = moved(before, model)
    base = {name for name in names if "lora_" not in name and "modules_to_save" not in name}
    assert base and all("layer.3." in name for name in base)
    assert {"base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"} < names


def test_an_adapter_loaded_for_inference_is_refused(make_trainer):
    model = adapted(METHODS["lora"])
    model.requires_grad_(False)
    trainer = make_trainer(UnfreezeCallback("gradual"), model=model, optimizers=(torch.optim.AdamW(model.parameters()),
                                                                                 None))  # fmt: skip
    with pytest.raises(ScheduleError, match="is_trainable=True"):
        trainer.train()


def test_set_trainable_means_adapters_however_often():
    model = adapted(METHODS["lora"])
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    head = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - adapters
    for selectors, layers in (("head", ""), ("block[-1]", "3"), ("block[:2], head", "01"), ("all", "0123")):
        set_trainable(model, selectors)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        opened = {name for name in adapters if name.partition(".layer.")[2][0] in layers}
        assert trained == opened | (head if selectors != "block[-1]" else set())


def test_fresh_blocks_come_before_the_adapters(make_trainer):
    trainer = make_trainer(UnfreezeCallback("all_at_once", reinitialize="block[-1]"), model=adapted(METHODS["lora"]))
    with pytest.raises(StructureError, match="before get_peft_model"):
        trainer.train()


def test_embeddings_of_the_base_stay_closed_where_asked():
    model = llama()
    model.requires_grad_(True)
    seen = phases_of(model, "gradual(every=1step, embeddings=false)")
    assert not any("embed_tokens" in name for _, names in seen for name in names)


def test_the_cache_knows_the_later_phases_of_base_and_adapters():
    model = llama()
    model.requires_grad_(True)
    cache = FrozenPrefixCache()
    schedule = "adapter.block[-1]@0, adapter.block[-2:]@1step, base.block[-2:]@2step"
    unfreezer = Unfreezer(model, torch.optim.AdamW(model.parameters()), schedule, cache=cache)
    unfreezer.step(0)
    (stack,) = cache.active._stacks
    assert stack.activations.wanted == {1, 2}
    unfreezer.close()
