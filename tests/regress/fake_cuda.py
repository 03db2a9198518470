"""A CUDA platform without a GPU, for everything that vLLM decides before it runs a kernel.

vLLM takes it through its own plugin interface, so its engine selection, backend selection and
layer construction run unchanged; only what a driver would answer is made up.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

DISTRIBUTION = "vllm-regress-fake-cuda"

# What vLLM asks of its compiled extension while modules are imported, as the same five questions
# in all the releases.
CAPABILITY_QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_sparse_scaled_mm_supported",
    "cutlass_group_gemm_supported",
)

_libraries: list[torch.library.Library] = []


class Device:
    """The made-up GPU: tests set its capability."""

    capability: tuple[int, int] = (8, 0)
    total_memory = 24 << 30
    name = "made-up"
    properties = SimpleNamespace(name=name, total_memory=total_memory, gcnArchName="gfx90a")


class _PluginDistribution(Distribution):
    """An installed package, held in memory, that has nothing but vLLM's platform entry point."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 0\n",
            "entry_points.txt": f"[vllm.platform_plugins]\nfake_cuda = {__name__}:register\n",
        }.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(path)


class _PluginFinder(DistributionFinder):
    """Lets `importlib.metadata` find the distribution above."""

    def find_spec(self, _fullname: str, _path: Any, _target: Any = None) -> ModuleSpec | None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        name = None if context is None else context.name
        return [_PluginDistribution()] if name in (None, DISTRIBUTION) else []


def register() -> str:
    """Answer vLLM's platform plugin call with the qualified name of the platform class."""
    return f"{__name__}.FakeCudaPlatform"


def _platform() -> type:
    """Build the platform class, with vLLM's own CUDA platform as its base."""
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    # All three take a class and a device number, which make no difference here. The base class
    # would ask torch, and in some releases remember the answer for the rest of the process.
    members = {
        "get_device_capability": classmethod(lambda *_, **__: DeviceCapability(*Device.capability)),
        "get_device_name": classmethod(lambda *_, **__: Device.name),
        "get_device_total_memory": classmethod(lambda *_, **__: Device.total_memory),
        # Where vLLM registers its own operators. The tensors are on the CPU.
        "dispatch_key": "CPU",
    }
    return type("FakeCudaPlatform", (NonNvmlCudaPlatform,), members)


def __getattr__(name: str) -> type:
    """Build `FakeCudaPlatform` when vLLM resolves its name: its base must not load before."""
    if name != "FakeCudaPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _platform()


def _stub_extension() -> None:
    """Stand in for `vllm._C`, which cannot be loaded without a CUDA driver.

    No test calls a kernel, so an empty module will do, and the answer no to what vLLM asks of it.
    """
    sys.modules["vllm._C"] = ModuleType("vllm._C")
    library = torch.library.Library("_C", "FRAGMENT")
    for question in CAPABILITY_QUESTIONS:
        library.define(f"{question}(int cuda_device_capability) -> bool")
        library.impl(question, lambda _: False, "CompositeExplicitAutograd")
    # The operators live as long as this object does.
    _libraries.append(library)


def hide_gpu() -> None:
    """Make any real GPU and its driver invisible. To be called before anything imports vllm."""
    if "vllm" in sys.modules:
        raise RuntimeError("vllm was imported before its platform could be replaced")
    # No real GPU may be touched where there is one. It also lets 0.9.2 and later import Triton,
    # which they give up without an active driver unless no device is visible.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        _stub_extension()


def install() -> None:
    """Make vLLM see the fake platform. To be called before anything imports vllm."""
    hide_gpu()
    os.environ.pop("VLLM_PLUGINS", None)
    sys.meta_path.append(_PluginFinder())
    names = [point.name for point in metadata.entry_points(group="vllm.platform_plugins")]
    if names != ["fake_cuda"]:
        raise RuntimeError(f"platform plugins {names}: only the fake one may be installed")
