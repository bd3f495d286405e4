"""Against overfitting on small data: pull towards the pretrained weights, more dropout, fresh top blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ._fresh import draw
from ._kept import Kept
from .errors import StructureError
from .freezing import largest_modules
from .groups import layer_groups
from .schedule import parse_selectors

__all__ = ["Pull", "RaisedDropout", "reinitialize"]

# Attention layers of transformers keep a probability as a number and call the functional dropout with it.
_DROPOUT_NUMBERS = ("dropout", "attention_dropout", "activation_dropout", "attn_dropout", "hidden_dropout")


class Pull:
    """Draws opened parameters back to where they were when they opened: L2-SP, decoupled from the gradient.

    After each optimizer step ``w -= lr · pull · (w - w₀)``, with the learning rate that the parameter's group got. One
    copy of each opened parameter is kept; a frozen one needs none.

    Args:
        optimizer: The raw torch optimizer.
        parameters: Name → parameter, of everything that may open.
        rates: Returns the learning rate of each parameter that trained in this step, by ``id``.
        strength: Share of the way back per unit of learning rate, as weight decay is.

    Reference: L2-SP, arXiv 1802.01483; decoupled as in AdamW, arXiv 1711.05101.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        rates: Callable[[], Mapping[int, float]],
        strength: float,
    ) -> None:
        self.kept = Kept(parameters, "pull=0", "unfreeze_anchors.safetensors")
        self.anchors = self.kept.weights
        self._parameters = parameters
        self._rates = rates
        self._strength = strength
        self._hook = optimizer.register_step_post_hook(self._after)

    def update(self) -> None:
        """Remember the weights of what has opened just now."""
        self.kept.update()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (overflow := getattr(optimizer, "found_inf", None)) is not None and overflow.item():
            return  # a fused optimizer under a GradScaler is called for a step that it then leaves out
        rates = self._rates()
        for name, anchor in self.anchors.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                parameter.lerp_(anchor, min(1.0, rates.get(id(parameter), 0.0) * self._strength))

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()


class RaisedDropout:
    """Raises dropout in the modules whose parameters all train, and takes it back where they are frozen again.

    Args:
        model: The model inside all wrappers.
        probability: Least dropout probability of an opened module; one that is higher stays.
    """

    def __init__(self, model: nn.Module, probability: float) -> None:
        self._model = model
        self._probability = probability
        self._found: list[tuple[nn.Module, str, float]] = []

    def update(self) -> None:
        """Raise where everything trains, restore elsewhere."""
        self.close()
        for module in largest_modules(self._model, lambda parameters: all(p.requires_grad for p in parameters)):
            for part in module.modules():
                names = ("p",) if isinstance(part, nn.Dropout) else _DROPOUT_NUMBERS
                for name in names:
                    value = vars(part).get(name)
                    if isinstance(value, (int, float)) and value is not False and value < self._probability:
                        self._found.append((part, name, value))
                        setattr(part, name, self._probability)

    def close(self) -> None:
        """Put every probability back."""
        while self._found:
            module, name, value = self._found.pop()
            setattr(module, name, value)


def reinitialize(model: nn.Module, selectors: str, seed: int = 0) -> tuple[str, ...]:
    """Draw the weights of the named groups anew, as the model's own ``_init_weights`` does.

    The top blocks of a pretrained model are the most specialised; starting them afresh can make fine-tuning on a few
    thousand examples steadier. The random state is as before afterwards. What only a constructor sets, as CLIP's
    ``logit_scale``, is copied from a second model that is built for it and given up again.

    Example:
        >>> reinitialize(model, "block[-2:]")
        ('block[4]', 'block[5]')

    Args:
        model: A transformers model, or one whose modules have ``reset_parameters``.
        selectors: As in a schedule, without times.
        seed: Seed of the new weights, so that every process draws the same.

    Raises:
        ScheduleError: A selector cannot be read, or matches nothing.
        StructureError: A PEFT model, whose blocks stay as they are, or weights that nothing draws: then all stay.

    Reference: Revisiting few-sample BERT fine-tuning, arXiv 2006.05987.
    """
    if getattr(model, "peft_config", None):
        raise StructureError(
            "reinitialize draws blocks anew, and those of a PEFT model stay frozen. "
            f"Write reinitialize(model, {selectors!r}) before get_peft_model(model, …)."
        )
    groups = layer_groups(model)
    names = parse_selectors(selectors).phases(groups)[0].trainable
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        left = draw(model, {name for group in groups if group.name in names for name in group.parameter_names})
    if left:
        raise StructureError(
            f"reinitialize={selectors!r} cannot draw {', '.join(left)}: quantised, or neither an _init_weights nor a "
            "reset_parameters sets all of it. Give the module that owns it a reset_parameters, or leave its group out."
        )
    return names
