"""What the recipes share: the command line, and what a run leaves behind."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, Trainer

from hf_unfreeze import UnfreezeError
from hf_unfreeze.report import timeline

CONFIGS: dict[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}


def parse(arguments: list[str] | None, defaults: dict[str, Any], *classes: Any) -> tuple[Any, ...]:
    """Parse the command line; a .yaml or .json file named first gives values that later arguments override.

    The recipe's own ``defaults`` are data, not subclasses: the stock classes still load from training_args.bin.
    """
    parser = HfArgumentParser(classes)
    words = sys.argv[1:] if arguments is None else list(arguments)
    config = _read_config(Path(words.pop(0))) if words and Path(words[0]).suffix in CONFIGS else {}
    known = {action.dest for action in parser._actions}
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise SystemExit(f"there is no argument {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    if "dataloader_pin_memory" in known and not torch.accelerator.is_available():
        parser.set_defaults(dataloader_pin_memory=False)  # else torch warns at each evaluation
    parser.set_defaults(**defaults)
    parser.set_defaults(**config)
    return parser.parse_args_into_dataclasses(words)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"there is no file {path}.")
    try:
        config = CONFIGS[path.suffix](path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path} must hold names and values, for instance 'learning_rate: 3e-4'.")
    return config


def run(main: Callable[[], None]) -> None:
    """Run a recipe as a script: a refusal of the library, written for the user, ends it in one line."""
    if not torch.accelerator.is_available():  # else each of the processes launched on CPUs would run alone
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    try:
        main()
    except UnfreezeError as error:
        raise SystemExit(f"error: {error}") from None


def finish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Evaluate and save: model, tokenizer, states, results, timeline.png and model card; then leave together."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        _draw_timeline(trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # without it about one launched run in four dies at exit


def _draw_timeline(trainer: Trainer) -> None:
    """Draw last, and only say so where nothing was logged: a picture must not cost anybody a finished run."""
    try:
        timeline(trainer).savefig(Path(trainer.args.output_dir) / "timeline.png", dpi=150)
    except UnfreezeError as error:
        print(f"no timeline.png: {error}", file=sys.stderr)
