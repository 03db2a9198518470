"""V0 attention impls: chunked layers attend within their chunk, global layers over everything.

An impl is driven as the engine drives it: a batch's metadata is one object, which all the layers of
a forward pass share; sequences are prefilled at once, in parts, or from a cached prefix, and then
decode, in batches that mix all of it. The reference is dense attention over the whole sequence with
a mask that follows the definition. XFormers' prefix kernel is the real one, in Triton's
interpreter; the other kernels have no form for CPUs, and plain torch stands in for them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import batches, kernels, tiny_llama4
from .expected import (
    CHUNKS_IGNORED,
    CHUNKS_IGNORED_ERROR,
    KEYWORD_MISSING,
    KEYWORD_MISSING_ERROR,
    NO_PREFIX_BLOCK_8,
    V0_CHUNKED,
)
from .releases import in_order, installed_release

RELEASE = installed_release()
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0"),
    pytest.mark.usefixtures("one_thread"),
]

BACKENDS = list(kernels.BACKENDS)

keyword_missing = pytest.mark.fail_to_pass(
    releases=in_order(KEYWORD_MISSING), raises=KEYWORD_MISSING_ERROR
)
chunks_ignored = pytest.mark.fail_to_pass(
    releases=in_order(CHUNKS_IGNORED), raises=CHUNKS_IGNORED_ERROR
)


# What a batch is made of.


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


# The engine around an impl.


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
    worst: float = 0.0

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
            expected = torch.cat([dense(piece, self.shape, layer.chunk) for piece in pieces])
            error = float((answer[: len(expected)] - expected).abs().max())
            self.worst = max(self.worst, error)
            kind = "global" if layer.chunk is None else "chunked"
            assert error <= TOLERANCE, f"wrong attention in {kind} layer {number}: off by {error}"

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


NewDriver = Callable[..., Driver]


@pytest.fixture
def new_driver(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> NewDriver:
    """Return a function that gives a driver of a backend with the kernels stood in for."""
    config = start_engine({"VLLM_USE_V1": "0"})

    def new(backend: str, shape: Shape, **options: Any) -> Driver:
        return Driver(kernels.stand_in(monkeypatch, backend), config, shape, **options)

    return new


# Batches that matter by themselves.

SHAPE = Shape(chunk=32, block=16, heads=4, kv_heads=2, max_len=112)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, marks=keyword_missing),
        pytest.param(SHAPE.chunk - 1, marks=keyword_missing),
        pytest.param(SHAPE.chunk, marks=keyword_missing),
        pytest.param(SHAPE.chunk + 1, marks=chunks_ignored),
        pytest.param(3 * SHAPE.chunk, marks=chunks_ignored),
        pytest.param(SHAPE.max_len, marks=chunks_ignored),
    ],
)
def test_prompt(backend: str, length: int, new_driver: NewDriver) -> None:
    driver = new_driver(backend, SHAPE)
    driver.step([Piece(driver.sequence(length), length, is_prefill=True)], tables=False)


@chunks_ignored
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_across_boundaries(backend: str, new_driver: NewDriver) -> None:
    """Every length comes by, and a short sequence decodes beside the long one."""
    driver = new_driver(backend, SHAPE)
    long, short = driver.sequence(SHAPE.max_len), driver.sequence(SHAPE.max_len)
    driver.fill_cache(long, SHAPE.chunk - 2)
    driver.fill_cache(short, 3)
    while long.computed < len(long):
        driver.step([Piece(s, 1, is_prefill=False) for s in (long, short)], tables=True)


@chunks_ignored
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_batch(backend: str, new_driver: NewDriver) -> None:
    """Chunked prefill: a first part, a later part that crosses a boundary, and a decode."""
    driver = new_driver(backend, SHAPE)
    first, later, decode = (driver.sequence(SHAPE.max_len) for _ in range(3))
    driver.fill_cache(later, SHAPE.chunk - 5)
    driver.fill_cache(decode, 2 * SHAPE.chunk)
    pieces = [
        Piece(first, SHAPE.chunk + 4, is_prefill=True),
        Piece(later, SHAPE.chunk + 9, is_prefill=True),
        Piece(decode, 1, is_prefill=False),
    ]
    driver.step(pieces, tables=True)


@chunks_ignored
def test_prefix_hit_beside_miss(new_driver: NewDriver) -> None:
    """XFormers' builder gives the prompt that misses the cache an empty row of the table."""
    driver = new_driver("xformers", SHAPE)
    hit, miss = driver.sequence(SHAPE.max_len), driver.sequence(SHAPE.max_len)
    driver.fill_cache(hit, SHAPE.chunk + SHAPE.block)
    pieces = [
        Piece(hit, SHAPE.chunk, is_prefill=True),
        Piece(miss, SHAPE.max_len, is_prefill=True),
    ]
    metadata = driver.metadata(pieces, tables=True)
    metadata.block_tables[1] = 0
    driver.check(pieces, metadata)


