"""What each layer group returns in one forward of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from .errors import ScheduleError

__all__ = ["group_modules", "outputs_of"]


def group_modules(model: nn.Module, parameter_names: Mapping[str, Sequence[str]]) -> dict[str, nn.Module]:
    """Return for each group the smallest module that holds all its parameters.

    Args:
        model: The model without wrappers.
        parameter_names: Names of the parameters of each group.

    Raises:
        ScheduleError: Two groups have the same one, so that neither has an output of its own.
    """
    paths = {name: _common(names) for name, names in parameter_names.items()}
    for path in paths.values():
        same = [name for name, other in paths.items() if other == path]
        if len(same) > 1:
            raise ScheduleError(
                f"{' and '.join(same[:2])} are no modules of their own in this model, so that their outputs cannot be "
                "told apart. Write another criterion than cka."
            )
    return {name: model.get_submodule(path) for name, path in paths.items()}


def outputs_of(modules: Mapping[str, nn.Module], forward: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Run a forward and return what each module returned in it: a row for each position, a column for each feature.

    The features of an image are its channels (dimension 1), of anything else the last dimension.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first(output)
        found[name] = (tensor.movedim(1, -1) if tensor.ndim == 4 else tensor).detach().flatten(0, -2)

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _common(names: Sequence[str]) -> str:
    """Return the path that all names share, their last words left out."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns))


def _first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
        output = next(iter(values))
    return output
