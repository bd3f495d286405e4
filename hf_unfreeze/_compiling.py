"""Room for the graphs of torch.compile: every phase needs one of its own."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["GraphLimit"]

# The name of each limit, and its older name.
_LIMITS = (("recompile_limit", "cache_size_limit"), ("accumulated_recompile_limit", "accumulated_cache_size_limit"))


class GraphLimit:
    """Allows each phase as many new graphs as torch.compile allows a whole run.

    A graph holds for the flags it was traced under. Past the limit (8 graphs) torch goes on without compiling and
    says so in one log line only; a model of 12 blocks opened one by one gets there.
    """

    def __init__(self) -> None:
        self._given: dict[str, int] = {}
        self._raised: dict[str, int] = {}
        self._graphs_before = _graphs()

    def update(self) -> None:
        """Raise the limits by the number of graphs that there are."""
        config = _loaded("config")
        for names in _LIMITS if config is not None else ():
            name = next(name for name in names if hasattr(config, name))
            given = self._given.setdefault(name, getattr(config, name))
            self._raised[name] = max(self._raised.get(name, given), given + _graphs())
            setattr(config, name, self._raised[name])

    def close(self) -> None:
        """Put the limits back; graphs beyond them are dropped, or torch would compile nothing from now on."""
        config = _loaded("config")
        for name, given in self._given.items():
            if getattr(config, name) == self._raised[name]:  # nobody has set it since
                setattr(config, name, given)
        if self._given and _graphs() - self._graphs_before >= min(self._given.values()):
            _loaded("reset")()


def _loaded(name: str) -> Any:
    """Return an attribute of torch._dynamo where something has imported it already: that takes a second."""
    return getattr(sys.modules.get("torch._dynamo"), name, None)


def _graphs() -> int:
    utils = _loaded("utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0
