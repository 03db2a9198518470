"""Which of two engines and which backend Llama 4 gets, and what is said where none is right.

The engine's own code decides for a made-up GPU. No FlashAttention 3 can be had without a driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from . import fake_cuda, tiny_llama4
from .releases import LLAMA4, WITH_V0, in_order, installed_release, span

RELEASE = installed_release()
V0_XFORMERS = (False, "XFormersImpl")
V1_TRITON = (True, "TritonAttentionImpl")
V1_FLEX = (True, "FlexAttentionImpl")
WITH_FLEX = span("0.9.1", "0.10.2")
TRITON_E5M2 = span("0.8.3", "0.8.5.post1")
TRITON_E4M3 = TRITON_E5M2 | span("0.9.1", "0.10.2")
"""Releases whose V1 Triton reads a KV cache of this format, if it gets one."""


V0_FLASH_ATTN = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
KV_CACHE_QUANTIZED: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _INT4, "input_activations": None}
        },
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
"""Checkpoints whose attention layers have a method to quantise the KV cache."""


@dataclass(frozen=True)
class Case:
    """Settings, and what is to come of them: engine and backend, or a message."""

    name: str
    capability: tuple[int, int]
    kv_cache_dtype: str = "auto"
    dtype: str = "bfloat16"
    env: dict[str, str] = field(default_factory=dict)
    v1: tuple[bool, str] = V1_TRITON
    where: frozenset[str] = frozenset()
    """Releases that choose this, where others choose V0 XFormers."""
    message: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    """The checkpoint's `quantization_config`."""

    @property
    def fails_on_stock(self) -> frozenset[str]:
        """Return the releases that say or choose something else; 0.8.3 starts nothing on V0."""
        if self.message is not None or "block_size" in self.args:
            return WITH_V0
        return span("0.8.3", "0.8.3") | self.where


