"""Copies of weights that a run needs again: to be pulled to, or to go back to. Saved beside each checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import EnvironmentRefused, UnfreezeError

__all__ = ["BestWeights", "Kept", "Pretrained"]


class Kept:
    """One copy of each parameter that has opened, as it was when it opened; a frozen one needs none.

    Args:
        parameters: Name → parameter, of everything that may open.
        option: The option that asks for it, as one writes it to do without.
        file: Its name beside a checkpoint.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], option: str, file: str) -> None:
        if any(hasattr(parameter, "device_mesh") for parameter in parameters.values()):
            name, _, off = option.partition("=")
            raise EnvironmentRefused(f"{name} is not available for sharded parameters (FSDP2). Write {name}={off}.")
        self.weights: dict[str, torch.Tensor] = {}
        self._tensors: dict[str, torch.Tensor] = dict(parameters)
        self._option = option
        self.file = file

    def update(self) -> None:
        """Keep the weights of what has opened just now."""
        for name, parameter in self._tensors.items():
            if parameter.requires_grad and name not in self.weights:
                self.weights[name] = parameter.detach().clone()

    def save(self, checkpoint: Path) -> None:
        """Put the copies into a checkpoint, which holds the trained weights."""
        weights = {name: weight.cpu().contiguous() for name, weight in self.weights.items()}  # or channels_last
        save_file(weights, checkpoint / self.file)

    def load(self, checkpoint: Path | None) -> None:
        """Take the copies from a checkpoint: by now the model holds trained weights.

        Raises:
            UnfreezeError: The checkpoint was written without them.
        """
        path = checkpoint and checkpoint / self.file
        self.take_over(load_file(path) if path and path.is_file() else None, f"the checkpoint {checkpoint}")

    def take_over(self, weights: Mapping[str, torch.Tensor] | None, source: str) -> None:
        """Take the copies that another run has saved.

        Raises:
            UnfreezeError: There are none.
        """
        if weights is None:
            raise UnfreezeError(
                f"{source} has no {self.file}: it was written with {self._option}, and the weights "
                f"to return to are not in it. Write {self._option}, or start again from the pretrained model."
            )
        for name in weights.keys() & self._tensors.keys():  # less may open now than in the run that wrote them
            self.weights[name] = torch.empty_like(self._tensors[name], requires_grad=False).copy_(weights[name])


class BestWeights(Kept):
    """The weights with the best validation metric: what opened since then goes back to how it was when it opened.

    Args:
        parameters: Name → parameter, of everything that may open.
        buffers: Name → buffer, such as the statistics of BatchNorm.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__(parameters, "stop=none, restore_best=false", "unfreeze_best.safetensors")
        self._buffers = dict(buffers)
        self._tensors |= self._buffers

    def take(self) -> None:
        """Keep the present weights: none were better."""
        for name in {*self.weights, *self._buffers}:
            self.weights[name] = self._tensors[name].detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the weights kept."""
        for name, weight in self.weights.items():
            self._tensors[name].copy_(weight)

    def close(self) -> None:
        """Nothing is left behind."""


class Pretrained(Kept):
    """The weights with which the run began: copies of what has opened since, and of buffers such as BatchNorm's.

    Args:
        parameters: Name → parameter, of everything that may open.
        buffers: Name → buffer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__(parameters, "a criterion that asks for no outputs", "unfreeze_pretrained.safetensors")
        self._buffers = {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
        self._tensors |= self._buffers

    def update(self) -> None:
        """Keep what is about to change for the first time."""
        super().update()
        for name in self._buffers.keys() - self.weights.keys():
            self.weights[name] = self._buffers[name].detach().clone()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give the model the weights with which the run began, for a while."""
        now = {name: self._tensors[name].data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                self._tensors[name].data = weight
            yield
        finally:
            for name, weight in now.items():
                self._tensors[name].data = weight

    def close(self) -> None:
        """Nothing is left behind."""
