"""Stand-ins for packages that exist only on the hardware of the backend that imports them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

_libraries: list[torch.library.Library] = []


class _StubModule(ModuleType):
    """A module that has every name, each a mock: constructing an impl uses next to none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def _xla_library() -> torch.library.Library:
    """Return a real library: V1 Pallas defines an operator in it while it is imported."""
    if not _libraries:
        _libraries.append(torch.library.Library("xla", "FRAGMENT"))
    return _libraries[0]


def _fill(module: ModuleType) -> None:
    """Set the few names whose value matters to the code that uses them."""
    if module.__name__ == "torch_xla.experimental.custom_kernel":
        vars(module)["XLA_LIB"] = _xla_library()
    if module.__name__ == "torch_xla":
        # V1 Pallas compares it with 4, and a mock cannot be ordered.
        vars(module)["tpu"] = MagicMock(**{"version.return_value": 6})


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        _fill(module)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, _Loader(), is_package=True)


def _missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


@contextmanager
def stubbed(packages: Sequence[str]) -> Iterator[None]:
    """Make those of `packages` importable that are not installed, for as long as it lasts."""
    missing = [package for package in packages if _missing(package)]
    finder = _Finder(missing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.partition(".")[0] in missing:
                del sys.modules[name]


def import_untuned(module: str) -> Any:
    """Import a module with kernels that Triton is to tune, for which it asks for a GPU at once."""
    driver = importlib.import_module("triton.runtime.driver").driver
    driver.set_active(SimpleNamespace(get_benchmarker=lambda: None))
    try:
        return importlib.import_module(module)
    finally:
        driver.reset_active()
