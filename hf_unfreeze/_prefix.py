"""The frozen prefix of a model: where it lies, and running a model from the middle of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._places import Place, places_of
from ._shadow import Call, Shadow, drew, only_drew, random_state
from .groups import LayerGroup

__all__ = ["Prefix", "Reached", "Run"]

LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")  # whose hooks read nothing of a frozen block


class Reached(Exception):
    """Ends a forward at the boundary: what lies above is not wanted."""


@dataclass
class Run:
    """What one forward of the host does with the frozen blocks.

    Args:
        start: Blocks below this boundary are passed over; the last of them returns ``activation``.
        activation: Input of block ``start`` for the whole batch.
        capture: Boundaries whose activation is kept in ``captured``.
        stop: Boundary at which the forward ends with ``Reached``.
        watched: Whether what makes the prefix unfit for caching is looked for up to this boundary (0: no).
    """

    start: int = 0
    activation: torch.Tensor | None = None
    capture: frozenset[int] = frozenset()
    stop: int | None = None
    watched: int = 0
    captured: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    state: Any = None
    problem: str = ""
    crowded: bool = False  # whether an example came out differently without the others of its batch
    ragged: bool = False  # whether the shortest example came out the same without its padding


class Prefix:
    """The stem and the blocks of one stack, with the module that runs them (the host).

    The host gets the inputs of an example and hands them through the stem and the blocks. While ``run`` is set,
    blocks below its ``start`` and the stem are passed over: the stem's modules return NaN of the right shape, so
    that whatever reads them is noticed and never wrong in silence.
    """

    def __init__(
        self,
        stack: str,
        model: nn.Module,
        host: str,
        groups: Sequence[LayerGroup],
        paths: list[str],
        embeddings: set[str],
    ) -> None:
        self.stack = stack
        self.host = model.get_submodule(host)
        self.group_names = tuple(group.name for group in groups)
        self.blocks = [model.get_submodule(path) for path in paths]
        inside = host + "." if host else ""
        self.stem_parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name in embeddings and name.startswith(inside) and not name.startswith(tuple(f"{p}." for p in paths))
        ]
        owned = {id(parameter) for _, parameter in self.stem_parameters}
        self._loose = [Place.of(model, name) for name, _ in self.stem_parameters]
        self._modules: dict[int, list[nn.Module]] = {}
        self.stem = list(_largest(self.host, owned, {id(block) for block in self.blocks}))
        names = list(inspect.signature(self.host.forward).parameters.values())
        self.positional = [p.name for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.run: Run | None = None
        self.stem_runs = False  # since something else reads what it computes: position biases of every block (MPNet)
        self.whole = False  # blocks hand on more than the activation (T5: position biases): all are passed over or none
        self._shapes: dict[tuple[Any, ...], tuple[Any, torch.dtype, torch.device]] = {}
        self._wraps: dict[int, tuple[int, int] | None] = {}

    def frozen_blocks(self) -> int:
        """Return how many blocks from the bottom are frozen, 0 unless the stem is."""
        if any(parameter.requires_grad for _, parameter in self.stem_parameters):
            return 0
        for index, block in enumerate(self.blocks):
            if any(parameter.requires_grad for parameter in block.parameters()):
                return index
        return len(self.blocks)

    def splits(self, boundary: int) -> bool:
        """Whether a boundary parts blocks that hand on more than the activation."""
        return self.whole and 0 < boundary < len(self.blocks)

    def boundary_in(self, trainable: Sequence[str]) -> int:
        """Return the boundary of a phase: frozen blocks below the lowest trainable group."""
        opened = {name.removeprefix("adapter.").removeprefix("base.") for name in trainable}  # of a PEFT model
        if "embeddings" in opened:
            return 0
        return min((index for index, name in enumerate(self.group_names) if name in opened), default=len(self.blocks))

    def parts(self) -> list[list[Place]]:
        """Where every tensor lies that decides what the stem computes, then the same for each block.

        The host's own buffers, and those of its modules that hold nothing else (rotary positions), go with the stem.
        """
        blocks = [places_of(block) for block in self.blocks]
        taken = {(id(place.owner), place.key) for block in blocks for place in block}
        own = (m for m in self.host.modules() if m is self.host or next(m.parameters(), None) is None)
        tables = [Place(key, module._buffers, key) for module in own for key in module._buffers]
        inside = [place for module in self.stem for place in places_of(module)]
        stem = {(id(place.owner), place.key): place for place in (*self._loose, *inside, *tables)}
        return [[place for key, place in stem.items() if key not in taken], *blocks]

    def config(self) -> dict[str, Any]:
        """Return what the config of the host says now."""
        return {**getattr(getattr(self.host, "config", None), "__dict__", {})}

    def text(self) -> str:
        """Describe the code of the prefix: classes, sizes, epsilons."""
        config = getattr(self.host, "config", None)
        parts = [type(self.host).__qualname__, *map(repr, self.stem), *map(repr, self.blocks[:1])]
        parts += map(_source, dict.fromkeys(map(type, self.host.modules())))
        if config is not None and hasattr(config, "to_dict"):
            values = config.to_dict() | {"attention": getattr(config, "_attn_implementation", None)}
            skipped = ("_name_or_path", "id2label", "label2id", "problem_type", "use_cache", "transformers_version")
            values = {k: v for k, v in values.items() if k not in skipped and not ("drop" in k and _is_rate(v))}
            parts += [f"{k}={v!r}" for k, v in sorted(values.items(), key=str)]
        return "\n".join(parts)

    def batch_norm(self, boundary: int) -> bool:
        """Whether a batch norm below the boundary uses the statistics of the batch."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.below(boundary))

    def hooked(self, boundary: int) -> str:
        """Name the module of the stem or of a block below the boundary on which a hook of the user's own stands."""
        for module in self.below(boundary):
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if not str(getattr(hook, "func", hook).__module__).startswith(LIBRARIES):
                    return type(module).__name__
        return ""

    def below(self, boundary: int) -> list[nn.Module]:
        """Return every module that is passed over."""
        if boundary not in self._modules:
            self._modules[boundary] = [m for part in (*self.stem, *self.blocks[:boundary]) for m in part.modules()]
        return self._modules[boundary]

    def shadows(self, host: Call | None) -> list[Shadow]:
        """Put the shadows in place."""
        found = [Shadow(module, self._stem_call(index)) for index, module in enumerate(self.stem)]
        found += [Shadow(block, self._block_call(index)) for index, block in enumerate(self.blocks)]
        return found + ([Shadow(self.host, host)] if host is not None else [])

    def _stem_call(self, index: int) -> Call:
        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.run
            if run is None:
                return original(*args, **kwargs)
            values = [*args, *kwargs.values()]
            known = (index, *(tuple(v.shape) if isinstance(v, torch.Tensor) else repr(v) for v in values))
            if run.start and known in self._shapes and not self.stem_runs:
                shape, dtype, device = self._shapes[known]
                return torch.full(shape, torch.nan, dtype=dtype, device=device)
            output = original(*args, **kwargs)
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                self._shapes[known] = output.shape, output.dtype, output.device
            return output

        return call

    def _block_call(self, index: int) -> Call:
        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.run
            if run is None:
                return original(*args, **kwargs)
            if index < run.start:
                below = args[0] if args else next(iter(kwargs.values()))
                self._look(index, run)
                return self._wrapped(index, run.activation if index == run.start - 1 else below)
            output = original(*args, **kwargs)
            run.calls.append(index)
            if index < max(run.watched, run.stop or 0):
                hidden = self._hidden(index, output, run)
                if index + 1 in run.capture:  # a copy, where the next block may write into it
                    run.captured[index + 1] = hidden if index + 1 == run.stop else hidden.clone()
            self._look(index, run)
            if index + 1 == run.stop:
                raise Reached
            return output

        return call

    def _look(self, index: int, run: Run) -> None:
        """At the boundary: whether a random number was drawn since the host began."""
        if index + 1 != run.watched or run.problem:
            return
        now = random_state(self.device)
        config = getattr(self.host, "config", None)
        dropped = getattr(self.host, "layerdrop", getattr(config, "layerdrop", None))
        if drew(run.state, now) and not (dropped == 0 and only_drew(run.state, now, run.watched)):
            run.problem = "random numbers are drawn below the boundary (dropout, LayerDrop or the like)"

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return next(self.blocks[0].parameters()).device

    def _hidden(self, index: int, output: Any, run: Run) -> torch.Tensor:
        """Find the activation in what a block returns: a tensor, or the first tensor of a tuple."""
        if isinstance(output, torch.Tensor) and not output.is_nested:
            self._wraps[index] = None
            return output
        items = output if isinstance(output, tuple) else ()
        places = [place for place, item in enumerate(items) if item is not None]
        if not places or not isinstance(items[places[0]], torch.Tensor):
            run.problem = run.problem or "the blocks do not return a tensor"
            return torch.empty(0)
        self.whole |= len(places) > 1
        self._wraps[index] = places[0], len(items)
        return items[places[0]]  # type: ignore[no-any-return]

    def _wrapped(self, index: int, hidden: Any) -> Any:
        form = self._wraps.get(index)
        if form is None:
            return hidden
        place, count = form
        return tuple(hidden if i == place else None for i in range(count))


def _is_rate(value: Any) -> bool:
    """Whether a setting is a number: what is dropped how often makes no difference in eval mode."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def _source(kind: type) -> str:
    """The code of a class of the user's own; that of a library is told by its version."""
    if kind.__module__.startswith(("torch.", "transformers.")):
        return kind.__qualname__
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made in an interactive session, or by a compiler
        return kind.__qualname__


def _largest(module: nn.Module, owned: set[int], blocks: set[int]) -> Iterator[nn.Module]:
    """The largest modules below this one whose parameters are all among those given."""
    for child in module.children():
        parameters = [id(parameter) for parameter in child.parameters()]
        if id(child) in blocks or not parameters:
            continue
        if all(parameter in owned for parameter in parameters):
            yield child
        else:
            yield from _largest(child, owned, blocks)
