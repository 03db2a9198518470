"""Have a launcher of vLLM run without a GPU, and collect the kernels that it would launch."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from .attempt import SharedMemoryError
from .cards import Card


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel as Triton was asked for it, with what it would be compiled from."""

    source: Any
    target: Any
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Return what tells it apart: the text of the kernel, and all it is compiled for."""
        options = sorted((name, str(value)) for name, value in self.options.items())
        text = f"{self.source.hash()} {self.target} {options}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Return module and function."""
        function = self.source.fn
        return f"{function.__module__}.{function.__name__}"

    def compile(self) -> int:
        """Compile it as far as machine code and return the shared memory of a block, in bytes.

        Raises:
            SharedMemoryError: the GPU has less, so that Triton would not load it.
        """
        compiler = importlib.import_module("triton.compiler.compiler")
        return int(compiler.compile(self.source, self.target, self.options).metadata.shared)


@dataclass
class Collected:
    """The kernels of one launcher, each once, in order."""

    kernels: list[Kernel] = field(default_factory=list)

    def add(self, kernel: Kernel) -> None:
        """Note a launch."""
        if kernel not in self.kernels:
            self.kernels.append(kernel)


_current: list[Collected] = []


def install(card: Card) -> None:
    """Have Triton take the machine for one with such a GPU, and compile nothing.

    For this process, for good: what a kernel is specialised for is kept with the kernel.
    """
    backends = importlib.import_module("triton.backends.compiler")
    target = backends.GPUTarget("cuda", 10 * card.capability[0] + card.capability[1], 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
        get_benchmarker=lambda: None,
    )
    importlib.import_module("triton.runtime.driver").driver.set_active(driver)
    _check_shared_memory(card)
    # Triton takes it from here when a kernel is launched for the first time.
    package = importlib.import_module("triton.compiler")
    setattr(package, "compile", _note)  # noqa: B010
    jit = importlib.import_module("triton.runtime.jit")
    run, mock = jit.JITFunction.run, jit.MockTensor.wrap_dtype

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """Do all that comes before a launch, as Triton's own way to compile ahead of time."""
        values = [_mocked(value, mock) for value in arguments]
        named = {name: _mocked(value, mock) for name, value in options.items()}
        kernel = run(self, *values, grid=grid, warmup=True, **named)
        _current[-1].add(kernel)
        return kernel

    jit.JITFunction.run = launch
    # Of the lines in its file, a kernel knows the first. Without it, releases with the same text
    # have the same kernel.
    jit.JITFunction.starting_line_number = _FirstLine()


def _check_shared_memory(card: Card) -> None:
    """Have Triton compare the shared memory of kernels as soon as it knows it.

    Triton does when it loads a kernel. What is too large takes ptxas minutes.
    """
    backend = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
    add_stages = backend.add_stages

    def add_checked(self: Any, stages: dict[str, Any], *options: Any) -> None:
        add_stages(self, stages, *options)
        to_ptx = stages["ptx"]

        def checked(source: Any, metadata: dict[str, Any]) -> Any:
            if metadata["shared"] > card.shared:
                raise SharedMemoryError(metadata["shared"])
            return to_ptx(source, metadata)

        stages["ptx"] = checked

    backend.add_stages = add_checked


class _FirstLine:
    """1, whatever it is set to."""

    def __get__(self, function: Any, _: type | None = None) -> int:
        return 1

    def __set__(self, function: Any, line: int) -> None:
        """Keep nothing."""


def _mocked(value: Any, mock: Any) -> Any:
    return mock(value.dtype) if isinstance(value, torch.Tensor) else value


def _note(source: Any, target: Any = None, options: Any = None) -> Kernel:
    return Kernel(source, target, dict(options or {}))


@contextmanager
def collecting() -> Iterator[Collected]:
    """Collect what is launched meanwhile."""
    _current.append(Collected())
    try:
        yield _current[-1]
    finally:
        _current.pop()
