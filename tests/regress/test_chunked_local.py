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
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import kernels, tiny_llama4
from .drawn import draw_decodes, draw_prefills, examples, shapes
from .driver import SHAPE, Driver, Piece, Shape, decode_across_boundaries, mixed_batch
from .expected import (
    CHUNKS_IGNORED,
    CHUNKS_IGNORED_ERROR,
    NO_PREFIX_BLOCK_8,
    V0_CHUNKED,
    keyword_missing,
)
from .releases import in_order, installed_release

RELEASE = installed_release()

pytestmark = [
    pytest.mark.skipif(RELEASE not in V0_CHUNKED, reason=f"{RELEASE} has no Llama 4 on V0"),
    pytest.mark.usefixtures("one_thread"),
]

BACKENDS = list(kernels.BACKENDS)

chunks_ignored = pytest.mark.fail_to_pass(
    releases=in_order(CHUNKS_IGNORED), raises=CHUNKS_IGNORED_ERROR
)


NewDriver = Callable[..., Driver]


@pytest.fixture
def new_driver(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> NewDriver:
    """Return a function that gives a driver of a backend with the kernels stood in for."""
    config = start_engine({"VLLM_USE_V1": "0"})
    # Once for all the drivers of a test: drawn batches make hundreds.
    module = functools.cache(lambda backend: kernels.stand_in(monkeypatch, backend))

    def new(backend: str, shape: Shape, **options: Any) -> Driver:
        return Driver(module(backend), config, shape, **options)

    return new


# Batches that matter by themselves.


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
@pytest.mark.parametrize("scenario", [decode_across_boundaries, mixed_batch])
def test_scenario(backend: str, scenario: Callable[[Driver], None], new_driver: NewDriver) -> None:
    scenario(new_driver(backend, SHAPE))


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
    backend: str, start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with impls that `llama4.py` and the attention layer construct."""
    config = start_engine({"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": backend.upper()})
    module = kernels.stand_in(monkeypatch, backend)
    shape = dataclasses.replace(
        SHAPE,
        heads=tiny_llama4.HEADS,
        kv_heads=tiny_llama4.KV_HEADS,
        head_size=tiny_llama4.HEAD_SIZE,
    )
    layers = (tiny_llama4.ROPE_LAYER, tiny_llama4.NOPE_LAYER, tiny_llama4.ROPE_LAYER + 1)
    driver = Driver(module, config, shape, kinds=(True, False, True), model_layers=layers)
    sequence = driver.sequence(SHAPE.max_len)
    driver.step([Piece(sequence, 2 * SHAPE.chunk + 1, is_prefill=True)], tables=False)
    driver.step([Piece(sequence, 1, is_prefill=False)], tables=True)


# Batches that nobody thought of.


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
