"""The text classifier in a training loop of your own: no Trainer, three lines of hf_unfreeze, or five.

python recipes/accelerate_loop.py
    trains a MiniLM on 2,400 tweets, no hub needed, about two minutes on two CPU cores
accelerate launch --config_file recipes/launch/two_cpu_processes.yaml recipes/accelerate_loop.py
    the same on two processes; recipes/launch has files for GPUs, FSDP2 and several machines
python recipes/accelerate_loop.py --resume_from runs/accelerate_loop/epoch-1
    goes on after the first epoch. Where what trains is a function of the step, nothing of hf_unfreeze is needed in the
    checkpoint; `register_for_checkpointing` and `observe` are for plateau(accuracy), --pull, and schedules that measure
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import parse, run
from embedded import minilm
from scores import Classification
from tables import TextArguments, class_names, fewer, labelled, load_texts
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from hf_unfreeze import UnfreezeArguments, Unfreezer

DEFAULTS: dict[str, Any] = {"schedule": "gradual(every=12%)", "layer_decay": 0.9}


@dataclass
class LoopArguments:
    """What the Trainer would take from TrainingArguments."""

    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "Folder for everything the run leaves."})
    num_train_epochs: int = field(default=2, metadata={"help": "Epochs."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps, where not whole epochs."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the head; it falls to 0 linearly."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples in a batch of one process."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Batches in an optimizer step."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Greatest norm of the gradient."})
    seed: int = field(default=42, metadata={"help": "Seed of the head, the order of the data and dropout."})
    resume_from: str | None = field(default=None, metadata={"help": "A folder epoch-N of an earlier run."})


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and leave model, checkpoints and results in --output_dir."""
    data_args, unfreeze_args, args = parse(arguments, DEFAULTS, TextArguments, UnfreezeArguments, LoopArguments)
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    with accelerator.main_process_first():
        data = load_texts(data_args)
    labels = class_names(data)
    data = fewer(data, data_args)
    name = data_args.model_name_or_path or minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, **labelled(labels), ignore_mismatched_sizes=True)

    def encode(batch: dict) -> dict:
        tokens = tokenizer(batch["text"], truncation=True, max_length=data_args.max_length)
        return {**tokens, "labels": [labels.index(label) for label in batch["label"]]}

    data = data.map(encode, batched=True, remove_columns=["text", "label"])
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(data["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(data["validation"], batch_size=64, collate_fn=collate)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)  # over all parameters, none frozen yet
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    total_steps = args.max_steps or args.num_train_epochs * steps_per_epoch
    processes = accelerator.num_processes  # the prepared scheduler takes as many steps at a time
    scheduler = accelerator.prepare(get_linear_schedule_with_warmup(optimizer, 0, total_steps * processes))
    unfreezer = Unfreezer(
        model, optimizer, **vars_of(unfreeze_args), total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    accelerator.register_for_checkpointing(unfreezer)

    step, losses, metrics = 0, [], {}
    if args.resume_from:
        accelerator.load_state(args.resume_from)
        step = int(Path(args.resume_from).name.removeprefix("epoch-")) * steps_per_epoch
    for epoch in range(step // steps_per_epoch, math.ceil(total_steps / steps_per_epoch)):
        train_loader.set_epoch(epoch)  # shuffles anew, and a resumed run as the first one did
        model.train()
        for batch in train_loader:
            transition = unfreezer.step(step)
            if transition:
                accelerator.print(f"step {step}: {transition.trainable} ({transition.trainable_params:,} parameters)")
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            step += accelerator.sync_gradients
            if step == total_steps:
                break
        metrics = evaluate(accelerator, model, eval_loader)
        accelerator.print(f"epoch {epoch + 1}: {metrics}")
        unfreezer.observe(metrics, step)
        accelerator.save_state(f"{args.output_dir}/epoch-{epoch + 1}")
    unfreezer.close()
    metrics = metrics or evaluate(accelerator, model, eval_loader)  # resumed after the last epoch

    average = accelerator.reduce(torch.stack(losses).mean(), "mean") if losses else None
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        results = {"step": step, "train_loss": None if average is None else average.item(), **metrics}
        Path(args.output_dir, "all_results.json").write_text(json.dumps({"processes": processes, **results}, indent=2))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # without it about one launched run in four dies at exit


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> dict[str, float]:
    """Return accuracy and macro precision, recall and F1 over all processes."""
    model.eval()
    metric = Classification(keep_in_memory=True)
    for batch in loader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        gathered = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=gathered[0], references=gathered[1])
    return {name: round(float(score), 4) for name, score in metric.compute().items()}


def vars_of(arguments: UnfreezeArguments) -> dict[str, Any]:
    """Return what Unfreezer takes of the arguments; drawing weights anew is the callback's."""
    return {name: value for name, value in vars(arguments).items() if name != "reinitialize"}


if __name__ == "__main__":
    run(main)
