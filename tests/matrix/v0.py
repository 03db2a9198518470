"""Computing attention with the impls of the V0 engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from regress import kernels
from regress.driver import Driver, Piece, Shape

from . import formats
from .probe import Key, demand

MODULES = {"xformers": "XFormersImpl", "flash_attn": "FlashAttentionImpl"}
"""Impls whose kernels are stood in for."""

LAYERS = ((0, True), (3, False), (1, True))
"""Of the model, and whether they are chunked."""


@dataclass
class EightBits(Driver):
    """A driver whose tensors survive a cache of either format."""

    def normal(self, *size: int) -> torch.Tensor:
        """Return random values."""
        return formats.exact(torch.randn(size, generator=self.random))


def can_run(key: Key) -> bool:
    """Return whether the impl's kernels are stood in for."""
    module, _, cls = key.backend.rpartition(".")
    return MODULES.get(module) == cls


def stand_in(module: str, patch: pytest.MonkeyPatch) -> Any:
    """Replace what has no form for CPUs, and return the impl's module."""
    found = kernels.stand_in(patch, module)
    if module == "flash_attn":
        patch.setattr(found, "flash_attn_varlen_func", formats.flash_attn_varlen)
        patch.setattr(found, "flash_attn_with_kvcache", formats.flash_attn_kvcache)
        patch.setattr(found.ops, "scaled_fp8_quant", formats.scaled_fp8_quant)
    return found


def run(
    config: Any,
    key: Key,
    shape: Shape,
    patch: pytest.MonkeyPatch,
    layers: Sequence[tuple[int, bool]] = LAYERS,
) -> None:
    """Prefill two prompts, whole as V0 does by default, and decode; then what the key adds."""
    module = stand_in(key.backend.partition(".")[0], patch)
    driver = EightBits(
        module,
        config,
        shape,
        kv_dtype=key.kv_cache_dtype,
        kinds=tuple(is_chunked for _, is_chunked in layers),
        model_layers=tuple(number for number, _ in layers),
    )
    demand(key, [layer.impl for layer in driver.layers])
    long, short = driver.sequence(shape.max_len), driver.sequence(shape.max_len)
    first = min(2 * shape.chunk + 1, shape.max_len - 2)
    pieces = [Piece(long, first, is_prefill=True), Piece(short, 3, is_prefill=True)]
    driver.step(pieces, tables=False)
    for _ in range(2):
        driver.step([Piece(one, 1, is_prefill=False) for one in (long, short)], tables=True)
    if key.in_parts:
        run_parts(driver)
    if key.verifies and key.backend.startswith("flash_attn."):
        verify(driver)


def run_parts(driver: Driver) -> None:
    """Prefill one prompt in two parts, the second beside a prompt and a decode."""
    shape = driver.shape
    long, short = driver.sequence(shape.max_len), driver.sequence(shape.max_len)
    part = min(shape.chunk + 4, shape.max_len // 2)
    for one, other in ((part, 3), (min(shape.chunk + 9, shape.max_len - part), 1)):
        pieces = [Piece(long, one, is_prefill=True), Piece(short, other, is_prefill=other > 1)]
        driver.step(pieces, tables=True)


def verify(driver: Driver) -> None:
    """Decode several proposed tokens of sequences at once, over the end of a chunk.

    FlashAttention does; with other backends each is a sequence of its own.
    """
    shape = driver.shape
    one, other = driver.sequence(shape.max_len), driver.sequence(shape.max_len)
    first = min(shape.chunk - 2, shape.max_len - 5)
    pieces = [Piece(one, first, is_prefill=True), Piece(other, 3, is_prefill=True)]
    driver.step(pieces, tables=False)
    pieces = [Piece(one, 5, is_prefill=False), Piece(other, 2, is_prefill=False)]
    driver.step(pieces, tables=True)
