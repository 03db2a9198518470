"""Stand-ins for kernels, with KV caches in the formats of 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from regress import kernels


def exact(values: torch.Tensor) -> torch.Tensor:
    """Round values to what both formats hold without loss."""
    return values.to(torch.float8_e5m2).float().to(torch.float8_e4m3fn).float()


def scaled_fp8_quant(
    values: torch.Tensor, scale: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise queries as FlashAttention has it done."""
    return values.to(torch.float8_e4m3fn), scale


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *_: Any,
) -> None:
    """Store tokens in caches of the type that they are viewed as, as Triton's kernel does."""
    name = next((n for n, dtype in kernels.FORMATS.items() if dtype is key_cache.dtype), "auto")
    if name != "auto":
        key_cache, value_cache = (cache.view(torch.uint8) for cache in (key_cache, value_cache))
    kernels.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, name)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a kernel reads in a tensor of this type."""
    return tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


def flash_attn_varlen(**arguments: Any) -> torch.Tensor:
    """Read caches in the type that they are viewed as."""
    for name in ("q", "k", "v"):
        arguments[name] = readable(arguments[name])
    if arguments.get("out") is None:
        arguments["out"] = torch.empty_like(arguments["q"])
    kernels.flash_attn_varlen(**arguments)
    return arguments["out"]


def flash_attn_kvcache(**arguments: Any) -> torch.Tensor:
    """Read caches in the type that they are viewed as."""
    for name in ("q", "k_cache", "v_cache"):
        arguments[name] = readable(arguments[name])
    kernels.flash_attn_kvcache(**arguments)
    return arguments["out"]