CASES = [
    Case("ada-fp8", (8, 9), "fp8", where=TRITON_E4M3),
    Case("ampere-fp8", (8, 6), "fp8"),
    Case("ampere-fp8_e5m2", (8, 6), "fp8_e5m2", where=TRITON_E5M2),
    Case("turing-fp8", (7, 5), "fp8", "half"),
    Case(
        "ampere-fp8-v1",
        (8, 6),
        "fp8",
        env={"VLLM_USE_V1": "1"},
        message=r"VLLM_USE_V1=1 on compute capability 8\.6.*unset VLLM_USE_V1 \(V0 XFORMERS\)",
    ),
    # V0 has always taken XFormers for what FlashAttention does not serve.
    Case("ampere-fp8-flash_attn", (8, 6), "fp8", env={"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}),
    Case("turing-v0-flash_attn", (7, 5), dtype="half", env=V0_FLASH_ATTN),
    Case("ampere-fp8-v0-flash_attn", (8, 6), "fp8", env=V0_FLASH_ATTN),
    Case("ampere-float32-v0-flash_attn", (8, 0), dtype="float32", env=V0_FLASH_ATTN),
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
    # Its kernels take blocks of 8, 16 and 32 tokens.
    *(
        Case(
            f"turing-blocks-of-{block_size}",
            (7, 5),
            dtype="half",
            env={"VLLM_USE_V1": "0"},
            args={"block_size": block_size},
            message=rf"block size of {block_size}.*no --block-size \(V0 XFORMERS\)",
        )
        for block_size in (64, 128)
    ),
    # V1 takes 16 at least, Triton as well.
    Case("ampere-blocks-of-8", (8, 0), args={"block_size": 8}, v1=V1_FLEX, where=WITH_FLEX),
    # vllm/attention/layer.py refuses fp8_e5m2 for these.
    *(
        Case(
            f"ampere-{name}",
            (8, 0),
            "fp8_e5m2",
            message=rf"quantized with {name}.*--kv-cache-dtype auto \(V1",
            quantization=config,
        )
        for name, config in KV_CACHE_QUANTIZED.items()
    ),
]


def cases() -> list[Any]:
    """Return the cases, with what stock makes of them."""
    raises = r"TypeError|AssertionError|DID NOT RAISE|NotImplementedError"
    return [
        pytest.param(
            case,
            marks=pytest.mark.fail_to_pass(releases=in_order(case.fails_on_stock), raises=raises),
            id=case.name,
        )
        for case in CASES
    ]


@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no V0")
@pytest.mark.parametrize("case", cases())
def test_llama4(
    case: Case,
    start_engine: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One choice for all that asks, or nobody starts."""
    monkeypatch.setattr(fake_cuda.Device, "capability", case.capability)
    args = {"kv_cache_dtype": case.kv_cache_dtype, "dtype": case.dtype, **case.args}
    if case.quantization is not None:
        config = {**tiny_llama4.CONFIG, "quantization_config": case.quantization}
        args["model"] = tiny_llama4.write_config(tmp_path, config)
    if case.message is not None:
        with pytest.raises(ValueError, match=case.message):
            start_engine(case.env, **args)
        return
    config = start_engine(case.env, **args)
    assert choice(config) == (case.v1 if RELEASE in case.where else V0_XFORMERS)
    assert os.environ.get("VLLM_ATTENTION_BACKEND") == case.env.get("VLLM_ATTENTION_BACKEND")


def choice(config: Any) -> tuple[bool, str]:
    """Return whether the engine is V1, and the impl of a chunked layer."""
    layer = tiny_llama4.attention_layer(config, tiny_llama4.ROPE_LAYER)
    return importlib.import_module("vllm.envs").VLLM_USE_V1, type(layer.attn.impl).__name__


def told(pickled: bytes) -> tuple[bool, str | None]:
    """Return what a worker in another process knows of the choice."""
    config = pickle.loads(pickled)
    importlib.import_module("vllm.worker.worker_base").WorkerBase(config)
    selector = importlib.import_module("vllm.attention.selector")
    use_v1 = importlib.import_module("vllm.envs").VLLM_USE_V1
    return use_v1, getattr(selector, "engine_attn_backend", None)


def copied_by_ray() -> set[str]:
    """Return the variables that Ray's executor copies to its workers, where they are set."""
    if importlib.util.find_spec("vllm.ray") is None:
        return set(importlib.import_module("vllm.envs").environment_variables)
    copied: set[str] = importlib.import_module("vllm.ray.ray_env").get_env_vars_to_copy()
    return copied


@pytest.mark.fail_to_pass(releases=in_order(WITH_V0), raises=r"AssertionError")
@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no V0")
def test_workers(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are told the engine by the environment, and the backend by the config.

    Every executor hands both on: multiprocessing, Ray, and Ray's actors of data parallelism.
    """
    monkeypatch.setattr(fake_cuda.Device, "capability", (8, 6))
    config = start_engine({}, kv_cache_dtype="fp8", dtype="half")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(told, (pickle.dumps(config),)) == (False, "XFORMERS")
    assert "VLLM_USE_V1" in copied_by_ray()


GEMMA2_CONFIG = {
    **tiny_llama4.LLAMA3_CONFIG,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "sliding_window": 512,
    "max_position_embeddings": 8192,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
"""Its layers alternate between sliding windows and global attention, which XFormers cannot do."""

ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama4-v0": (tiny_llama4.CONFIG, {"kv_cache_dtype": "fp8"}),
    "llama4-v1": (tiny_llama4.CONFIG, {}),
    "llama3": (tiny_llama4.LLAMA3_CONFIG, {}),
    "gemma2": (GEMMA2_CONFIG, {}),
}
"""A model's config, and what its engine is started with."""

REGISTERED = {
    "Llama4ForConditionalGeneration": "mllama4",
    "LlamaForCausalLM": "llama",
    "Gemma2ForCausalLM": "gemma2",
}


def start(name: str, folder: Path) -> tuple[Any, ...]:
    """Start one of `ENGINES` on a GPU of capability 8.0, and return what it has come to."""
    config, args = ENGINES[name]
    folder.mkdir(exist_ok=True)
    model = tiny_llama4.write_config(folder, config)
    architecture = config["architectures"][0]
    tiny_llama4.register_in_process(
        architecture, f"vllm.model_executor.models.{REGISTERED[architecture]}"
    )
    started = tiny_llama4.engine_config(model, args)
    selector = importlib.import_module("vllm.attention.selector")
    backend = selector.get_attn_backend(
        128,
        started.model_config.dtype,
        started.cache_config.cache_dtype,
        started.cache_config.block_size,
        False,
    )
    return (
        importlib.import_module("vllm.envs").VLLM_USE_V1,
        f"{backend.__module__}.{backend.__name__}",
        started.model_config.max_model_len,
        started.cache_config.block_size,
        started.scheduler_config.chunked_prefill_enabled,
    )


def start_in_child(name: str, folder: Path) -> tuple[Any, ...]:
    """The same in a process that has inherited the environment, and nothing else."""
    fake_cuda.install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: fake_cuda.Device.capability)
        return start(name, folder)


ORDERS = [
    (first, second)
    for first in ENGINES
    for second in ENGINES
    if "llama4" in first + second and first != second
]
LEAKS_ON_STOCK = [("llama4-v0", second) for second in ENGINES] + [
    (first, "llama4-v0") for first in ENGINES
]
"""Stock sets VLLM_USE_V1, and takes that for the user's in the next engine."""


def orders() -> list[Any]:
    """Return the orders of two engines, with what stock makes of them."""
    leaks = pytest.mark.fail_to_pass(
        releases=in_order(WITH_V0), raises=r"AssertionError|NotImplementedError"
    )
    return [
        pytest.param(*order, marks=leaks if order in LEAKS_ON_STOCK else (), id="-".join(order))
        for order in ORDERS
    ]


@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no V0")
@pytest.mark.parametrize(("first", "second"), orders())
def test_two_engines(first: str, second: str, tmp_path: Path) -> None:
    """An engine sees nothing of the one before."""
    alone = start(second, tmp_path / second)
    tiny_llama4.forget_engines()
    start(first, tmp_path / first)
    assert start(second, tmp_path / second) == alone


@pytest.mark.fail_to_pass(releases=in_order(WITH_V0), raises=r"AssertionError|NotImplementedError")
@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no V0")
@pytest.mark.parametrize(
    ("first", "second"), [("llama4-v0", "llama3"), ("llama3", "llama4-v0")], ids="-".join
)
def test_engine_in_child(first: str, second: str, tmp_path: Path) -> None:
    """Nor does an engine in a process that has inherited the environment."""
    alone = start(second, tmp_path / second)
    tiny_llama4.forget_engines()
    start(first, tmp_path / first)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(start_in_child, (second, tmp_path / second)) == alone


@pytest.mark.skipif(RELEASE not in WITH_V0, reason=f"{RELEASE} has no Llama 4 or no V0")
def test_user_sets_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user sets later is the user's, also if it is what was chosen before."""
    start("llama4-v0", tmp_path / "llama4")
    monkeypatch.setenv("VLLM_USE_V1", "0")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XFORMERS")
    use_v1, backend, *_ = start("llama3", tmp_path / "llama3")
    assert (use_v1, backend) == (False, "vllm.attention.backends.xformers.XFormersBackend")


def scales_kv_cache(name: str) -> bool:
    """Return whether attention layers get a method that refuses a KV cache of fp8_e5m2."""
    layers = importlib.import_module("vllm.model_executor.layers.quantization")
    kv_cache = importlib.import_module("vllm.model_executor.layers.quantization.kv_cache")
    attention = importlib.import_module("vllm.attention.layer").Attention
    config_cls = layers.get_quantization_config(name)
    # Of a layer, its class alone is looked at; of a config, that it leaves no layer out.
    layer = attention.__new__(attention)
    torch.nn.Module.__init__(layer)
    config = MagicMock(
        quant_config={"exclude": []},
        ignore=[],
        exclude_modules=[],
        packed_modules_mapping={},
        kv_cache_scheme=None,
        kv_cache_config=None,
    )
    try:
        method = config_cls.get_quant_method(config, layer, "model.layers.0.self_attn.attn")
    except NotImplementedError:
        return False
    return isinstance(method, kv_cache.BaseKVCacheMethod)


@pytest.mark.fail_to_pass(releases=in_order(LLAMA4), raises=r"ModuleNotFoundError")
@pytest.mark.skipif(RELEASE not in LLAMA4, reason=f"{RELEASE} has no Llama 4")
def test_quantizations_with_kv_cache_scales() -> None:
    """The list is right for each quantisation that the release has."""
    selection = importlib.import_module("vllm.engine.chunked_local_selection")
    methods = importlib.import_module(
        "vllm.model_executor.layers.quantization"
    ).QUANTIZATION_METHODS
    found = {name for name in methods if scales_kv_cache(name)}
    assert found == set(selection.KV_CACHE_QUANTIZATIONS) & set(methods)


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
