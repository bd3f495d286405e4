"""The engine: applies a schedule to a model and its optimizer. Knows torch, not Trainer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ._adapters import eligible_groups
from ._at_work import claim, release, take_over
from ._coverage import check_optimizer, opened_since, train_everything, warn_unreached, without_frozen
from ._decisions import decisions_of
from ._followers import followers_of
from ._kept import BestWeights, Kept, Pretrained
from ._options import Options, whole_number
from ._probe import Probe, Prober
from ._rates import Multipliers
from ._resume import Memory
from ._transition import Transition, announcement
from .cache import FrozenPrefixCache, recommended
from .distributed import of_rank_0, process_followers, refuse_wrappers, unwrap
from .errors import UnfreezeError
from .freezing import Follower, apply_trainable
from .groups import layer_groups
from .optim import GroupRates, raw_optimizer
from .optim import group_weight_decay as group_weight_decay_of
from .regularization import Pull
from .schedule import Phase, Schedule, parse_schedule, spec_of

__all__ = ["Probe", "Transition", "Unfreezer"]


class Unfreezer:
    """Opens a model group by group on a schedule, in a training loop of your own.

    Example:
        >>> unfreezer = Unfreezer(model, optimizer, "gradual(every=100step)")
        >>> for step, batch in enumerate(batches):
        ...     unfreezer.step(step)
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> unfreezer.close()

    Args:
        model: The model, wrapped or not. Build the optimizer over all its parameters before.
        optimizer: A torch optimizer, or Accelerate's wrapper of one.
        schedule: A spec string or a ``Schedule``; left out, ``top(0.4, encoder_until=40%)``, and on a CPU
            the cache in memory, unless ``cache`` says otherwise.
        total_steps: Optimizer updates of the whole run; needed where a time is in ``%``, so by an encoder with a
            decoder where no schedule is given.
        steps_per_epoch: Optimizer updates in one epoch; needed where a time is in ``ep``.
        layer_decay: Factor on the learning rate from each level to the one below it, in (0, 1]; ``"0.35->1.0"``
            changes it evenly from the first step to the last.
        block_warmup: Time (``"50step"``, ``"0.1ep"``, ``"2%"``) over which the learning rate of a group that opens
            after the first step rises linearly to its full value.
        frozen_eval: Whether frozen modules run in eval mode (no dropout, BatchNorm statistics at rest).
        pull: Strength of the pull of opened weights back to the pretrained ones, per unit of learning rate as weight
            decay is (L2-SP, arXiv 1802.01483); costs one copy of each opened parameter.
        dropout: Least dropout probability of modules that are open; 0 leaves the model's own.
        group_weight_decay: Weight decay of some groups, ``"head=0.1, block[0:4]=0"``; parameters without weight decay
            stay without.
        drop_state: Whether the optimizer forgets its state of parameters that are frozen again.
        offload_state: Whether the optimizer's state of frozen parameters lies in main memory.
        prefix_dtype: ``"bfloat16"`` or ``"float16"``: what the frozen blocks at the bottom compute in. Faster where
            the hardware is, and not exact. Not under ``torch.compile``.
        cache: ``"memory"``, ``"device"``, ``"disk"``, ``"disk:FOLDER"`` or a ``FrozenPrefixCache``: what frozen
            blocks compute for an example is kept for the whole run.
        probe: Batches on which schedules measure where gradients decide, such as ``auto``.

    Raises:
        ScheduleError: The schedule cannot be read or does not fit the model or the run.
        OptimizerError: The optimizer cannot train what the schedule opens.
        EnvironmentRefused: DeepSpeed, FSDP1, offloaded weights, or a model that was frozen before DDP wrapped it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: str | Schedule | None = None,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        layer_decay: float | str = 1.0,
        block_warmup: str | None = None,
        frozen_eval: bool = True,
        pull: float = 0.0,
        dropout: float = 0.0,
        group_weight_decay: str | None = None,
        drop_state: bool = False,
        offload_state: bool = False,
        prefix_dtype: str | None = None,
        cache: str | FrozenPrefixCache | None = None,
        probe: Probe | None = None,
    ) -> None:
        self._options = options = Options(
            layer_decay=layer_decay,
            block_warmup=block_warmup,
            frozen_eval=frozen_eval,
            pull=pull,
            dropout=dropout,
            group_weight_decay=group_weight_decay,
            drop_state=drop_state,
            offload_state=offload_state,
            prefix_dtype=prefix_dtype,
        )
        total_steps = None if total_steps is None else whole_number("total_steps", total_steps, 0)
        steps_per_epoch = None if steps_per_epoch is None else whole_number("steps_per_epoch", steps_per_epoch, 1)
        refuse_wrappers(model)
        self.optimizer = raw_optimizer(optimizer)
        root = unwrap(model)
        schedule, cache = recommended(schedule, cache)
        self.schedule = parse_schedule(schedule)
        take_over(root)
        named = dict(root.named_parameters())
        self.groups = eligible_groups(root, layer_groups(root))
        if self.schedule.name == "all_at_once":
            self.groups = without_frozen(self.groups, named)
        self._members = [(group, [named[name] for name in group.parameter_names]) for group in self.groups]
        kept = FrozenPrefixCache.parse(cache)
        by_name = {group.name: {name: named[name] for name in group.parameter_names} for group in self.groups}
        prober = partial(Prober, root, by_name, self.optimizer, self.schedule, probe)
        self.decisions = decisions_of(self.schedule, self.groups, total_steps, steps_per_epoch, prober)
        measure = self.decisions.measure
        if kept is not None and measure and (not self.decisions.only_freezes or measure.criterion.outputs):
            raise UnfreezeError(
                f"{self.schedule} measures inside frozen blocks, and the cache passes them over. "
                "Write cache=None, or another schedule."
            )
        self._multipliers = Multipliers(
            self.groups, self.schedule, layer_decay, block_warmup, total_steps, steps_per_epoch
        )
        warn_unreached(self.schedule, self.phases, self.groups, total_steps)
        self.trains_everything = measure is None and train_everything(self.phases, self.groups)
        idle = options.own_rates and self.trains_everything
        check_optimizer(self.schedule, self.optimizer, self._members, self.decisions.may_open, idle)

        self._step = 0
        self._current: Phase | None = None
        self._transition: Transition | None = None
        self._opened: dict[str, int] = {}
        self._flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._followers: list[Follower] = []
        self.pull: Pull | None = None
        self.best: BestWeights | None = None
        self._closed = False
        self._root = root
        claim(root, self)
        with ExitStack() as stack:
            stack.callback(self.close)  # what raises while hooks are set leaves none behind
            self._follow(model, root, named, options)
            if kept is not None:
                self._followers.append(kept.follow(root, self._upcoming, prefix_dtype))
            stack.pop_all()
        self.memory = Memory(self.schedule, self.decisions, self.kept)

    def _follow(self, model: nn.Module, root: nn.Module, named: dict[str, nn.Parameter], options: Options) -> None:
        """Set up what has to follow the flags."""
        group_of = {id(p): group.name for group, parameters in self._members for p in parameters}
        decays = group_weight_decay_of(options.group_weight_decay, self.groups)
        self._rates = GroupRates(self.optimizer, group_of, self._factors, decays)
        members = {name: named[name] for group in self.groups for name in group.parameter_names}
        for follower in followers_of(options, root, self.optimizer, members, self._rates):
            self._followers.append(follower)  # one by one: if the next cannot be made, this is closed
        self.pull = next((follower for follower in self._followers if isinstance(follower, Pull)), None)
        if self.decisions.keeps_best:
            self.best = BestWeights(members, root.named_buffers())
            self._followers.append(self.best)
        if self.pretrained is not None:
            self._followers.append(self.pretrained)
        opened = self.decisions.may_open
        trained = [p for group, parameters in self._members if group.name in opened for p in parameters]
        self._followers += process_followers(model, self.optimizer, trained, self._announcement)

    def step(self, global_step: int, epoch: float | None = None) -> Transition | None:
        """Enter the phase of this step. Call it before the forward of every optimizer step, also after a resume.

        Args:
            global_step: Optimizer updates done so far.
            epoch: Epochs done so far; no schedule needs it, and a Trainer has it at hand.

        Returns:
            The transition, or None where the trainable set stays as it is.

        Raises:
            UnfreezeError: It is closed, ``global_step`` is no whole number, or ranks disagree.
        """
        if self._closed:
            raise UnfreezeError("this Unfreezer is closed. Make a new one for another run.")
        global_step = whole_number("global_step", global_step, 0)
        self.memory.begin(global_step)
        self._step = global_step
        self.decisions.advance(global_step)
        self.memory.note_measured(global_step)
        number = bisect_right(self.phases, global_step, key=lambda phase: phase.start) - 1
        phase = self.phases[number]
        if phase is self._current:
            return None
        self._current = phase
        self._opened = opened_since(self.phases[: number + 1])
        if self.best and phase.restores and phase.start == global_step:  # and not where a run resumed later on
            self.best.restore()
        apply_trainable(self._members, phase.trainable)
        for follower in self._followers:
            follower.update()
        spec = spec_of(phase.trainable, self.groups)
        self._transition = Transition(global_step, number, spec, self.parameters_in(phase), phase.reason, phase.rates)
        self.memory.note_transition(self._transition)
        return self._transition

    def observe(self, metrics: Mapping[str, Any], global_step: int | None = None) -> None:
        """Take note of an evaluation, from which a schedule such as ``plateau`` decides; call it on every rank.

        Args:
            metrics: Name → number. On several ranks those of rank 0 hold.
            global_step: Optimizer updates done so far; by default one more than at the last ``step()``.

        Raises:
            ScheduleError: The metric is no number.
        """
        step = self._done if global_step is None else whole_number("global_step", global_step, 0)
        if not self.decisions.by_evaluations:
            return
        agreed = of_rank_0(metrics)
        self.memory.note([agreed], step)
        if self.decisions.observe(agreed, step) and self.best:
            self.best.take()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs that goes on from here, for ``accelerator.register_for_checkpointing(unfreezer)``.

        A schedule of set times needs nothing but the step. What data decided is in here, and the weights that ``pull``,
        ``restore_best`` and ``stop=no_gain`` return to.
        """
        return self.memory.state(self._done)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict()`` returned; then call ``step()`` with the step at which the run goes on.

        Args:
            state: What it returned, also after ``torch.save`` and ``torch.load``.

        Raises:
            UnfreezeError: This run has begun already, or the other kept no weights to return to.
        """
        self.memory.load(state, self._current is not None)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Every phase that is known by now, in the order of their steps."""
        return self.decisions.phases

    @property
    def kept(self) -> list[Kept]:
        """The copies of weights that a resumed run needs."""
        return [kept for kept in (self.pull and self.pull.kept, self.best, self.pretrained) if kept]

    @property
    def pretrained(self) -> Pretrained | None:
        """The weights with which the run began, where a criterion compares with them."""
        return self.decisions.measure.pretrained if self.decisions.measure else None

    def take_records(self) -> list[dict[str, Any]]:
        """Return what was measured since the last call, for a log: a resumed run needs it there."""
        return self.memory.take_records()

    @property
    def transition(self) -> Transition:
        """The transition that began the present phase."""
        if self._transition is None:
            raise UnfreezeError("no phase has begun. Call step(global_step) before the first forward.")
        return self._transition

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate each group got in the last optimizer step, bottom → top; 0.0 for a frozen one."""
        rates = self._rates.rates()
        return {group.name: rates[group.name] for group in self.groups if group.name in rates}

    def parameters_in(self, phase: Phase) -> int:
        """Return the number of parameters that train in a phase, one of ``phases``."""
        names = set(phase.trainable)
        return sum(p.numel() for group, parameters in self._members if group.name in names for p in parameters)

    def close(self) -> None:
        """Restore every flag, hook and mode; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        release(self._root, self)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for follower in reversed(self._followers):
            follower.close()

    @property
    def _done(self) -> int:
        """Optimizer updates, when the step that was entered last is over."""
        return self._step + 1 if self._current else self.memory.loaded

    def _announcement(self) -> list[str]:
        said = announcement(self._step, self._current, self.phases, self.groups)
        return [*said, f"with {self._options.told or 'no options'}"]

    def _upcoming(self) -> list[Phase]:
        possible = [Phase(self._step, names) for names in self.schedule.decided(self.groups)]
        known = [phase for phase in self.phases if self._current is None or phase.start >= self._current.start]
        return known + (possible if self.decisions.only_freezes else [])

    def _factors(self) -> dict[str, float]:
        return self._multipliers(self._step, self._opened, dict(self._current.rates) if self._current else {})
