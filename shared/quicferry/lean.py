"""Imports that leave out what a server never uses: every page it loads is dumped, carried over and restored.

Both context managers put something into ``sys.modules`` while their block runs and take it away again, so that
they reach only the modules which are first imported inside; what was there before is left alone. They belong
at the top of a package: another thread that imports meanwhile would see the same.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside, ``names`` seem not to be installed: for libraries that use them where they are and can do without."""
    hidden: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, sys) is None:
                del sys.modules[name]


@contextlib.contextmanager
def later(*names: str) -> Iterator[None]:
    """Inside, importing one of ``names`` gives a stand-in, which loads the module when it is first used.

    A dotted name stands for a submodule; its parent, if not loaded, gets a stand-in too.
    """
    standing: dict[str, ModuleType] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        if name in sys.modules or parent in sys.modules:
            continue
        standing[name] = _StandIn(name)
        if parent:
            standing[parent] = _StandIn(parent)
            standing[parent].__dict__[child] = standing[name]
    sys.modules.update(standing)
    try:
        yield
    finally:
        for name, stand_in in standing.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


def version(distribution: str) -> str:
    """A distribution's version, from the name of its folder (PEP 376); 0.0.0 if it is not installed.

    ``importlib.metadata`` says the same, and takes zip files, e-mail and three compression libraries to do it.
    """
    stem = f"{distribution.replace('-', '_')}-"
    for place in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(place or "."):
                if name.startswith(stem) and name.endswith(".dist-info"):
                    return name.removeprefix(stem).removesuffix(".dist-info")
    return "0.0.0"


class _StandIn(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system looks at these
            raise AttributeError(attribute)
        # The real parents too, or the import would end at their stand-ins.
        name = self.__name__
        while name:
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]
            name = name.rpartition(".")[0]
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)
        return value
