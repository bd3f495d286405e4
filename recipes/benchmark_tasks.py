"""What the benchmark trains: text, images and speech with the embedded models, each example prepared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from audio import AudioArguments, Listener, stack, without_decoding
from embedded import minilm
from embedded_images import vit
from embedded_speech import prompts, whisper
from image_classification import EMBEDDED_SIZE, ImageArguments, load_images, set_size
from scores import classification_metrics, speech_metrics
from tables import DataArguments, TextArguments, class_names, fewer, labelled, load_splits, load_texts
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class Task:
    """Data, model and measure of one modality.

    Args:
        metric: Name of the measure among those of ``compute_metrics``.
        better: 1 where more of it is better, -1 where less is.
        rates: Learning rates that every method may choose from.
        data: Splits train and validation.
        load: Makes the pretrained model with a new head.
        arguments: What ``TrainingArguments`` takes besides.
    """

    metric: str
    better: int
    rates: Sequence[float]
    data: datasets.DatasetDict
    load: Callable[[], PreTrainedModel]
    collate: Callable[..., Any]
    compute_metrics: Callable[[Any], dict[str, float]]
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: type[Trainer] = Trainer
    training_arguments: type[TrainingArguments] = TrainingArguments


def text(limits: DataArguments) -> Task:
    """Sentiment of tweets with a MiniLM, 6 blocks; or a model and texts of one's own."""
    arguments = TextArguments(**vars(limits))
    name = arguments.model_name_or_path or minilm()
    data = load_texts(arguments)
    labels = class_names(data)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(batch: dict) -> dict:
        tokens = tokenizer(batch["text"], truncation=True, max_length=arguments.max_length)
        return {**tokens, "label": [labels.index(label) for label in batch["label"]]}

    return Task(
        "accuracy",
        1,
        (1e-4, 3e-4, 1e-3),
        fewer(data, limits).map(encode, batched=True, remove_columns=["text"]),
        lambda: AutoModelForSequenceClassification.from_pretrained(name, **labelled(labels)),
        DataCollatorWithPadding(tokenizer),
        classification_metrics,
    )


def images(limits: DataArguments) -> Task:
    """Clothes of Fashion-MNIST with a ViT-S/14, 12 blocks."""
    data = load_images(ImageArguments(**vars(limits)))
    labels = class_names(data)

    def load() -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(vit(), **labelled(labels))

    processor = AutoImageProcessor.from_pretrained(vit())
    set_size(processor, load(), EMBEDDED_SIZE)

    def encode(batch: dict) -> dict:
        pixels = processor([image.convert("RGB") for image in batch["image"]], return_tensors="np")
        return {**pixels, "labels": [labels.index(label) for label in batch["label"]]}

    shape = (3, EMBEDDED_SIZE, EMBEDDED_SIZE)  # told, since nested lists would cost a tenth of a step
    features = datasets.Features(
        {"pixel_values": datasets.Array3D(shape, "float32"), "labels": datasets.Value("int64")}
    )
    prepared = fewer(data, limits).map(encode, batched=True, remove_columns=["image", "label"], features=features)
    formatted = prepared.with_format("torch")
    return Task("accuracy", 1, (5e-5, 1e-4, 3e-4), formatted, load, default_data_collator, classification_metrics)


def speech(limits: DataArguments) -> Task:
    """Spoken prompts with a Whisper tiny.en, 4 and 4 blocks."""
    arguments = AudioArguments(**vars(limits))
    listener = Listener(whisper(), arguments)
    tokenizer = AutoTokenizer.from_pretrained(whisper())

    def load() -> PreTrainedModel:
        model = AutoModelForSpeechSeq2Seq.from_pretrained(whisper())
        listener.cut(model)
        return model

    start = load().config.decoder_start_token_id

    def encode(row: dict) -> dict:
        labels = tokenizer(row["text"]).input_ids
        return {"input_features": listener.features(row), "labels": labels[labels[0] == start :]}

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {"input_features": stack(rows), "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}

    data = without_decoding(fewer(load_splits(arguments, ["audio", "text"], prompts), limits), "audio")
    shape = listener.features(data["train"][0]).shape
    features = datasets.Features(
        {"input_features": datasets.Array2D(shape, "float32"), "labels": datasets.Sequence(datasets.Value("int64"))}
    )
    prepared = data.map(encode, remove_columns=data["train"].column_names, features=features)
    return Task(
        "wer",
        -1,
        (3e-5, 5e-5, 1e-4, 1.5e-4),
        prepared.with_format("numpy", columns=["input_features"], output_all_columns=True),
        load,
        collate,
        speech_metrics(tokenizer),
        {"warmup_steps": 10, "predict_with_generate": True, "generation_max_length": 64},
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )


TASKS: dict[str, Callable[[DataArguments], Task]] = {"text": text, "images": images, "speech": speech}
