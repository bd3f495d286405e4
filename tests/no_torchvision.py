"""timm imports torchvision for its data transforms only; where torchvision is missing, names stand in for it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import ClassVar


class _Names(type):
    """A class whose every attribute is its own name: enough for the tables that timm builds at import."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def import_timm(monkeypatch):
    """Import timm; what stands in for torchvision is gone after the test."""
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setattr(sys, "meta_path", [_Finder(), *sys.meta_path])
    import timm

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        if isinstance(sys.modules[name], _StandIn):
            monkeypatch.delitem(sys.modules, name)
    return timm
