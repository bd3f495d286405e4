"""Fine-tune a speech recognizer: the upper part of encoder and decoder, then the decoder's on a cached encoder.

python recipes/speech_recognition.py
    trains a Whisper tiny.en on 419 spoken prompts of six seconds at most, no hub needed
python recipes/speech_recognition.py --model_name_or_path openai/whisper-small.en --train_file mine.csv
    your model, your data: two columns, audio (path of a sound file) and text
accelerate launch --multi_gpu --num_processes 2 recipes/speech_recognition.py
    the same on several processes
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from audio import AudioArguments, Listener, stack, without_decoding
from common import finish, parse, run
from embedded_speech import prompts, whisper
from scores import speech_metrics, words
from tables import fewer, load_splits, model_card
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from hf_unfreeze import UnfreezeArguments, UnfreezeCallback

# What suits the embedded model and data; every one can be given as an argument.
DEFAULTS: dict[str, Any] = {
    "schedule": "top(0.4, encoder_until=40%)",
    "cache": "memory",
    "output_dir": "runs/speech_recognition",
    "num_train_epochs": 2.0,
    "learning_rate": 1.5e-4,
    "warmup_steps": 10,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "predict_with_generate": True,
    "generation_max_length": 64,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 0.02,  # of the run, so that a run of any length has a timeline
    "report_to": "none",
}


@dataclass
class SpeechArguments(AudioArguments):
    """Column of what is said, and in which language."""

    text_column: str = field(default="text", metadata={"help": "Column with the words that are said."})
    language: str | None = field(
        default=None, metadata={"help": "What a model of many languages hears: german, or de."}
    )


def set_language(model: Any, tokenizer: Any, language: str | None) -> None:
    """Let a model of many languages write one, in training and afterwards; English ones know no other."""
    if not getattr(model.generation_config, "is_multilingual", False):
        if language:
            raise SystemExit(f"--language {language}: this model knows English alone. Leave it out.")
        return
    if language not in (*TO_LANGUAGE_CODE, *LANGUAGES):
        near = difflib.get_close_matches(language or "", TO_LANGUAGE_CODE, 1)
        raise SystemExit(
            "this model knows many languages. Say which is spoken: --language german, or de."
            + (f" There is no {language!r}." if language else "")
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    tokenizer.set_prefix_tokens(language=language, task="transcribe")
    model.generation_config.language, model.generation_config.task = language, "transcribe"


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave everything in --output_dir."""
    data_args, unfreeze_args, training_args = parse(
        arguments, DEFAULTS, SpeechArguments, UnfreezeArguments, Seq2SeqTrainingArguments
    )
    callback = UnfreezeCallback.from_arguments(unfreeze_args)  # first, so that a misspelt schedule is told at once
    set_seed(training_args.seed)
    name = data_args.model_name_or_path or whisper()
    listener = Listener(name, data_args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(name)
    listener.cut(model)
    set_language(model, tokenizer, data_args.language)
    start = model.config.decoder_start_token_id

    def encode(row: dict) -> dict:
        text = str(row[data_args.text_column])
        if not words(text):
            raise SystemExit(f"{text!r} in the column {data_args.text_column!r} has no words. Drop such rows.")
        labels = tokenizer(text).input_ids
        # the model puts the start before the labels itself
        return {"input_features": listener.features(row), "labels": labels[labels[0] == start :]}

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = [torch.tensor(row["labels"]) for row in rows]  # -100: no loss where there are no words
        return {"input_features": stack(rows), "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}

    with training_args.main_process_first(desc="reading the data"):
        data = load_splits(data_args, [data_args.audio_column, data_args.text_column], prompts)
        data = without_decoding(fewer(data, data_args), data_args.audio_column)
        data = data.map(encode, remove_columns=data["train"].column_names)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate,
        processing_class=listener.extractor,
        compute_metrics=speech_metrics(tokenizer),
        callbacks=[callback],
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(training_args.output_dir)
    card = model_card(
        data_args,
        tasks="automatic-speech-recognition",
        finetuned_from="openai/whisper-tiny.en",
        license="cc-by-sa-3.0",
        dataset="Asterisk core sounds",
    )
    finish(trainer, card)


if __name__ == "__main__":
    run(main)
