"""V1 backends whose impls take `use_irope`: chunked layers attend within their chunk.

`v1_driver.py` is the engine around them. FlashInfer is not there and its kernels have no form for
CPUs: plain torch, fed by what is planned, stands in for them (`paged.py`), and for FlexAttention's
compiled kernel. The reference is dense.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import kernels, paged
from .drawn import examples, lengths, shapes
from .driver import Piece, Shape
from .expected import (
    BY_KEY,
    CHUNKS_IGNORED_ERROR,
    KEYWORD_MISSING_ERROR,
    V1_CHUNKED,
)
from .releases import in_order, installed_release
from .v1_driver import STAND_INS, Engine, decode, prefill

RELEASE = installed_release()

pytestmark = pytest.mark.usefixtures("one_thread")


def backend_param(backend: str, rejects_only: bool = False) -> Any:
    """Return a backend with its marker, skipped where its impl takes no `use_irope`.

    `rejects_only`: stock computes the right thing where it accepts the keyword at all.
    """
    impl, chunked = BY_KEY[f"v1-{backend}"], V1_CHUNKED[backend]
    marks = []
    if rejects_only and impl.rejects:
        releases, error = in_order(impl.rejects), KEYWORD_MISSING_ERROR
        marks.append(pytest.mark.fail_to_pass(releases=releases, raises=error))
    if not rejects_only:
        releases, error = in_order(chunked), CHUNKS_IGNORED_ERROR
        marks.append(pytest.mark.fail_to_pass(releases=releases, raises=error))
    if RELEASE not in chunked:
        reason = f"no V1 {backend} layer of {RELEASE} is told of chunks by use_irope"
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(backend, id=backend, marks=marks)


def for_backends(*backends: str, rejects_only: bool = False) -> pytest.MarkDecorator:
    """Parametrize a test over `backends`, by default over all of them."""
    names = backends or tuple(V1_CHUNKED)
    return pytest.mark.parametrize("backend", [backend_param(name, rejects_only) for name in names])


SHAPE = Shape(chunk=32, block=16, heads=4, kv_heads=2, max_len=112, head_size=64)


NewEngine = Callable[..., Engine]


@pytest.fixture
def _eager_block_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have block masks made by the real function, uncompiled, and on the CPU by default."""
    create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
    on_cpu = tuple("cpu" if default == "cuda" else default for default in create.__defaults__)
    monkeypatch.setattr(create, "__defaults__", on_cpu)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def new_engine(
    _eager_block_masks: None,
    start_engine: Callable[..., Any],
    stubs: Callable[[tuple[str, ...]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> NewEngine:
    """Return a function that gives an engine of a backend with the kernels stood in for."""

    @functools.cache
    def prepared(backend: str) -> tuple[Any, Any]:
        stubs(("flashinfer",))
        config = start_engine({"VLLM_ATTENTION_BACKEND": backend.upper()})
        module = importlib.import_module(BY_KEY[f"v1-{backend}"].module)
        for name, stand_in in STAND_INS[backend].items():
            monkeypatch.setattr(module, name, stand_in)
        return module, config

    monkeypatch.setattr(
        torch.ops._C_cache_ops,
        "reshape_and_cache_flash",
        kernels.reshape_and_cache_flash,
        raising=False,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: paged.PROPERTIES)

    def new(backend: str, shape: Shape = SHAPE, **options: Any) -> Engine:
        return Engine(backend, *prepared(backend), shape, **options)

    return new


# Batches that matter by themselves.


@for_backends(rejects_only=True)
@pytest.mark.parametrize("length", [1, SHAPE.chunk - 1, SHAPE.chunk])
def test_prompt_within_chunk(backend: str, length: int, new_engine: NewEngine) -> None:
    engine = new_engine(backend)
    engine.step(prefill(engine.sequence(length), length))


@for_backends()
@pytest.mark.parametrize("length", [SHAPE.chunk + 1, 3 * SHAPE.chunk, SHAPE.max_len])
def test_prompt(backend: str, length: int, new_engine: NewEngine) -> None:
    engine = new_engine(backend)
    engine.step(prefill(engine.sequence(length), length))


@for_backends()
def test_decode_across_boundaries(backend: str, new_engine: NewEngine) -> None:
    """Every length comes by, and a short sequence decodes beside the long one."""
    engine = new_engine(backend)
    long, short = engine.sequence(SHAPE.max_len), engine.sequence(SHAPE.max_len)
    engine.fill_cache(long, SHAPE.chunk - 2)
    engine.fill_cache(short, 3)
    while long.computed < len(long):
        engine.step(decode(long), decode(short))


@for_backends()
@pytest.mark.parametrize("part", [SHAPE.chunk - 5, SHAPE.chunk, SHAPE.chunk + 9])
def test_chunked_prefill(backend: str, part: int, new_engine: NewEngine) -> None:
    """A prompt that comes in parts, none of them where the chunks are."""
    engine = new_engine(backend)
    sequence = engine.sequence(SHAPE.max_len)
    while sequence.computed < len(sequence):
        engine.step(prefill(sequence, min(part, len(sequence) - sequence.computed)))


@for_backends()
def test_mixed_batch(backend: str, new_engine: NewEngine) -> None:
    """Prefills come before decodes, and one ends with a token that is alone in its chunk."""
    engine = new_engine(backend)
    first, later, young, old = (engine.sequence(SHAPE.max_len) for _ in range(4))
    engine.fill_cache(later, SHAPE.chunk - 5)
    engine.fill_cache(young, 3)
    engine.fill_cache(old, 2 * SHAPE.chunk)
    engine.step(prefill(first, SHAPE.chunk + 1), decode(young), prefill(later, 14), decode(old))
    engine.step(decode(first), prefill(young, 2), decode(later), prefill(old, SHAPE.chunk))


@for_backends()
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_heads(backend: str, heads: int, new_engine: NewEngine) -> None:
    """Multi-query, multi-head and grouped-query attention."""
    shape = replace(SHAPE, heads=heads, kv_heads=min(heads, 2))
    engine = new_engine(backend, shape)
    sequence = engine.sequence(SHAPE.max_len)
    engine.step(prefill(sequence, SHAPE.max_len - 1))
    engine.step(decode(sequence))


@for_backends("flashinfer")
@pytest.mark.parametrize("shared", [SHAPE.block, SHAPE.chunk, SHAPE.chunk + SHAPE.block])
def test_cascade(backend: str, shared: int, new_engine: NewEngine) -> None:
    """Global layers compute a prefix that all requests share once; it is no chunk's."""
    engine = new_engine(backend)
    one = engine.sequence(SHAPE.max_len)
    other = engine.sequence(SHAPE.max_len, after=one, shared=shared)
    engine.fill_cache(one, 2 * SHAPE.chunk + 3)
    engine.fill_cache(other, 2 * SHAPE.chunk - 1)
    metadata = engine.step(decode(one), prefill(other, 5), common_prefix_len=shared)
    assert metadata.use_cascade


@for_backends("flashinfer")
def test_one_workspace(
    backend: str, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrappers for chunks take the workspace that there is: another would be 256 MiB."""
    used = []

    def note(wrapper: type[Any]) -> Callable[..., Any]:
        def make(workspace: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            used.append(workspace)
            return wrapper(workspace, *args, **kwargs)

        return make

    for name in ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"):
        monkeypatch.setitem(STAND_INS[backend], name, note(paged.FLASHINFER[name]))
    engine = new_engine(backend)
    sequence, other = engine.sequence(SHAPE.max_len), engine.sequence(SHAPE.max_len)
    engine.fill_cache(sequence, SHAPE.chunk + 3)
    engine.step(decode(sequence), prefill(other, SHAPE.chunk + 3))
    assert len(used) == 4
    assert len(set(map(id, used))) == 1


# Batches that nobody thought of.


def draw_pieces(data: st.DataObject, engine: Engine, count: int) -> list[Piece]:
    """Draw decodes, prompts, and parts of prompts, in any order."""
    pieces = []
    for _ in range(count):
        length = data.draw(lengths(engine.shape, 1, engine.shape.max_len))
        starts = st.one_of(st.just(length - 1), lengths(engine.shape, 0, length - 1))
        start, sequence = data.draw(starts), engine.sequence(length)
        if start:
            engine.fill_cache(sequence, start)
        pieces.append(Piece(sequence, length - start, is_prefill=length - start > 1))
    return pieces


@for_backends()
def test_drawn_batches(backend: str, new_engine: NewEngine) -> None:
    @examples(200)
    @given(st.data(), shapes())
    def run(data: st.DataObject, shape: Shape) -> None:
        shape = replace(shape, head_size=64)
        engine = new_engine(backend, shape, kinds=(True, False))
        engine.step(*draw_pieces(data, engine, data.draw(st.integers(1, 4))))

    run()


# What decides whether there are chunks at all.


@for_backends(rejects_only=True)
def test_no_longer_than_a_chunk(backend: str, new_engine: NewEngine) -> None:
    """No sequence outgrows its first chunk: global attention is the same, whatever the blocks."""
    shape = replace(SHAPE, chunk=40, max_len=40)
    engine = new_engine(backend, shape)
    engine.step(prefill(engine.sequence(40), 40))


@for_backends()
def test_block_across_chunks(backend: str, new_engine: NewEngine) -> None:
    """Where chunks do not consist of whole blocks, a backend is right or says what to do."""
    shape = replace(SHAPE, chunk=40)
    try:
        engine = new_engine(backend, shape)
        sequence = engine.sequence(shape.max_len)
        engine.step(prefill(sequence, 2 * shape.chunk + 1))
        engine.step(decode(sequence))
    except (AssertionError, ValueError) as error:
        # The engine selection refuses such a configuration before.
        if not re.search(r"block size \(16\) does not divide|is not divisible by", str(error)):
            raise
