"""``hf-unfreeze plan · groups · architectures`` read a config and no weights; ``search`` runs a script of yours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._search import SCHEDULES
from .errors import UnfreezeError
from .schedule import RECOMMENDED

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]

# Task heads by the name users know from the hub, and the Auto class that builds each.
HEADS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "image-text-to-text": "AutoModelForImageTextToText",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "audio-classification": "AutoModelForAudioClassification",
    "none": "AutoModel",
}

_MINUS = "write --schedule=-head@0,… where it begins with a minus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 with one line on stderr for a bad argument."""
    words = sys.argv[1:] if argv is None else list(argv)
    own = words.index("--") if "--" in words and words[0] == "search" else len(words)
    arguments, unknown = _parser().parse_known_args(words[:own])
    if unknown:
        arguments.parser.error(_unknown(arguments, shlex.join(unknown)))
    arguments.passed_on = words[own + 1 :]
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except (UnfreezeError, OSError) as error:
        told = str(error).replace("pass steps_per_epoch", "give --steps-per-epoch")
        print("hf-unfreeze:", *told.split(), file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _unknown(arguments: argparse.Namespace, words: str) -> str:
    script = vars(arguments).get("script")  # of a search
    hint = f" What the script is to get stands after --: hf-unfreeze search {script} -- {words}" if script else ""
    return f"unrecognized arguments: {words}.{hint}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-unfreeze", description="See what a schedule will do before you train.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="phases of a schedule on a model, and what each costs")
    examples = f"such as 'head@0, block[-4:]@1ep, all@50%%'; {_MINUS} (default: %(default)s)"
    plan.add_argument("--schedule", default=RECOMMENDED, help=examples)
    plan.add_argument("--epochs", type=float, help="epochs of the run")
    plan.add_argument("--steps-per-epoch", type=int, help="optimizer updates in one epoch")
    plan.add_argument("--max-steps", type=int, help="optimizer updates of the whole run, instead of --epochs")
    plan.add_argument("--world-size", type=int, help="ranks: adds what each sends and holds (hf_unfreeze/SCALE.md)")
    plan.add_argument("--bandwidth", help="what a rank can send, with its unit: 100GB/s, 400Gbit/s")
    plan.add_argument("--sharded", action="store_true", help="the ranks run FSDP2, not DDP")
    groups = commands.add_parser("groups", help="layer groups of a model, top → bottom")
    groups.add_argument("--explain", action="store_true", help="why each parameter outside the blocks is where it is")
    for command in (plan, groups):
        command.add_argument("model", metavar="MODEL", help="folder or hub id; only its config is read")
        command.add_argument("--head", choices=HEADS, help="task head; by default that of the config")
    architectures = commands.add_parser("architectures", help="registered architectures; others are detected")
    architectures.add_argument("--markdown", action="store_true", help="the page hf_unfreeze/ARCHITECTURES.md")
    search = commands.add_parser(
        "search",
        help="try schedules, layer decays and learning rates on a script: search SCRIPT -- ITS ARGUMENTS",
        usage="%(prog)s SCRIPT [OPTIONS] -- ITS ARGUMENTS",
    )
    search.add_argument("script", type=Path, metavar="SCRIPT", help="a recipe, or one with the same arguments")
    for name, kind, default, told in (
        ("--metric", str, "eval_loss", "key in its all_results.json"),
        ("--trials", int, 20, "total number of trials, earlier ones included"),
        ("--output", Path, Path("runs/search"), "folder; a search there goes on"),
        ("--seed", int, 0, "of the draws"),
    ):
        search.add_argument(name, type=kind, default=default, help=f"{told} (default: %(default)s)")
    told = f"one to try; once for each, {_MINUS} (default: each of {', '.join(SCHEDULES).replace('%', '%%')})"
    search.add_argument("--schedule", action="append", help=told)
    for name, low, high, most in (("--layer-decay", 0.7, 1.0, ", at most 1"), ("--learning-rate", 1e-5, 1e-3, "")):
        told = f"lowest and highest to try, above 0{most} (default: {low} {high})"
        search.add_argument(name, type=float, nargs=2, default=(low, high), metavar=("LOW", "HIGH"), help=told)
    search.add_argument("--prune", action="store_true", help="end trials that fall behind others of their schedule")
    runs = ((plan, _plan), (groups, _groups), (architectures, _architectures), (search, _search))
    for command, run in runs:
        command.add_argument("--json", action="store_true", help="JSON instead of a table")
        command.set_defaults(command=run, parser=command)
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    from rich.console import Group

    from ._adapters import eligible_groups
    from ._plan import not_reached, plan_rows, plan_table, planned
    from ._scale import parse_bandwidth, scale_rows, scale_table
    from .groups import layer_groups
    from .schedule import parse_schedule

    total = _length(arguments)
    bandwidth = parse_bandwidth(arguments.bandwidth) if arguments.bandwidth else None
    if arguments.world_size is None and (bandwidth or arguments.sharded):
        raise UnfreezeError("--bandwidth and --sharded are about several ranks. Give --world-size too.")
    schedule = parse_schedule(arguments.schedule)
    model = _meta_model(arguments.model, arguments.head)
    groups = eligible_groups(model, layer_groups(model))
    phases = planned(schedule, groups, total, arguments.steps_per_epoch)
    reached = [phase for phase in phases if phase.start < total]
    rows = plan_rows(model, groups, reached, arguments.steps_per_epoch, decided=schedule.decided(groups))
    title = f"{schedule} on {type(model).__name__}, {total} steps{not_reached(phases, groups, total)}"
    shown = [dataclasses.asdict(row) for row in rows]
    tables = [plan_table(rows, title.replace("[", r"\["))]
    if arguments.world_size:
        sets = [*(phase.trainable for phase in reached), *schedule.decided(groups)]
        scale = scale_rows(model, groups, sets, arguments.world_size, bandwidth, arguments.sharded)
        shown = [{**row, **dataclasses.asdict(more)} for row, more in zip(shown, scale, strict=True)]
        kind = "FSDP2" if arguments.sharded else "DDP"
        at = f" at {arguments.bandwidth}" if bandwidth else ""
        tables.append(scale_table(scale, f"Each of {arguments.world_size} ranks, {kind}{at}: MB, and ms of sending"))
    _show(arguments, shown, lambda: Group(*tables))


def _length(arguments: argparse.Namespace) -> int:
    """Return the optimizer updates of the run that the arguments describe."""
    for name in ("epochs", "steps_per_epoch", "max_steps", "world_size"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UnfreezeError(f"--{name.replace('_', '-')} {value}: write a number above 0.")
    if arguments.max_steps is not None:
        return int(arguments.max_steps)
    if arguments.epochs is None or arguments.steps_per_epoch is None:
        raise UnfreezeError("the length of the run is missing. Give --epochs with --steps-per-epoch, or --max-steps.")
    epochs: float = arguments.epochs
    per_epoch: int = arguments.steps_per_epoch
    return math.ceil(epochs * per_epoch)


def _groups(arguments: argparse.Namespace) -> None:
    from .groups import explain_groups, layer_groups

    model = _meta_model(arguments.model, arguments.head)
    parameters = dict(model.named_parameters())
    groups = layer_groups(model)[::-1]
    rows = [
        {
            "group": group.name,
            "parameters": sum(parameters[name].numel() for name in group.parameter_names),
            "tensors": len(group.parameter_names),
        }
        for group in groups
    ]
    title = type(model).__name__
    if not arguments.explain:
        _show(arguments, rows, lambda: _table(title, rows))
        return
    reasons = explain_groups(model)
    whys = [
        {"group": group.name, "parameter": name, "parameters": parameters[name].numel(), "why": reasons[name]}
        for group in groups
        for name in group.parameter_names
    ]
    loose = [why for why in whys if "block[" not in str(why["group"]) or "tie" in str(why["why"])]
    _show(arguments, whys, lambda: _table(title, rows))
    if not arguments.json and loose:
        _show(arguments, loose, lambda: _table("Outside the blocks, and why", loose))


def _architectures(arguments: argparse.Namespace) -> None:
    from .architectures import list_architectures, markdown_table

    if arguments.markdown:
        print(markdown_table(), end="")  # noqa: T201
        return
    rows = [{"model_type": architecture.model_type} for architecture in list_architectures()]
    title = "Registered architectures; the structure of any other model is detected"
    _show(arguments, rows, lambda: _table(title, rows))


def _search(arguments: argparse.Namespace) -> None:
    from ._search import Search, trials_figure, trials_table

    search = Search(
        arguments.script,
        arguments.passed_on,
        arguments.output,
        arguments.metric,
        arguments.schedule or SCHEDULES,
        tuple(arguments.layer_decay),
        tuple(arguments.learning_rate),
        arguments.seed,
        arguments.prune,
    )
    rows = search.run(arguments.trials)
    title = f"{len(rows)} trials of {arguments.script} by {arguments.metric}, the best first"
    _show(arguments, rows, lambda: trials_table(rows, title))
    trials_figure(rows, arguments.metric).savefig(arguments.output / "trials.png", dpi=150)


def _meta_model(name: str, head: str | None) -> nn.Module:
    """Build the model of a config on the meta device: structure without weights."""
    import torch

    config = _config(name)
    try:
        with torch.device("meta"):
            model: nn.Module = _builder(config, head)(config)
    except UnfreezeError:
        raise
    except Exception as error:
        raise UnfreezeError(f"no {config.model_type} can be built from the config of {name!r}: {error}") from error
    return model


def _config(name: str) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        written = _written_config(name)
        if not written:
            raise UnfreezeError(f"{name!r} is no folder with a config and no model on the hub: {error}") from error
        if written.get("model_type") in transformers.CONFIG_MAPPING:
            raise UnfreezeError(f"the config of {name!r} cannot be read: {error}") from error
        raise UnfreezeError(
            f"{name!r} has a config, and transformers {transformers.__version__} knows no model_type "
            f"{written.get('model_type')!r}. In Python, where the class of your model is, write "
            "hf_unfreeze.layer_groups(model)."
        ) from error


def _written_config(name: str) -> dict[str, Any]:
    """Return what a config file holds; nothing where there is none, or no JSON object."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(name)[0])
    except (OSError, ValueError, TypeError):
        return {}


def _builder(config: Any, head: str | None) -> Any:
    """Return what builds a model with the head asked for, else that of the config, else none."""
    import transformers

    own = (config.architectures or [""])[0]
    if head is None and hasattr(transformers, own):
        builder = getattr(getattr(transformers, own), "_from_config", None)
        if builder is None:
            raise UnfreezeError(f"architectures of this config names {own!r}, which is no model. Write --head none.")
        return builder
    head = head or "none"
    has = [name for name, auto in HEADS.items() if type(config) in getattr(transformers, auto)._model_mapping]
    if head not in has:
        raise UnfreezeError(f"{config.model_type} has no head {head!r}. It has {', '.join(has) or 'no other'}.")
    return getattr(transformers, HEADS[head]).from_config


def _show(arguments: argparse.Namespace, rows: list[dict[str, Any]], table: Callable[[], Any]) -> None:
    if arguments.json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    from rich.console import Console

    Console().print(table())


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(v.replace("[", r"\[") if isinstance(v, str) else f"{v:,}" for v in row.values()))
    return table
