"""What of the CUDA driver the tests of selection need beside the fake platform."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

from regress import fake_cuda


def install() -> None:
    """Install the fake GPU, before anything imports vllm."""
    fake_cuda.install()
    # FlashAttention asks torch, not vLLM's platform.
    setattr(torch.cuda, "get_device_capability", lambda *_, **__: fake_cuda.Device.capability)  # noqa: B010
    setattr(torch.cuda, "get_device_properties", lambda *_, **__: fake_cuda.Device.properties)  # noqa: B010
    # It needs a driver; without it, vLLM has no sleep mode, which nothing here asks for.
    sys.modules["vllm.cumem_allocator"] = None  # type: ignore[assignment]


def offer_flash_attention() -> None:
    """Have the wheel's FlashAttention kernels count as loaded: that takes a driver."""
    interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    folder = Path(str(interface.__file__)).parent
    for version in (2, 3):
        if list(folder.glob(f"_vllm_fa{version}_C*.so")):
            vars(interface)[f"FA{version}_AVAILABLE"] = True
