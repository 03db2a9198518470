"""The V0 engine around one attention impl, and dense attention to compare what it answers with."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from . import batches, kernels, tiny_llama4

TOLERANCE = 1e-4
"""Largest absolute error of an output, in float32."""


@dataclass(frozen=True)
class Shape:
    """What stays the same throughout a run of the engine."""

    chunk: int
    block: int
    heads: int
    kv_heads: int
    max_len: int
    head_size: int = 32

    @property
    def columns(self) -> int:
        """Return the width of a full row of the block table."""
        return -(-self.max_len // self.block)


@dataclass(kw_only=True)
class Request(batches.Request):
    """A sequence with all its future tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __len__(self) -> int:
        return len(self.query)


Piece = batches.Piece[Request]


def dense(piece: Piece, shape: Shape, chunk: int | None) -> torch.Tensor:
    """Return attention by definition, with chunks or (None) without."""
    sequence, repeat = piece.sequence, shape.heads // shape.kv_heads
    query = sequence.query[piece.tokens]
    key = sequence.key[: piece.end].repeat_interleave(repeat, 1)
    value = sequence.value[: piece.end].repeat_interleave(repeat, 1)
    queries = torch.arange(piece.sequence.computed, piece.end)[:, None]
    keys = torch.arange(piece.end)[None, :]
    visible = keys <= queries
    if chunk is not None:
        visible &= keys // chunk == queries // chunk
    scores = torch.einsum("qhd,khd->hqk", query, key) * shape.head_size**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def check_layer(
    number: int, answer: torch.Tensor, pieces: Sequence[Piece], shape: Shape, chunk: int | None
) -> None:
    """Compare what a layer answers, padding or none at the end, with the reference."""
    expected = torch.cat([dense(piece, shape, chunk) for piece in pieces])
    error = float((answer[: len(expected)] - expected).abs().max())
    kind = "global" if chunk is None else "chunked"
    assert error <= TOLERANCE, f"wrong attention in {kind} layer {number}: off by {error}"


@dataclass
class Layer:
    """One attention layer with its own KV cache."""

    impl: Any
    chunk: int | None
    cache: torch.Tensor