@chunks_ignored
@pytest.mark.parametrize(
    ("backend", "use_cuda_graph", "capture_len"),
    [
        ("xformers", False, SHAPE.max_len),
        ("xformers", True, SHAPE.max_len),
        ("flash_attn", False, SHAPE.max_len),
        # Within several steps, sequences can outgrow what the graph was captured for: a chunk.
        ("flash_attn", True, SHAPE.chunk),
    ],
)
def test_same_metadata_again(
    backend: str, use_cuda_graph: bool, capture_len: int, new_driver: NewDriver
) -> None:
    """Multi-step scheduling advances a metadata object in place and uses it for the next pass."""
    driver = new_driver(backend, SHAPE)
    sequence = driver.sequence(SHAPE.max_len)
    driver.fill_cache(sequence, SHAPE.chunk - 3)
    metadata = None
    while sequence.computed < len(sequence):
        pieces = [Piece(sequence, 1, is_prefill=False)]
        fresh = driver.metadata(pieces, tables=True, capture_len=capture_len)
        if metadata is None:
            metadata = fresh
            metadata.use_cuda_graph = use_cuda_graph
        else:
            for name in ("seq_lens_tensor", "slot_mapping", "block_tables"):
                getattr(metadata, name).copy_(getattr(fresh, name))
        if not use_cuda_graph:
            metadata.max_decode_seq_len = pieces[0].end
            metadata._cached_decode_metadata = None
        driver.check(pieces, metadata)
        sequence.computed += 1


