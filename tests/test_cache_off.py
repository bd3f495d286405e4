"""What the frozen-prefix cache cannot do: it says so in one line, and training is as without it."""

from __future__ import annotations

import pytest
import torch
from conftest import BLOCKS, hashes, tiny_bert
from test_cache import batch_of, by_hand
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_unfreeze import FrozenPrefixCache, UnfreezeCallback

pytestmark = pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


class WithLowestStates(BertForSequenceClassification):
    """Its head adds what the lowest block returns."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.bert(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        logits = self.classifier((states[-1] + states[1])[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithTrainableScale(nn.Module):
    """A parameter that training opens with the head, below the frozen blocks."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3)])
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.tokens(input_ids) * self.head.bias.mean()
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithBatchNorm(nn.Module):
    """Blocks of convolution and batch norm."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)) for _ in range(3)])
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden.mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def seeded(make):
    def model():
        torch.manual_seed(0)
        return make()

    return model


def tiny_bert_with_a_hook():
    """Its hook reads what a frozen block returns."""
    model = tiny_bert()
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: None)
    return model


OFF = {
    "random numbers are drawn": (tiny_bert, {"frozen_eval": False}),
    "a batch norm": (seeded(WithBatchNorm), {"frozen_eval": False}),
    "something besides the blocks": (
        seeded(lambda: WithLowestStates(BertConfig(vocab_size=50, num_labels=3, **SIZES))), {}),
    "head.bias is trainable and runs below": (seeded(WithTrainableScale), {}),
    "not called once each": (
        seeded(lambda: AlbertForSequenceClassification(
            AlbertConfig(vocab_size=50, num_labels=3, embedding_size=16, **SIZES))), {}),
    "a forward hook on a frozen BertLayer": (tiny_bert_with_a_hook, {}),
    "output_hidden_states=True": (lambda: tiny_bert(output_hidden_states=True), {}),
}  # fmt: skip


@pytest.mark.parametrize("reason", OFF)
def test_off_with_a_reason_and_the_same_bits(make_trainer, reason):
    model, options = OFF[reason]
    trained = []
    for cache in (None, FrozenPrefixCache()):
        trainer = make_trainer(UnfreezeCallback("head@0", cache=cache, **options), model=model(), num_train_epochs=2)
        if cache is None:
            trainer.train()
        else:
            with pytest.warns(UserWarning, match=reason):
                trainer.train()
        trained.append(hashes(trainer.model))
    assert trained[0] == trained[1]
    assert reason in cache.active.off
    assert cache.stats.hits == 0


def test_spec_augment_and_a_schedule_that_opens_all_are_told_before_any_forward(make_trainer):
    with pytest.warns(UserWarning, match="never leaves the embeddings and the lowest block frozen"):
        make_trainer(UnfreezeCallback("all_at_once", cache="memory"), max_steps=1).train()
    model = tiny_bert(apply_spec_augment=True, mask_time_prob=0.05)
    with pytest.warns(UserWarning, match="SpecAugment changes the inputs"):
        by_hand(model, "memory").close()


def test_a_model_without_like_blocks_is_told():
    with pytest.warns(UserWarning, match="has no stack of blocks"):
        by_hand(nn.Sequential(nn.Linear(2, 2)), "memory", "all_at_once").close()


def test_prompt_tuning_sends_a_gradient_through_the_prefix():
    import peft

    model = peft.get_peft_model(tiny_bert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    unfreezer = by_hand(model, "memory", "all@0")
    with pytest.warns(UserWarning, match="a gradient flows into inputs_embeds"):
        loss = model(**batch_of(0, 1), attention_mask=torch.ones(2, 8, dtype=torch.long)).loss
    loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
    unfreezer.close()


def test_lora_in_the_top_block_only_leaves_the_rest_to_the_cache():
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[BLOCKS - 1])
    cache = FrozenPrefixCache()
    quiet = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # the base of PEFT stays in train mode
    model = peft.get_peft_model(quiet, config)
    unfreezer = by_hand(model, cache, "all@0")
    for _ in range(3):
        model(**batch_of(0, 1)).loss.backward()
    assert (cache.stats.hits, cache.stats.misses) == (4, 2)
    unfreezer.close()


def test_one_forward_that_asks_for_hidden_states_gets_them():
    model, cache = tiny_bert().eval(), FrozenPrefixCache()
    unfreezer = by_hand(model, cache)
    model.eval()
    model(**batch_of(0, 1))
    with pytest.warns(UserWarning, match="such a forward runs in full"):
        states = model(**batch_of(0, 1), output_hidden_states=True).hidden_states
    model(**batch_of(0, 1))
    assert cache.stats.hits == 2
    unfreezer.close()
    expected = model.eval()(**batch_of(0, 1), output_hidden_states=True).hidden_states
    assert len(states) == BLOCKS + 1 and all(map(torch.equal, states, expected))


class Noisy(BertForSequenceClassification):
    """Code between the embeddings and the blocks that draws once training has reached the second phase."""

    noisy = False

    def __init__(self, config):
        super().__init__(config)
        self.bert.encoder.register_forward_pre_hook(self._draw)

    def _draw(self, module, args):
        return (args[0] + torch.rand(1), *args[1:]) if self.noisy else args


def test_random_numbers_drawn_from_a_later_phase_on_are_noticed():
    torch.manual_seed(0)
    model, cache = Noisy(BertConfig(vocab_size=50, num_labels=3, **SIZES)), FrozenPrefixCache()
    unfreezer = by_hand(model, cache, "head@0, block[-1]@1step")
    model(**batch_of(0, 1))
    unfreezer.step(1)
    model.noisy = True
    with pytest.warns(UserWarning, match="random numbers are drawn below the boundary"):
        torch.manual_seed(5)
        cached = model(**batch_of(0, 1)).logits
    torch.manual_seed(5)
    unfreezer.close()
    model.train()
    model.bert.embeddings.eval(), model.bert.encoder.layer[0].eval()
    assert torch.equal(cached, model(**batch_of(0, 1)).logits)
