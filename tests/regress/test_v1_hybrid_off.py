"""V1 of 0.10.0: which keys each layer sees, with and without the hybrid KV-cache manager.

There the model runner makes the metadata of chunked layers. It, the KV-cache configuration and
the metadata builders are the real ones; what the metadata lets each token see is compared with
the definition. With the hybrid manager, chunked and global layers are in groups of their own.
Without (a flag, KV transfer, KV events, EAGLE), they are in one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import v1_runner
from .expected import (
    FLEX_STALE_BLOCKS,
    FLEX_STALE_ERROR,
    HYBRID_OFF_ERROR,
    HYBRID_OFF_IGNORED,
    RUNNER_MAKES_CHUNKS,
    SPLIT_ERROR,
    SPLIT_REFUSES,
)
from .releases import in_order, installed_release
from .seen import (
    BATCHES,
    CHUNK,
    MAX_LEN,
    ONE_TOKEN_PIECE,
    Request,
    decode,
)
from .v1_runner import BACKENDS, Engine

RELEASE = installed_release()

pytestmark = pytest.mark.skipif(
    RELEASE not in RUNNER_MAKES_CHUNKS,
    reason=f"the model runner of {RELEASE} makes no metadata of chunks",
)

hybrid_off_ignored = pytest.mark.fail_to_pass(
    releases=in_order(HYBRID_OFF_IGNORED), raises=HYBRID_OFF_ERROR
)

flex_stale_blocks = pytest.mark.fail_to_pass(
    releases=in_order(FLEX_STALE_BLOCKS), raises=FLEX_STALE_ERROR
)
split_refuses = pytest.mark.fail_to_pass(releases=in_order(SPLIT_REFUSES), raises=SPLIT_ERROR)

NewEngine = Callable[..., Engine]


@pytest.fixture
def new_engine(
    start_engine: Callable[..., Any],
    stubs: Callable[[tuple[str, ...]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> NewEngine:
    """Return a function that gives an engine, by backend, with the hybrid manager or without."""

    def new(backend_name: str, hybrid: bool, max_len: int = MAX_LEN) -> Engine:
        backend = BACKENDS[backend_name]
        stubs(backend.stubs)
        # The CPU's backend is chosen by its platform, and here by what follows.
        env = {} if backend_name == "cpu" else {"VLLM_ATTENTION_BACKEND": backend.name}
        config = start_engine({"VLLM_USE_V1": "1", **env})
        config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
        return v1_runner.new_engine(config, backend_name, monkeypatch, max_len)

    return new


GPU_BACKENDS = [backend for backend in BACKENDS if backend != "cpu"]
"""The hybrid manager is never on for CPUs."""


def one_token_marks(backend: str, hybrid: bool) -> list[pytest.MarkDecorator]:
    """Return what stock fails of `test_one_token_piece`."""
    if not hybrid:
        return [hybrid_off_ignored]
    return {"flashinfer": [split_refuses], "flex": [flex_stale_blocks]}.get(backend, [])


def stale_marks(backend: str) -> list[pytest.MarkDecorator]:
    """Return what stock fails whatever the batch: the rows of the block table were used before."""
    return [flex_stale_blocks] if backend == "flex" else []


def backend_param(backend: str) -> Any:
    return pytest.param(backend, marks=stale_marks(backend))


def off_cases() -> list[Any]:
    """Return backends and batches without the hybrid manager, with what stock fails."""
    return [
        pytest.param(
            backend,
            batch,
            marks=stale_marks(backend) if batch == "within-chunk" else [hybrid_off_ignored],
        )
        for backend in BACKENDS
        for batch in BATCHES
    ]


@pytest.mark.parametrize(("backend", "batch"), off_cases())
def test_hybrid_off(backend: str, batch: str, new_engine: NewEngine) -> None:
    """Chunked and global layers of one KV-cache group have metadata of their own."""
    new_engine(backend, hybrid=False).check(BATCHES[batch])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", map(backend_param, GPU_BACKENDS))
def test_hybrid_on(backend: str, batch: str, new_engine: NewEngine) -> None:
    """In groups of their own they had that already."""
    new_engine(backend, hybrid=True).check(BATCHES[batch])


@pytest.mark.parametrize(
    ("backend", "hybrid"),
    [
        pytest.param(backend, hybrid, marks=one_token_marks(backend, hybrid))
        for backend in BACKENDS
        for hybrid in (False, True)
        if backend in GPU_BACKENDS or not hybrid
    ],
)
def test_one_token_piece(backend: str, hybrid: bool, new_engine: NewEngine) -> None:
    """A chunk boundary may cut a single token off a prefill: no decode, though as short as one."""
    new_engine(backend, hybrid).check(ONE_TOKEN_PIECE)


@hybrid_off_ignored
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps(backend: str, new_engine: NewEngine) -> None:
    """Builders keep state from one step to the next."""
    engine = new_engine(backend, hybrid=False)
    for batch in BATCHES.values():
        engine.check(batch)


@pytest.mark.parametrize("backend", map(backend_param, BACKENDS))
def test_no_longer_than_a_chunk(backend: str, new_engine: NewEngine) -> None:
    """No sequence outgrows its first chunk, so layers share their metadata as ever."""
    engine = new_engine(backend, hybrid=False, max_len=CHUNK)
    metadata, _ = engine.prepare([Request(0, CHUNK)])
    assert len({id(of_layer) for of_layer in metadata.values()}) == 1
    engine.check([decode(CHUNK), Request(3, 4)])
