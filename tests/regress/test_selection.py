"""Which engine and backend Llama 4 gets, and what is said where none is right.

The engine's own code decides for a made-up GPU. No FlashAttention 3 can be had without a driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from . import fake_cuda, tiny_llama4
from .releases import in_order, installed_release, span

RELEASE = installed_release()
WITH_V0 = span("0.8.3", "0.10.2")
"""Releases with Llama 4 in which there is something to select."""

RAY_ACTORS = span("0.9.1", "0.10.2")
NAMES = ("VLLM_USE_V1", "VLLM_ATTENTION_BACKEND")
V0_XFORMERS = ("0", "XFORMERS")
V1_TRITON = ("1", "TRITON_ATTN_VLLM_V1")
TRITON_E5M2 = span("0.8.3", "0.8.5.post1")
TRITON_E4M3 = TRITON_E5M2 | span("0.9.1", "0.10.2")
"""Releases whose V1 Triton reads a KV cache of this format, if it gets one."""


@dataclass(frozen=True)
class Case:
    """Settings, and what is to come of them: engine and backend, or a message."""

    name: str
    capability: tuple[int, int]
    kv_cache_dtype: str = "auto"
    dtype: str = "bfloat16"
    env: dict[str, str] = field(default_factory=dict)
    v1_triton: frozenset[str] = frozenset()
    """Releases that choose V1 Triton, where others choose V0 XFormers."""
    message: str | None = None


CASES = [
    Case("ada-fp8", (8, 9), "fp8", v1_triton=TRITON_E4M3),
    Case("ampere-fp8", (8, 6), "fp8"),
    Case("ampere-fp8_e5m2", (8, 6), "fp8_e5m2", v1_triton=TRITON_E5M2),
    Case("turing-fp8", (7, 5), "fp8", "half"),
    Case(
        "ampere-fp8-v1",
        (8, 6),
        "fp8",
        env={"VLLM_USE_V1": "1"},
        message=r"VLLM_USE_V1=1 on compute capability 8\.6.*unset VLLM_USE_V1 \(V0 XFORMERS\)",
    ),
    Case(
        "ampere-fp8-flash_attn",
        (8, 6),
        "fp8",
        env={"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"},
        message=r"needs compute capability 9\.0.*unset VLLM_ATTENTION_BACKEND \(V0 XFORMERS\)",
    ),
    Case(
        "ampere-v0-triton",
        (8, 0),
        env={"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "TRITON_ATTN_VLLM_V1"},
        message=r"V0 TRITON_ATTN_VLLM_V1: the V0 engine.*unset VLLM_ATTENTION_BACKEND",
    ),
    Case(
        "turing-bfloat16",
        (7, 5),
        env={"VLLM_USE_V1": "0"},
        message=r"bfloat16 needs compute capability 8\.0.*--dtype float16 \(V0 XFORMERS\)",
    ),
]


@pytest.mark.fail_to_pass(
    releases=in_order(WITH_V0), raises=r"KeyError|AssertionError|DID NOT RAISE|NotImplementedError"
)
@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no choice")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llama4(
    case: Case, start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers are told the same, or nobody starts."""
    monkeypatch.setattr(fake_cuda.Device, "capability", case.capability)
    args = {"kv_cache_dtype": case.kv_cache_dtype, "dtype": case.dtype}
    if case.message is not None:
        with pytest.raises(ValueError, match=case.message):
            start_engine(case.env, **args)
        return
    config = start_engine(case.env, **args)
    assert chosen() == (V1_TRITON if RELEASE in case.v1_triton else V0_XFORMERS)
    backend = tiny_llama4.attention_layer(config, tiny_llama4.ROPE_LAYER).attn.impl
    assert type(backend).__name__ == (
        "TritonAttentionImpl" if RELEASE in case.v1_triton else "XFormersImpl"
    )


def chosen() -> tuple[str | None, ...]:
    """Return what a process knows of the choice."""
    return tuple(map(os.environ.get, NAMES))


def copied_by_ray() -> set[str]:
    """Return the variables that Ray's executor copies to its workers, where they are set."""
    if importlib.util.find_spec("vllm.ray") is None:
        return set(importlib.import_module("vllm.envs").environment_variables)
    copied: set[str] = importlib.import_module("vllm.ray.ray_env").get_env_vars_to_copy()
    return copied


@pytest.mark.fail_to_pass(releases=in_order(WITH_V0), raises=r"AssertionError")
@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no choice")
def test_workers(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are told what was chosen, by multiprocessing or by Ray."""
    monkeypatch.setattr(fake_cuda.Device, "capability", (8, 6))
    start_engine({}, kv_cache_dtype="fp8", dtype="half")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(chosen) == V0_XFORMERS
    assert set(NAMES) <= copied_by_ray()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9)], ids=str)
def test_other_models(
    capability: tuple[int, int],
    kv_cache_dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model without chunks is given what its release gives it, and no backend is set."""
    tiny_llama4.register_in_process("LlamaForCausalLM", "vllm.model_executor.models.llama")
    model = tiny_llama4.write_config(tmp_path, tiny_llama4.LLAMA3_CONFIG)
    monkeypatch.setattr(fake_cuda.Device, "capability", capability)
    args = {"kv_cache_dtype": kv_cache_dtype, "dtype": "half"}
    config = tiny_llama4.engine_config(model, args)
    assert "VLLM_ATTENTION_BACKEND" not in os.environ
    assert config.cache_config.block_size == 16
    v1 = (capability >= (8, 0) or RELEASE in span("0.10.2")) and kv_cache_dtype == "auto"
    if RELEASE in span("0.8.2", "0.10.2"):
        assert os.environ["VLLM_USE_V1"] == str(int(v1))


def ray_manager() -> Any:
    """Return what starts engines as Ray's actors, for data parallelism."""
    for name in ("vllm.v1.engine.utils", "vllm.v1.utils"):
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            if hasattr(module, "CoreEngineActorManager"):
                return module.CoreEngineActorManager
    return None


@pytest.mark.fail_to_pass(releases=in_order(span("0.9.1", "0.9.2")), raises=r"KeyError")
@pytest.mark.skipif(RELEASE not in RAY_ACTORS, reason=f"{RELEASE} starts no engines with Ray")
def test_ray_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor has its node's environment, so engines in actors have to be told as well."""
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XFORMERS")
    ray, remote = importlib.import_module("ray"), MagicMock()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", lambda _: None)
    monkeypatch.setattr(ray, "remote", remote)
    sizes = {"data_parallel_size": 1, "data_parallel_size_local": 1, "world_size": 1}
    ray_manager()(
        SimpleNamespace(parallel_config=SimpleNamespace(**sizes)),
        addresses=MagicMock(),
        executor_class=MagicMock(),
        log_stats=False,
        placement_groups=[MagicMock()],
        local_dp_ranks=[0],
    )
    (call,) = remote.return_value.options.call_args_list
    assert call.kwargs["runtime_env"]["env_vars"]["VLLM_ATTENTION_BACKEND"] == "XFORMERS"
