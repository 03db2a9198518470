"""Computing attention with the impls of the V1 engine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from regress import kernels, paged, tiny_llama4
from regress import test_v1_chunked_local as engines
from regress.test_chunked_local import Shape
from regress.test_v1_chunked_local import decode, prefill

from . import formats
from .probe import Key

MODULES = ("flash_attn", "triton_attn", "flashinfer", "flex_attention")
"""Of the impls whose kernels are stood in for."""

LAYERS = ((0, True), (3, False), (1, True))
"""Of the model, and whether they are chunked."""


def module_of(key: Key) -> str:
    """Return the name of the impl's module."""
    return key.backend.split(".")[1]


def can_run(key: Key) -> bool:
    """Return whether the impl's kernels are stood in for."""
    return module_of(key) in MODULES


@dataclass
class Engine(engines.Engine):
    """The layers of the model, with a cache in the cell's format."""

    kv_dtype: str = "auto"
    numbers: tuple[int, ...] = ()
    """Of the layers in the model."""

    def normal(self, *size: int) -> torch.Tensor:
        """Return random values."""
        return formats.exact(torch.randn(size, generator=self.random))

    def new_layer(self, number: int, is_chunked: bool) -> Any:
        """Construct a layer as `llama4.py` does."""
        return tiny_llama4.attention_layer(self.config, self.numbers[number]).attn

    def new_cache(self) -> torch.Tensor:
        """Return a cache full of what other sequences left."""
        return kernels.stored(super().new_cache(), self.kv_dtype)


def flash_attn(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlashAttention's kernels."""
    patch.setattr(module, "flash_attn_varlen_func", formats.flash_attn_varlen, raising=False)
    patch.setattr(module.ops, "scaled_fp8_quant", formats.scaled_fp8_quant)


def chunked_prefill_paged_decode(
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache_dtype: str,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    max_query_len: int,
    sm_scale: float,
    **_: Any,
) -> None:
    """Read the caches of PagedAttention, in the format that `kv_cache_dtype` names."""
    caches = [kernels.loaded(cache, kv_cache_dtype) for cache in (key_cache, value_cache)]
    key, value = kernels.token_major(*caches)
    kernels.flash_attn_varlen(
        q=query,
        k=key,
        v=value,
        out=output,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_seq_len,
        seqused_k=seq_lens,
        block_table=block_table,
        softmax_scale=sm_scale,
        causal=True,
    )


def triton_attn(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace what stands around Triton's kernels."""
    ops = importlib.import_module("vllm._custom_ops")
    patch.setattr(ops, "reshape_and_cache", kernels.reshape_and_cache)
    patch.setattr(ops, "scaled_fp8_quant", formats.scaled_fp8_quant)
    name = "chunked_prefill_paged_decode"
    patch.setattr(module, name, chunked_prefill_paged_decode, raising=False)
    patch.setattr(module, "unified_attention", formats.flash_attn_varlen, raising=False)


def flashinfer(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlashInfer."""
    for name, stand_in in engines.STAND_INS["flashinfer"].items():
        patch.setattr(module, name, stand_in)


def flex_attention(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlexAttention's compiled kernel, and make block masks on the CPU."""
    for name, stand_in in engines.STAND_INS["flex_attention"].items():
        patch.setattr(module, name, stand_in)
    create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
    on_cpu = tuple("cpu" if default == "cuda" else default for default in create.__defaults__)
    patch.setattr(create, "__defaults__", on_cpu)
    torch.compiler.set_stance("force_eager")


STAND_INS = {
    "flash_attn": flash_attn,
    "triton_attn": triton_attn,
    "flashinfer": flashinfer,
    "flex_attention": flex_attention,
}


def new_engine(
    config: Any,
    key: Key,
    shape: Shape,
    patch: pytest.MonkeyPatch,
    layers: Sequence[tuple[int, bool]],
) -> Engine:
    """Return an engine with the kernels stood in for."""
    name = module_of(key)
    module = importlib.import_module(f"vllm.v1.attention.backends.{name}")
    patch.setattr(
        torch.ops._C_cache_ops,
        "reshape_and_cache_flash",
        kernels.reshape_and_cache_flash if name != "flashinfer" else paged.reshape_and_cache,
        raising=False,
    )
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: paged.PROPERTIES)
    STAND_INS[name](module, patch)
    return Engine(
        name,
        module,
        config,
        shape,
        kinds=tuple(is_chunked for _, is_chunked in layers),
        numbers=tuple(number for number, _ in layers),
        kv_dtype=key.kv_cache_dtype,
    )


def run(
    config: Any,
    key: Key,
    shape: Shape,
    patch: pytest.MonkeyPatch,
    layers: Sequence[tuple[int, bool]] = LAYERS,
) -> None:
    """Prefill two prompts, one of them in parts, and decode."""
    engine = new_engine(config, key, shape, patch, layers)
    long, short = engine.sequence(shape.max_len), engine.sequence(shape.max_len)
    part = min(shape.chunk + 3, shape.max_len // 2)
    engine.step(prefill(long, part), prefill(short, 3))
    rest = min(shape.chunk + 1, shape.max_len - part - 2)
    engine.step(prefill(long, rest), decode(short))
    for _ in range(2):
        engine.step(decode(long), decode(short))
