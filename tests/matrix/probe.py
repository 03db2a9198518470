"""Run a release's own selection for a cell, as far as the attention layers of the model."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from regress import fake_cuda, tiny_llama4
from regress.expected import RUNNER_MAKES_CHUNKS
from regress.releases import V1_ALONE, installed_release

from .cells import Cell
from .outcome import SELECTED, Outcome, of_error, without_backend

MAX_LEN = {"past": tiny_llama4.MAX_LEN, "at": tiny_llama4.CHUNK}
MODELS = ("llama4", "control")
LAYERS = tuple(tiny_llama4.LAYERS)

CONTROL_CONFIG = {**tiny_llama4.LLAMA3_CONFIG, "head_dim": tiny_llama4.HEAD_SIZE}
"""A model that knows nothing of chunks."""


@dataclass(frozen=True)
class Key:
    """Cells with the same key compute the same."""

    engine: str
    impls: tuple[str, ...]
    """Of the chunked and of the global layer."""
    kv_cache_dtype: str
    length: str
    block_size: int
    flash_attn: int | None
    """Version of FlashAttention for the GPU, where it matters: V1 Triton has borrowed its metadata
    builder."""
    in_parts: bool = False
    """Whether V0 computes prompts in parts."""
    verifies: bool = False
    """Whether several tokens of a sequence are decoded at once, as some model proposed them."""
    one_group: bool = False
    """Whether chunked and global layers have one KV cache, where it is the model runner of V1 that
    makes chunks."""

    @property
    def backend(self) -> str:
        """Return module and class of the chunked layer's impl."""
        return self.impls[0]


@dataclass(frozen=True)
class Found:
    """What selection came to: an outcome, or what is to be computed for it."""

    outcome: Outcome
    key: Key | None = None
    dtype: str = ""
    """What the cell's came to, if it got so far."""


def backend_names() -> list[str]:
    """Return every backend name that the release knows, in its order."""
    interface = importlib.import_module("vllm.platforms.interface")
    return list(interface._Backend.__members__)


def speed_up() -> None:
    """Leave out what costs most of an engine's config and decides nothing.

    Transformers formats each config for a log line that is not written; vLLM looks up the versions
    of packages, and reads the same two configs, again and again. Of an attention layer, what comes
    before and after attention is left out.
    """
    from transformers import PretrainedConfig

    logging.disable()
    get_config = importlib.import_module("vllm.transformers_utils.config").get_config
    read = functools.cache(lambda *given, **options: pickle.dumps(get_config(*given, **options)))

    def read_once(*arguments: Any, **options: Any) -> Any:
        hashable = {name: value for name, value in options.items() if not isinstance(value, dict)}
        assert not any(value for name, value in options.items() if name not in hashable), options
        return pickle.loads(read(*arguments, **hashable))

    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        if getattr(module, "get_config", None) is get_config:
            setattr(module, "get_config", read_once)  # noqa: B010

    setattr(PretrainedConfig, "__repr__", object.__repr__)  # noqa: B010
    llama4 = importlib.import_module("vllm.model_executor.models.llama4")
    for name in ("QKVParallelLinear", "RowParallelLinear", "get_rope"):
        assert hasattr(llama4, name)
        setattr(llama4, name, lambda *_, **__: torch.nn.Identity())
    version = functools.cache(metadata.version)
    setattr(metadata, "version", version)  # noqa: B010


def write_models(folder: Path) -> None:
    """Write both models below `folder` and make vLLM know their classes."""
    configs: dict[str, Mapping[str, Any]] = {"llama4": tiny_llama4.CONFIG}
    configs["control"] = CONTROL_CONFIG
    for name, config in configs.items():
        (folder / name).mkdir()
        tiny_llama4.write_config(folder / name, config)
    models = "vllm.model_executor.models."
    tiny_llama4.register_in_process("Llama4ForConditionalGeneration", models + "mllama4")
    tiny_llama4.register_in_process("LlamaForCausalLM", models + "llama")


@contextmanager
def environment(cell: Cell) -> Iterator[None]:
    """Set the cell's variables and GPU; forget what was chosen before."""
    tiny_llama4.forget_engines()
    fake_cuda.Device.capability = cell.capability
    os.environ.update(cell.env)
    try:
        yield
    finally:
        tiny_llama4.forget_engines()


def engine_config(folder: Path, model: str, cell: Cell) -> Any:
    """Return the config that an engine started so gets."""
    arguments: dict[str, Any] = {
        "dtype": cell.dtype,
        "kv_cache_dtype": cell.kv_cache_dtype,
        "max_model_len": MAX_LEN[cell.row.length],
    }
    if cell.setting:
        arguments |= cell.setting.arguments(folder)
    return tiny_llama4.engine_config(folder / model, arguments)


