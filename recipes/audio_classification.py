"""Fine-tune a classifier of sounds: the top half of a Whisper's encoder, on a lower half that is cached.

python recipes/audio_classification.py
    tells which part of a telephone system speaks, no hub needed
python recipes/audio_classification.py --dataset_name my_sounds
    your data: a folder with one folder of sound files for each class; or --train_file mine.csv, columns audio and label
accelerate launch --multi_gpu --num_processes 2 recipes/audio_classification.py
    the same on several processes
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from audio import AudioArguments, Listener, by_folder, stack, without_decoding
from common import finish, parse, run
from embedded_speech import topics, whisper
from scores import classification_metrics
from tables import class_names, fewer, label_names, labelled, load_splits, model_card
from transformers import AutoModelForAudioClassification, Trainer, TrainingArguments, set_seed

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "head@0, block[-2:]@0",
    "cache": "memory",
    "window_seconds": 3,  # no embedded clip is longer
    "output_dir": "runs/audio_classification",
    "num_train_epochs": 10.0,
    "learning_rate": 3e-4,
    "warmup_steps": 10,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


@dataclass
class SoundArguments(AudioArguments):
    """Column of the class."""

    label_column: str = field(default="label", metadata={"help": "Column with the label, text or number."})


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, SoundArguments, UnfreezeArguments, TrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # the new head is drawn below, before the Trainer sets the seed
    name = data_args.model_name_or_path or whisper()
    listener = Listener(name, data_args)
    with training_args.main_process_first(desc="reading the data"):
        columns, folder = [data_args.audio_column, data_args.label_column], Path(data_args.dataset_name or "")
        if data_args.dataset_name and folder.is_dir():
            data = load_splits(replace(data_args, dataset_name=None), columns, lambda: by_folder(folder))
        else:
            data = load_splits(data_args, columns, topics)
        labels = class_names(data, data_args.label_column)
        data = without_decoding(fewer(data, data_args), data_args.audio_column)
        names = {split: label_names(rows, data_args.label_column) for split, rows in data.items()}
        data = data.map(
            lambda row: {"input_features": listener.features(row)}, remove_columns=data["train"].column_names
        )
    data = datasets.DatasetDict({split: rows.add_column("label", names[split]) for split, rows in data.items()})
    model = AutoModelForAudioClassification.from_pretrained(
        name,
        **labelled(labels),
        ignore_mismatched_sizes=True,  # a model fine-tuned on other classes gets a new head
    )
    listener.cut(model)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        numbers = [labels.index(row["label"]) for row in rows]
        return {"input_features": stack(rows), "labels": torch.tensor(numbers)}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        processing_class=listener.extractor,
        compute_metrics=classification_metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    card = model_card(
        data_args,
        tasks="audio-classification",
        finetuned_from="openai/whisper-tiny.en",
        license="cc-by-sa-3.0",
        dataset="Asterisk core sounds",
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
