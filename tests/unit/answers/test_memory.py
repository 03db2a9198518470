"""The memory that Llama 4 takes, against what its publishers say and sums made by hand."""

from __future__ import annotations

import pytest

from overlay.answers import memory
from overlay.answers.memory import (
    FP8,
    FP8_EXPERTS,
    GIB,
    MAVERICK,
    SCOUT,
    UNQUANTISED,
    W4A16,
    Cache,
    Format,
    Shape,
)

ALL = Cache(bits=16, drops=False)
CHUNKS = Cache(bits=16, drops=True)


@pytest.mark.parametrize(
    ("shape", "parameters", "active"),
    # Of the hub's pages, to the last parameter; and of Meta's, in billions.
    [(SCOUT, 108_641_793_536, 17), (MAVERICK, 401_583_781_376, 17)],
    ids=["Scout", "Maverick"],
)
def test_parameters_are_those_published(shape: Shape, parameters: int, active: int) -> None:
    assert shape.parameters == parameters
    assert round(shape.active / 1e9) == active


def test_experts_of_scout_by_hand() -> None:
    """Gate, up and down of 16 experts in 48 layers, and one shared in each."""
    expert = 5120 * 8192 * 3
    assert SCOUT.routed == 48 * 16 * expert
    assert SCOUT.dense == 48 * expert
    assert (SCOUT.moe_layers, SCOUT.global_layers) == (48, 12)


def test_experts_of_maverick_by_hand() -> None:
    """128 experts in every second layer, and an MLP twice as wide in the others."""
    expert = 5120 * 8192 * 3
    assert MAVERICK.routed == 24 * 128 * expert
    assert MAVERICK.dense == 24 * expert + 24 * 5120 * 16384 * 3


@pytest.mark.parametrize(
    ("form", "shape", "gigabytes"),
    [
        (UNQUANTISED, SCOUT, 217.28),
        # 102.68e9 parameters at one byte, 5.96e9 at two.
        (FP8, SCOUT, 102.68 + 2 * 5.96),
        (W4A16, SCOUT, 102.68 * 0.515625 + 2 * 5.96),
        (FP8_EXPERTS, MAVERICK, 386.55 + 2 * 15.04),
    ],
    ids=["unquantised", "fp8", "w4a16", "maverick-fp8"],
)
def test_weights_by_format(form: Format, shape: Shape, gigabytes: float) -> None:
    assert form.bytes(shape) / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_float32_takes_twice_the_memory() -> None:
    assert UNQUANTISED.bytes(SCOUT, 32) == 2 * UNQUANTISED.bytes(SCOUT)
    assert W4A16.bytes(SCOUT, 32) - W4A16.bytes(SCOUT) == pytest.approx(2 * 5.96e9, rel=0.01)


def test_a_token_takes_192_kib() -> None:
    """Keys and values of 8 heads of 128, 2 bytes each, in 48 layers."""
    assert ALL.bytes(SCOUT, 1) == 2 * 8 * 128 * 2 * 48 == 192 * 1024
    assert Cache(bits=8, drops=False).bytes(SCOUT, 1) == 96 * 1024


@pytest.mark.parametrize(
    ("length", "kept", "dropped"),
    # GiB: 48 layers at 4 KiB a token; 12 of them, and 36 that hold a chunk and a step.
    [(8192, 1.5, 1.5), (32768, 6, 1.5 + 2.25), (131072, 24, 6 + 2.25)],
)
def test_the_cache_of_a_sequence(length: int, kept: float, dropped: float) -> None:
    assert ALL.bytes(SCOUT, length) / GIB == kept
    assert CHUNKS.bytes(SCOUT, length) / GIB == dropped


def test_the_cache_is_spread_by_heads() -> None:
    whole = ALL.bytes(SCOUT, 8192)
    assert [whole // ALL.bytes(SCOUT, 8192, gpus) for gpus in (1, 2, 4, 8, 16)] == [1, 2, 4, 8, 8]


def test_tensor_parallel_sizes_divide_the_heads() -> None:
    assert memory.tensor_parallel(SCOUT) == (1, 2, 4, 8)
    assert memory.tensor_parallel(SCOUT.model_copy(update={"kv_heads": 10})) == (1, 2, 5)


@pytest.mark.parametrize(
    ("shape", "form", "mib", "length"),
    [
        (SCOUT, UNQUANTISED, 81559, 1_000_000),
        (MAVERICK, FP8_EXPERTS, 81559, 430_000),
        (SCOUT, UNQUANTISED, 143771, 3_600_000),
        (MAVERICK, FP8_EXPERTS, 143771, 1_000_000),
    ],
    ids=["scout-h100", "maverick-h100", "scout-h200", "maverick-h200"],
)
def test_what_vllm_says_fits_on_eight_fits(
    shape: Shape, form: Format, mib: int, length: int
) -> None:
    """The lines of vLLM's announcement of Llama 4, on 8 H100 and 8 H200."""
    need = memory.need(shape, form.bytes(shape), ALL, length, 8)
    assert need.fits(mib * 2**20)


def test_the_fewest_gpus() -> None:
    weights = UNQUANTISED.bytes(SCOUT)
    sizes = {80: 4, 141: 2, 48: 8, 24: None}
    for gib, gpus in sizes.items():
        need = memory.fewest(SCOUT, weights, ALL, 32768, gib * GIB)
        assert (need and need.gpus) == gpus
        if need:
            assert need.bytes == need.weights + need.cache + memory.RESERVE
            half = memory.need(SCOUT, weights, ALL, 32768, need.gpus // 2)
            assert not half.fits(gib * GIB)


def test_only_one_release_drops_chunks() -> None:
    assert memory.drops_chunks("0.10.0", "v1")
    assert not memory.drops_chunks("0.10.0", "v0")
    assert not memory.drops_chunks("0.9.2", "v1")
    assert not memory.drops_chunks("0.10.1", "v1")
