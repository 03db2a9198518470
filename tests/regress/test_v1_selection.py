"""Which backend Llama 4 gets where V1 is the only engine, and what is said where none is right.

As in `test_selection`, the engine's own code decides for a made-up GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from . import fake_cuda, test_selection, tiny_llama4
from .releases import V1_ALONE, in_order, installed_release
from .test_selection import KV_CACHE_QUANTIZED, choice, told

RELEASE = installed_release()

pytestmark = pytest.mark.skipif(
    RELEASE not in V1_ALONE, reason=f"{RELEASE} has no Llama 4, or another engine as well"
)

STOCK = r"DID NOT RAISE|V0 attention backends have been removed|AssertionError"
stock_fails = pytest.mark.fail_to_pass(releases=in_order(V1_ALONE), raises=STOCK)


@dataclass(frozen=True)
class Case:
    """Settings, and the impl that comes of them."""

    name: str
    capability: tuple[int, int]
    impl: str
    args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    block_size: int = 16
    fails: bool = False
    """On stock."""


CASES = (
    Case("ampere", (8, 0), "FlashAttentionImpl"),
    Case("turing", (7, 5), "FlexAttentionImpl", {"dtype": "half"}),
    Case("ampere-float32", (8, 0), "FlexAttentionImpl", {"dtype": "float32"}),
    Case("ada-fp8", (8, 9), "TritonAttentionImpl", {"kv_cache_dtype": "fp8"}),
    Case("ampere-blocks-of-8", (8, 0), "FlexAttentionImpl", {"block_size": 8}, {}, 8, True),
    # Its kernel of decodes takes blocks of 64 and their multiples.
    Case(
        "ampere-xformers",
        (8, 0),
        "XFormersAttentionImpl",
        {},
        {"VLLM_ATTENTION_BACKEND": "XFORMERS"},
        64,
        True,
    ),
    # What V1 ignores for a model without MLA.
    Case(
        "ampere-triton-mla",
        (8, 0),
        "FlashAttentionImpl",
        {},
        {"VLLM_ATTENTION_BACKEND": "TRITON_MLA"},
    ),
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=stock_fails if case.fails else (), id=case.name) for case in CASES],
)
def test_backend(
    case: Case, start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that is right, with blocks that it takes."""
    monkeypatch.setattr(fake_cuda.Device, "capability", case.capability)
    config = start_engine(case.env, **case.args)
    assert choice(config) == (True, case.impl)
    assert config.cache_config.block_size == case.block_size
    assert os.environ.get("VLLM_ATTENTION_BACKEND") == case.env.get("VLLM_ATTENTION_BACKEND")


@dataclass(frozen=True)
class Refused:
    """Settings that nothing is right with, and what is said of them."""

    name: str
    capability: tuple[int, int]
    message: str
    args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    """The checkpoint's `quantization_config`."""


AUTO = r"--kv-cache-dtype auto \(V1 "
REFUSED = (
    Refused(
        "ampere-fp8",
        (8, 6),
        rf"TRITON_ATTN: .*fp8_e4m3 needs compute capability 8\.9.*{AUTO}FLASH_ATTN\), or install "
        r"FlashInfer \(V1 FLASHINFER\)",
        {"kv_cache_dtype": "fp8"},
    ),
    Refused(
        "ampere-fp8_e5m2",
        (8, 0),
        rf"TRITON_ATTN.*it does not read a KV cache of fp8_e5m2.*{AUTO}FLASH_ATTN",
        {"kv_cache_dtype": "fp8_e5m2"},
    ),
    Refused(
        "ada-fp8_e5m2",
        (8, 9),
        r"--kv-cache-dtype fp8_e4m3 \(V1 TRITON_ATTN\)",
        {"kv_cache_dtype": "fp8_e5m2"},
    ),
    Refused(
        "volta-fp8",
        (7, 0),
        rf"FLEX_ATTENTION.*it does not read a KV cache of fp8_e4m3.*{AUTO}FLEX_ATTENTION",
        {"kv_cache_dtype": "fp8", "dtype": "half"},
    ),
    Refused(
        "turing-bfloat16",
        (7, 5),
        r"bfloat16 needs compute capability 8\.0.*--dtype float16 \(V1 FLEX_ATTENTION\)",
        {"dtype": "bfloat16"},
    ),
    Refused(
        "ampere-v0",
        (8, 0),
        r"this release has no V0 engine.*unset VLLM_USE_V1 \(V1 FLASH_ATTN\)",
        env={"VLLM_USE_V1": "0"},
    ),
    Refused(
        "ampere-rocm",
        (8, 0),
        r"no such backend.*unset VLLM_ATTENTION_BACKEND \(V1 FLASH_ATTN\)",
        env={"VLLM_ATTENTION_BACKEND": "ROCM_FLASH"},
    ),
    # vllm/attention/layer.py refuses fp8_e5m2 for these.
    *(
        Refused(
            f"ampere-{name}",
            (8, 0),
            rf"FLASHINFER: a model quantized with {name}.*{AUTO}",
            {"kv_cache_dtype": "fp8_e5m2"},
            quantization=config,
        )
        for name, config in KV_CACHE_QUANTIZED.items()
    ),
)


@stock_fails
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(
    case: Refused,
    start_engine: Callable[..., Any],
    stubs: Callable[[tuple[str, ...]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused when the engine is configured, with settings that work."""
    monkeypatch.setattr(fake_cuda.Device, "capability", case.capability)
    args = dict(case.args)
    if case.quantization is not None:
        stubs(("flashinfer",))
        config = {**tiny_llama4.CONFIG, "quantization_config": case.quantization}
        args["model"] = tiny_llama4.write_config(tmp_path, config)
    with pytest.raises(ValueError, match=case.message):
        start_engine(case.env, **args)


@stock_fails
def test_workers(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are told the backend by the config, wherever they run."""
    monkeypatch.setattr(fake_cuda.Device, "capability", (8, 9))
    config = start_engine({}, kv_cache_dtype="fp8")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(told, (pickle.dumps(config),)) == (True, "TRITON_ATTN")


@pytest.mark.parametrize("first", ["llama4-fp8", "llama4-v1", "llama3"])
@pytest.mark.parametrize("second", ["llama4-fp8", "llama4-v1", "llama3"])
def test_two_engines(
    first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine sees nothing of the one before."""
    monkeypatch.setattr(fake_cuda.Device, "capability", (8, 9))
    engines = {**test_selection.ENGINES, "llama4-fp8": test_selection.ENGINES["llama4-v0"]}
    monkeypatch.setattr(test_selection, "ENGINES", engines)
    alone = test_selection.start(second, tmp_path / second)
    tiny_llama4.forget_engines()
    test_selection.start(first, tmp_path / first)
    assert test_selection.start(second, tmp_path / second) == alone
