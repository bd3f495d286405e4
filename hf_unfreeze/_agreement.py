"""Ranks that must do the same say what they are about to do, and go on only if all said the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from .errors import UnfreezeError

__all__ = ["agree", "told"]

_checks: Counter[str] = Counter()  # done so far in each process group: it numbers the keys
_told: Counter[str] = Counter()


def agree(group: dist.ProcessGroup, said: Sequence[str]) -> None:
    """Compare what this rank says with what rank 0 says, and learn whether every rank found it equal.

    It goes through the store that the ranks met in, not through a collective: a rank that is elsewhere, in the
    all-reduce of another step, must not receive it as a gradient. The wait ends with the timeout of the process group.

    Args:
        group: The ranks that have to agree.
        said: Lines; the first that differs is shown.

    Raises:
        UnfreezeError: The ranks do not agree (on every rank), or not all of them came.
    """
    check = _checks[group.group_name]
    _checks[group.group_name] += 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    store = _store(group, check)
    text = "\n".join(said)
    try:
        if rank == 0:
            store.set("rank0", text)
        first = store.get("rank0").decode()
        if text != first:
            store.set("other", f"rank {rank}: {_difference(text, first)}; rank 0: {_difference(first, text)}")
            store.add("differ", 1)
        _meet(store, "came", size)
    except RuntimeError as error:
        raise UnfreezeError(
            f"rank {rank}, {said[0]}: of {size} ranks {store.add('came', 0)} came to a transition before the timeout. "
            "Call step() on every rank with the same global_step, or give more time (ddp_timeout)."
        ) from error
    differ = store.add("differ", 0)
    if differ:
        other = store.get("other").decode()
        _meet(store, "left", size)  # rank 0 may be the one that keeps the store
        raise UnfreezeError(
            f"the ranks do not agree on what trains. {other} ({differ} of {size} ranks differ from rank 0). "
            "Give every rank the same schedule, steps_per_epoch, total_steps and global_step."
        )
    if rank == 0 and check:  # every rank has left the check before
        for key in ("rank0", "came", "came by all", "differ"):
            _store(group, check - 1).delete_key(key)


def told(group: dist.ProcessGroup, text: str) -> str:
    """Return what rank 0 says; the others wait for it, and the last to read it clears it away."""
    number = _told[group.group_name]
    _told[group.group_name] += 1
    store = _store(group, f"told/{number}")
    if dist.get_rank(group) == 0:
        store.set("rank0", text)
        return text
    try:
        text = store.get("rank0").decode()
    except RuntimeError as error:
        raise UnfreezeError("rank 0 did not come to observe() before the timeout. Call it on every rank.") from error
    if store.add("read", 1) == dist.get_world_size(group) - 1:
        store.delete_key("rank0")
        store.delete_key("read")
    return text


def _store(group: dist.ProcessGroup, check: int | str) -> Any:
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore(f"hf_unfreeze/{group.group_name}/{check}", _get_default_store())


def _meet(store: Any, key: str, size: int) -> None:
    """Wait until every rank is here."""
    if store.add(key, 1) == size:
        store.set(f"{key} by all", "")
    store.wait([f"{key} by all"])


def _difference(text: str, other: str) -> str:
    pairs = zip_longest(text.split("\n"), other.split("\n"), fillvalue="nothing")
    return next(f"'{mine}'" for mine, theirs in pairs if mine != theirs)