def check_dtype(engine: str, dtype: torch.dtype) -> None:
    """Have the worker ask, as it does first of all, whether the GPU has the dtype."""
    name = "vllm.v1.worker.gpu_worker" if engine == "v1" else "vllm.worker.worker"
    module = importlib.import_module(name)
    if hasattr(module, "_check_if_gpu_supports_dtype"):
        module._check_if_gpu_supports_dtype(dtype)
    else:
        module.current_platform.check_if_supports_dtype(dtype)


LAST_ENGINE = "vllm.v1.engine.llm_engine"


def demand_an_engine(config: Any, engine: str) -> None:
    """Have the engine that is left refuse, as it does first of all, what was meant for V0."""
    if engine == "v0" and installed_release() in V1_ALONE:
        importlib.import_module(LAST_ENGINE).LLMEngine(config, None, log_stats=False)
        raise LookupError(f"{LAST_ENGINE} has started for V0")


def control_layer(config: Any) -> Any:
    """Construct an attention layer as `llama.py` does."""
    attention = importlib.import_module("vllm.attention").Attention
    with tiny_llama4.loading(config):
        return attention(
            tiny_llama4.HEADS,
            tiny_llama4.HEAD_SIZE,
            tiny_llama4.HEAD_SIZE**-0.5,
            num_kv_heads=tiny_llama4.KV_HEADS,
            cache_config=config.cache_config,
            prefix="model.layers.0.self_attn.attn",
        )


def layers_of(config: Any, model: str) -> list[Any]:
    """Construct the attention layers of a model: Llama 4's chunked and its global one."""
    config.compilation_config.static_forward_context.clear()
    if model == "control":
        return [control_layer(config)]
    return [tiny_llama4.attention_layer(config, number).attn for number in LAYERS]


def flash_attn_version() -> int | None:
    """Return the version of FlashAttention that the release has for the GPU."""
    for package in ("vllm.vllm_flash_attn", "vllm.attention.utils"):
        if importlib.util.find_spec(f"{package}.fa_utils") is not None:
            utils = importlib.import_module(f"{package}.fa_utils")
            found: int | None = utils.get_flash_attn_version()
            return found
    raise LookupError("this release has no get_flash_attn_version")


def name_of(impl: object) -> str:
    """Return the module and class of an impl, without what all of them share."""
    cls = type(impl)
    module = cls.__module__.removeprefix("vllm.").replace("attention.backends.", "")
    return f"{module}.{cls.__qualname__}"


class OtherImplError(Exception):
    """It is not what was selected that is about to be computed."""


def demand(key: Key, impls: Iterable[object]) -> None:
    """Check that what is to be computed is what was selected."""
    names = {name_of(impl) for impl in impls}
    if not names <= set(key.impls):
        raise OtherImplError(f"{names} constructed, {key.impls} selected")


def probe(folder: Path, model: str, cell: Cell) -> Found:
    """Select engine and backend for a cell, and construct the layers."""
    with environment(cell):
        try:
            config = engine_config(folder, model, cell)
        except Exception as error:
            return Found(without_backend(of_error(error, "config"), cell.row.backend))
        return _construct(config, model, cell)


def told_of(config: Any, engine: str) -> dict[str, Any]:
    """Return what else attention is computed by, for a key."""
    scheduler = config.scheduler_config
    makes_chunks = engine == "v1" and installed_release() in RUNNER_MAKES_CHUNKS
    return {
        "in_parts": engine == "v0" and scheduler.chunked_prefill_enabled,
        "verifies": config.speculative_config is not None,
        "one_group": makes_chunks and scheduler.disable_hybrid_kv_cache_manager,
    }


def _construct(config: Any, model: str, cell: Cell) -> Found:
    engine = "v1" if importlib.import_module("vllm.envs").VLLM_USE_V1 else "v0"
    stage = "config"
    try:
        demand_an_engine(config, engine)
        stage = "worker"
        check_dtype(engine, config.model_config.dtype)
        stage = "layers"
        layers = layers_of(config, model)
    except Exception as error:
        return Found(of_error(error, stage, engine))
    impls = tuple(name_of(layer.impl) for layer in layers)
    block_size = config.cache_config.block_size
    if model == "control":
        return Found(Outcome(SELECTED, engine, impls[0], basis=f"blocks of {block_size}"))
    borrows = any(name in impls[0] for name in ("flash_attn", "triton_attn"))
    version = flash_attn_version() if borrows else None
    key = Key(
        engine,
        impls,
        cell.kv_cache_dtype,
        cell.row.length,
        block_size,
        version,
        **told_of(config, engine),
    )
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    return Found(Outcome("", engine, impls[0]), key, dtype)
