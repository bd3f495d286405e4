"""Trainers built on Trainer: each a real run, in which exactly the open groups move."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import hashes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback, layer_groups

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL sets the old name
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "sat", "on", "the", "mat", "and", "saw", "one", "go", "by"]
SENTENCES = [" ".join(WORDS[4 + (i + k) % (len(WORDS) - 4)] for k in range(6)) for i in range(16)]
SIZES = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": len(WORDS)}


class Moves(TrainerCallback):
    """The groups that moved in each step."""

    def __init__(self):
        self.steps, self._before = [], {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self._before = hashes(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        after = hashes(model)
        moved = {name for name, value in after.items() if value != self._before[name]}
        self.steps.append({group.name for group in layer_groups(model) if moved & set(group.parameter_names)})


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=2, pad_token_id=0,
                                        bos_token_id=1, eos_token_id=2))  # fmt: skip


def options(tmp_path, **more):
    return {"output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none",
            "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False,
            **more}  # fmt: skip


def train(trainer):
    moves = Moves()
    trainer.add_callback(moves)
    trainer.train()
    return moves.steps


def test_seq2seq_trainer(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, decoder_start_token_id=0)
    data = [{"input_ids": torch.randint(1, 20, (6,)), "labels": torch.randint(1, 20, (4,))} for _ in range(16)]
    args = Seq2SeqTrainingArguments(**options(tmp_path), predict_with_generate=True)
    callback = UnfreezeCallback("head@0, decoder.block[-1]@1step, encoder.block[0]@2step, -head@2step")
    trainer = Seq2SeqTrainer(T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data,
                             callbacks=[callback])  # fmt: skip
    assert train(trainer) == [
        {"head"},
        {"decoder.block[1]", "head"},
        {"encoder.block[0]", "decoder.block[1]"},
    ]
    assert len(trainer.predict(data, max_new_tokens=4).predictions) == len(data)


def test_sft_trainer_by_a_yaml_of_trl(tmp_path):
    from datasets import Dataset
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

    config = {"dataset_name": "ours", "schedule": "head@0, block[-1]@1step, all@2step", **options(tmp_path)}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, UnfreezeArguments))
    _, args, _, unfreeze_args = parser.parse_args_and_config(["--config", str(tmp_path / "sft.yaml")])
    trainer = SFTTrainer(
        llama(), args, train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer(), callbacks=[UnfreezeCallback.from_arguments(unfreeze_args)],
    )  # fmt: skip
    assert train(trainer) == [{"head"}, {"block[1]", "head"}, {"embeddings", "block[0]", "block[1]", "head"}]


def test_dpo_trainer_leaves_the_reference_alone(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = {"prompt": SENTENCES, "chosen": SENTENCES[1:] + SENTENCES[:1], "rejected": SENTENCES[::-1]}
    reference = llama()
    trainer = DPOTrainer(
        llama(), reference, DPOConfig(**options(tmp_path)), train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(), callbacks=[UnfreezeCallback("head@0, block[-1]@1step, all@2step")],
    )  # fmt: skip
    before = hashes(reference)
    flags = [parameter.requires_grad for parameter in reference.parameters()]
    assert train(trainer) == [{"head"}, {"block[1]", "head"}, {"embeddings", "block[0]", "block[1]", "head"}]
    assert hashes(reference) == before
    assert [parameter.requires_grad for parameter in reference.parameters()] == flags


def sentence_trainer(tmp_path, callbacks, **more):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, num_hidden_layers=2)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    parts = [Transformer(str(tmp_path / "bert"), max_seq_length=8), Pooling(16), Dense(16, 8)]
    model = SentenceTransformer(modules=parts, device="cpu")
    pairs = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[1:] + SENTENCES[:1]})
    return SentenceTransformerTrainer(model, Arguments(**options(tmp_path, **more)), train_dataset=pairs,
                                      loss=MultipleNegativesRankingLoss(model), callbacks=callbacks)  # fmt: skip


def test_sentence_transformer_trainer(tmp_path):
    trainer = sentence_trainer(tmp_path, [UnfreezeCallback("head@0, block[-1]@1step, all@2step")])
    assert train(trainer) == [{"head"}, {"block[1]", "head"}, {"embeddings", "block[0]", "block[1]", "head"}]


def test_learning_rate_mapping_composes_with_layer_decay(tmp_path):
    rates = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}

            def look(raw, *_):
                rates.update({names[id(p)]: group["lr"] for group in raw.param_groups for p in group["params"]})

            optimizer.optimizer.register_step_pre_hook(look)

    callbacks = [UnfreezeCallback("all_at_once", layer_decay=0.5), Look()]
    trainer = sentence_trainer(tmp_path, callbacks, learning_rate_mapping={r"layer\.0\.": 1e-3}, max_steps=1)
    trainer.train()
    levels = {group.name: group.parameter_names for group in layer_groups(trainer.model)}
    found = {group: {f"{rates[name]:.4e}" for name in names} for group, names in levels.items()}
    expected = {"head": 1e-2, "block[1]": 1e-2 / 2, "block[0]": 1e-3 / 4, "embeddings": 1e-2 / 8}
    assert found == {group: {f"{rate:.4e}"} for group, rate in expected.items()}