@chunks_ignored
@pytest.mark.parametrize("padding_len", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_padding(backend: str, padding_len: int, new_driver: NewDriver) -> None:
    """A batch padded to the size of a CUDA graph."""
    driver = new_driver(backend, SHAPE)
    sequence = driver.sequence(SHAPE.max_len)
    driver.fill_cache(sequence, 2 * SHAPE.chunk + 3)
    pieces = [Piece(sequence, 1, is_prefill=False)]
    metadata = driver.metadata(pieces, tables=True, padding=2, capture_len=SHAPE.max_len)
    metadata.seq_lens_tensor[1:] = padding_len
    driver.check(pieces, metadata)


@chunks_ignored
def test_speculative_decode(new_driver: NewDriver) -> None:
    """FlashAttention verifies several proposed tokens of a sequence at once."""
    driver = new_driver("flash_attn", SHAPE)
    one, other = driver.sequence(SHAPE.max_len), driver.sequence(SHAPE.max_len)
    driver.fill_cache(one, SHAPE.chunk - 2)
    driver.fill_cache(other, 2 * SHAPE.chunk)
    driver.step([Piece(one, 5, is_prefill=False), Piece(other, 2, is_prefill=False)], tables=True)


@chunks_ignored
def test_fp8_cache(new_driver: NewDriver) -> None:
    """An fp8_e5m2 cache, which is what GPUs before Hopper have V0 XFormers for."""
    driver = new_driver("xformers", SHAPE, kv_dtype="fp8_e5m2")
    prompt, later = driver.sequence(SHAPE.max_len), driver.sequence(SHAPE.max_len)
    driver.step([Piece(prompt, 2 * SHAPE.chunk + 1, is_prefill=True)], tables=False)
    driver.fill_cache(later, SHAPE.chunk + 7)
    pieces = [Piece(later, SHAPE.chunk, is_prefill=True), Piece(prompt, 1, is_prefill=False)]
    driver.step(pieces, tables=True)


@chunks_ignored
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_the_model(
    backend: str, new_driver: NewDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with impls that `llama4.py` and the attention layer construct."""
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", backend.upper())
    shape = dataclasses.replace(
        SHAPE,
        heads=tiny_llama4.HEADS,
        kv_heads=tiny_llama4.KV_HEADS,
        head_size=tiny_llama4.HEAD_SIZE,
    )
    layers = (tiny_llama4.ROPE_LAYER, tiny_llama4.NOPE_LAYER, tiny_llama4.ROPE_LAYER + 1)
    driver = new_driver(backend, shape, kinds=(True, False, True), model_layers=layers)
    sequence = driver.sequence(SHAPE.max_len)
    driver.step([Piece(sequence, 2 * SHAPE.chunk + 1, is_prefill=True)], tables=False)
    driver.step([Piece(sequence, 1, is_prefill=False)], tables=True)


# Batches that nobody thought of.


@st.composite
def shapes(draw: st.DrawFn, max_heads: int = 6, blocks: tuple[int, ...] = (8, 16, 32)) -> Shape:
    block = draw(st.sampled_from(blocks))
    chunk = block * draw(st.integers(1, 64 // block))
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.integers(1, min(3, max_heads // kv_heads)))
    max_len = chunk * 3 + draw(st.sampled_from((0, 1, block // 2, block)))
    return Shape(chunk, block, heads, kv_heads, max_len)


def lengths(shape: Shape, first: int, last: int) -> st.SearchStrategy[int]:
    """Draw lengths, many of them next to a multiple of the chunk."""
    near = {
        multiple + offset
        for multiple in range(0, shape.max_len + 1, shape.chunk)
        for offset in (-1, 0, 1, 2)
    }
    allowed = sorted(length for length in near if first <= length <= last)
    anywhere = st.integers(first, last)
    return st.one_of(st.sampled_from(allowed), anywhere) if allowed else anywhere


def draw_decodes(data: st.DataObject, driver: Driver, count: int) -> list[Piece]:
    shape, pieces = driver.shape, []
    for _ in range(count):
        length = data.draw(lengths(shape, 1, shape.max_len))
        sequence = driver.sequence(length)
        if length > 1:
            driver.fill_cache(sequence, length - 1)
        pieces.append(Piece(sequence, 1, is_prefill=False))
    return pieces


def draw_prefills(data: st.DataObject, driver: Driver, count: int, cached: bool) -> list[Piece]:
    shape, pieces = driver.shape, []
    for _ in range(count):
        length = data.draw(lengths(shape, 1, shape.max_len))
        sequence = driver.sequence(length)
        start = data.draw(lengths(shape, 0, length - 1)) if cached else 0
        if start:
            driver.fill_cache(sequence, start)
        pieces.append(Piece(sequence, length - start, is_prefill=True))
    return pieces


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        # One counterexample will do, as it is: on stock there are many.
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@chunks_ignored
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_prompts_and_decodes(backend: str, new_driver: NewDriver) -> None:
    @examples(225)
    @given(st.data(), shapes())
    def run(data: st.DataObject, shape: Shape) -> None:
        driver = new_driver(backend, shape)
        driver.step(draw_prefills(data, driver, 2, cached=False), tables=False)
        driver.step(draw_decodes(data, driver, 2), tables=True)

    run()


@chunks_ignored
@pytest.mark.parametrize(
    ("backend", "count", "max_heads", "kinds"),
    [
        # The interpreter takes its time, for each head of each piece.
        ("xformers", 25, 2, (True, False)),
        ("flash_attn", 100, 6, (True, False, True, True)),
    ],
)
def test_drawn_mixed_batches(
    backend: str, count: int, max_heads: int, kinds: tuple[bool, ...], new_driver: NewDriver
) -> None:
    blocks = (16, 32) if backend == "xformers" and RELEASE in NO_PREFIX_BLOCK_8 else (8, 16, 32)

    @examples(count)
    @given(st.data(), shapes(max_heads, blocks))
    def run(data: st.DataObject, shape: Shape) -> None:
        driver = new_driver(backend, shape, kinds=kinds)
        pieces = draw_prefills(data, driver, data.draw(st.integers(1, 2)), cached=True)
        pieces += draw_decodes(data, driver, data.draw(st.integers(0, 2)))
        driver.step(pieces, tables=True)

    run()


# What decides whether there are chunks at all.


@keyword_missing
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_longer_than_a_chunk(backend: str, new_driver: NewDriver) -> None:
    """No sequence outgrows its first chunk: global attention is the same, and stays as it is."""
    shape = Shape(chunk=40, block=16, heads=2, kv_heads=1, max_len=40)
    driver = new_driver(backend, shape)
    driver.step([Piece(driver.sequence(40), 40, is_prefill=True)], tables=False)
