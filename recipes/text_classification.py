"""Fine-tune a text classifier from the top down.

python recipes/text_classification.py
    trains a MiniLM on 2,400 tweets, no hub needed, about two minutes on two CPU cores
python recipes/text_classification.py --model_name_or_path roberta-base --train_file mine.csv
    your model, your data: two columns, text and label
accelerate launch --multi_gpu --num_processes 2 recipes/text_classification.py
    the same on several processes
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import DataArguments, classification_metrics, embedded_model, finish, load_data, parse
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback


@dataclass
class RecipeUnfreezeArguments(UnfreezeArguments):
    """UnfreezeArguments with the schedule that suits the embedded data."""

    schedule: str = field(default="gradual(every=12%)", metadata={"help": "What trains when."})
    layer_decay: float = field(default=0.9, metadata={"help": "Factor on the rate from a level to the one below."})


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with defaults that suit the embedded model and data."""

    output_dir: str = "runs/text_classification"
    num_train_epochs: float = 2.0
    learning_rate: float = 5e-4
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    eval_strategy: str = "epoch"
    save_strategy: str = "no"
    logging_steps: float = 10
    report_to: str = "none"


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DataArguments, RecipeUnfreezeArguments, RecipeTrainingArguments
    )
    data = load_data(data_args)
    labels = sorted(set(data["train"]["label"]) | set(data["validation"]["label"]))
    name = data_args.model_name_or_path or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
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
        callbacks=[UnfreezeCallback.from_arguments(unfreeze_args)],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    finish(
        trainer, {"tasks": "text-classification", "finetuned_from": data_args.model_name_or_path or "all-MiniLM-L6-v2"}
    )


if __name__ == "__main__":
    main()