@dataclass
class Driver:
    """Runs batches through the layers of one backend and checks what each answers."""

    module: Any
    config: Any
    shape: Shape
    kv_dtype: str = "auto"
    kinds: tuple[bool, ...] = (True, False, True, True)
    """Which layers are chunked."""
    model_layers: tuple[int, ...] = ()
    """Layers of the model to take the impls of, in place of constructing them here."""
    layers: list[Layer] = field(default_factory=list)
    free_blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape, config = self.shape, self.config
        config.model_config.attention_chunk_size = shape.chunk
        config.model_config.max_model_len = shape.max_len
        config.cache_config.block_size = shape.block
        total = 4 * shape.columns + 1
        # Block 0 is what padding points to. The order of the others is no sequence's.
        order = torch.randperm(total - 1, generator=self.random) + 1
        self.free_blocks = order.tolist()
        for number, is_chunked in enumerate(self.kinds):
            impl = self.model_impl(number) if self.model_layers else self.new_impl(is_chunked)
            chunk = shape.chunk if is_chunked else None
            self.layers.append(Layer(impl, chunk, self.new_cache(total)))

    @functools.cached_property
    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def normal(self, *size: int) -> torch.Tensor:
        values = torch.randn(size, generator=self.random)
        # What a cache of 8 bits holds without loss.
        return values.to(torch.float8_e5m2).float() if self.kv_dtype == "fp8_e5m2" else values

    @property
    def name(self) -> str:
        return str(self.module.__name__.rpartition(".")[2])

    def model_impl(self, number: int) -> Any:
        return tiny_llama4.attention_layer(self.config, self.model_layers[number]).attn.impl

    def new_impl(self, is_chunked: bool) -> Any:
        cls = "XFormersImpl" if self.name == "xformers" else "FlashAttentionImpl"
        with tiny_llama4.loading(self.config):
            return getattr(self.module, cls)(
                num_heads=self.shape.heads,
                head_size=self.shape.head_size,
                scale=self.shape.head_size**-0.5,
                num_kv_heads=self.shape.kv_heads,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype=self.kv_dtype,
                use_irope=is_chunked,
            )

    def new_cache(self, total_blocks: int) -> torch.Tensor:
        """Return a cache full of what other sequences left, which must not be looked at."""
        sizes = (2, total_blocks, self.shape.block, self.shape.kv_heads, self.shape.head_size)
        cache = kernels.stored(30 * torch.randn(sizes, generator=self.random), self.kv_dtype)
        return cache.flatten(2) if self.name == "xformers" else cache

    def sequence(self, length: int) -> Request:
        assert length <= self.shape.max_len
        count = -(-length // self.shape.block)
        blocks, self.free_blocks = self.free_blocks[:count], self.free_blocks[count:]
        assert len(blocks) == count
        return Request(
            query=self.normal(length, self.shape.heads, self.shape.head_size),
            key=self.normal(length, self.shape.kv_heads, self.shape.head_size),
            value=self.normal(length, self.shape.kv_heads, self.shape.head_size),
            blocks=blocks,
        )

    def metadata(self, pieces: Sequence[Piece], tables: bool, **options: Any) -> Any:
        shape = self.shape
        return batches.metadata(
            self.module, shape.block, pieces, tables, columns=shape.columns, **options
        )

    def forward(self, layer: Layer, pieces: Sequence[Piece], metadata: Any) -> torch.Tensor:
        padding = metadata.slot_mapping.shape[0] - sum(piece.length for piece in pieces)

        def stacked(name: str) -> torch.Tensor:
            parts = [getattr(piece.sequence, name)[piece.tokens] for piece in pieces]
            return torch.cat([*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])])

        query, key, value = map(stacked, ("query", "key", "value"))
        one = torch.ones(())
        scales = SimpleNamespace(
            _q_scale=one, _k_scale=one, _v_scale=one, _k_scale_float=1.0, _v_scale_float=1.0
        )
        output = torch.full_like(query, torch.nan)
        answer = layer.impl.forward(scales, query, key, value, layer.cache, metadata, output)
        return answer.view_as(query)

    def check(self, pieces: Sequence[Piece], metadata: Any) -> None:
        """Run one batch through all the layers and compare each answer with the reference."""
        for number, layer in enumerate(self.layers):
            answer = self.forward(layer, pieces, metadata)
            check_layer(number, answer, pieces, self.shape, layer.chunk)

    def step(self, pieces: Sequence[Piece], tables: bool, **options: Any) -> None:
        self.check(pieces, self.metadata(pieces, tables, **options))
        for piece in pieces:
            piece.sequence.computed = piece.end

    def fill_cache(self, sequence: Request, length: int) -> None:
        """Compute the first tokens of a sequence, as some request before did."""
        piece = Piece(sequence, length, is_prefill=True)
        slots = torch.tensor(piece.slots(self.shape.block))
        for layer in self.layers:
            key, value = sequence.key[:length], sequence.value[:length]
            if self.name == "xformers":
                paged = importlib.import_module("vllm.attention.ops.paged_attn").PagedAttention
                caches = paged.split_kv_cache(
                    layer.cache, self.shape.kv_heads, self.shape.head_size
                )
                kernels.reshape_and_cache(key, value, *caches, slots, self.kv_dtype)
            else:
                kernels.reshape_and_cache_flash(key, value, *layer.cache, slots)
        sequence.computed = length


SHAPE = Shape(chunk=32, block=16, heads=4, kv_heads=2, max_len=112)
"""What batches that matter by themselves have."""


def decode_across_boundaries(driver: Driver) -> None:
    """Every length comes by, and a short sequence decodes beside the long one."""
    shape = driver.shape
    long, short = driver.sequence(shape.max_len), driver.sequence(shape.max_len)
    driver.fill_cache(long, shape.chunk - 2)
    driver.fill_cache(short, 3)
    while long.computed < len(long):
        driver.step([Piece(s, 1, is_prefill=False) for s in (long, short)], tables=True)


def mixed_batch(driver: Driver) -> None:
    """Chunked prefill: a first part, a later part that crosses a boundary, and a decode."""
    shape = driver.shape
    first, later, decode = (driver.sequence(shape.max_len) for _ in range(3))
    driver.fill_cache(later, shape.chunk - 5)
    driver.fill_cache(decode, 2 * shape.chunk)
    pieces = [
        Piece(first, shape.chunk + 4, is_prefill=True),
        Piece(later, shape.chunk + 9, is_prefill=True),
        Piece(decode, 1, is_prefill=False),
    ]
    driver.step(pieces, tables=True)
