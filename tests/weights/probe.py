"""Construct Llama 4's layers for a checkpoint on a GPU, and run a step through them."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from matrix.outcome import place_of, text_of
from regress import fake_cuda, tiny_llama4
from regress.releases import V1_ALONE, installed_release

from . import launches
from .checkpoints import CONFIGS, EXPERTS, WIDTH, Weights

NO_ORDER = "the experts' method ignores the order of inputs (g_idx), and computes with another one"

TOKENS = (16, 2048)
"""Of a step: some layers take other kernels for few than for many."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of a checkpoint."""

    experts: str = ""
    """The method of the experts, with its module."""
    linear: str = ""
    """That of the shared expert."""
    launches: tuple[str, ...] = ()
    """The kernels of a step: operators of vLLM's or torch's, or Triton's."""
    stage: str = ""
    """Of a failure: config, layers, weights or step. `wrong` if it runs and answers wrongly, and
    `unknown` if it launches what has no stand-in here."""
    message: str = ""
    """What the release says, or what is wrong."""


@dataclass(frozen=True)
class Place:
    """Where it is served."""

    dtype: str
    kv_cache_dtype: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """A backend that no GPU, dtype or cache is refused with before its impl is made."""

    module: str
    cls: str
    env: dict[str, str]


V0_XFORMERS = Attention(
    "vllm.attention.backends.xformers",
    "XFormersImpl",
    {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "XFORMERS"},
)
V1_TRITON = Attention(
    "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl",
    {"VLLM_ATTENTION_BACKEND": "TRITON_ATTN"},
)


def attention() -> Attention:
    """Return the backend to ask for: V0's XFormers, while there is V0."""
    return V1_TRITON if installed_release() in V1_ALONE else V0_XFORMERS


@contextmanager
def environment(place: Place) -> Iterator[None]:
    """Set the GPU, and the backend."""
    tiny_llama4.forget_engines()
    fake_cuda.Device.capability = place.capability
    os.environ.update(attention().env)
    try:
        yield
    finally:
        tiny_llama4.forget_engines()


def set_up() -> None:
    """Leave out what 0.8.3 does not construct here: the tokenizer, and the attention itself, which
    the matrix is about."""
    backend = attention()
    impl = getattr(importlib.import_module(backend.module), backend.cls)
    impl.__init__ = lambda *_, **__: None
    leave_out_tokenizer()


def leave_out_tokenizer() -> None:
    """Construct 0.8.3's model without one, which the checkpoints here do not have."""
    model = importlib.import_module("vllm.model_executor.models.mllama4")
    if hasattr(model, "cached_tokenizer_from_config"):
        setattr(model, "cached_tokenizer_from_config", lambda *_: None)  # noqa: B010


def write_checkpoints(folder: Path) -> None:
    """Write the config of every checkpoint below `folder` and have vLLM know Llama 4's class."""
    for checkpoint, quantization in CONFIGS.items():
        for experts in EXPERTS:
            text = {
                **tiny_llama4.TEXT_CONFIG,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "intermediate_size_mlp": WIDTH,
                "num_local_experts": experts,
                "num_hidden_layers": 1,
                "no_rope_layers": [1],
                "moe_layers": [0],
            }
            config = {**tiny_llama4.CONFIG, "text_config": text}
            if quantization:
                config["quantization_config"] = quantization
            place = folder / f"{checkpoint}-{experts}"
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config), "utf-8")
    module = "vllm.model_executor.models.mllama4"
    importlib.import_module(module)
    tiny_llama4.register_in_process("Llama4ForConditionalGeneration", module)


def name_of(method: object) -> str:
    """Return the class of a method and its module, without what all of them share."""
    cls = type(method)
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"


def said_by(error: BaseException) -> str:
    """Return an error's message: of pydantic's the first, of compressed-tensors' all pieces."""
    if hasattr(error, "errors"):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    pieces = [part for part in error.args if isinstance(part, str)]
    return text_of(ValueError("".join(pieces)) if len(pieces) > 1 else error)


def of_error(error: BaseException, stage: str, found: Outcome) -> Outcome:
    """Return a failure, with what was chosen up to then."""
    said = said_by(error) or place_of(error)
    if not isinstance(error, (ValueError, NotImplementedError, RuntimeError, ImportError)):
        said = f"{type(error).__name__}: {said}"
    if isinstance(error, launches.UnknownKernelError):
        # Not a failure of vLLM's.
        stage, said = "unknown", f"launches {error}"
    return replace(found, stage=stage, message=said)


def engine_config(folder: Path, weights: Weights, place: Place) -> Any:
    """Return the config that an engine started so gets."""
    arguments: dict[str, Any] = {
        "dtype": place.dtype,
        "kv_cache_dtype": place.kv_cache_dtype,
        "max_model_len": tiny_llama4.MAX_LEN,
    }
    if weights.quantization:
        arguments["quantization"] = weights.quantization
    return tiny_llama4.engine_config(folder / weights.folder, arguments)


def probe(folder: Path, weights: Weights, place: Place) -> Outcome:
    """Construct all of the model, and run a step through what is quantised."""
    with environment(place):
        stage, found = "config", Outcome()
        try:
            config = engine_config(folder, weights, place)
            stage = "layers"
            with tiny_llama4.loading(config):
                model = construct(config)
                layer = model.language_model.model.layers[0]
                found = Outcome(
                    name_of(layer.feed_forward.experts.quant_method),
                    name_of(layer.feed_forward.shared_expert.down_proj.quant_method),
                )
                with launches.noting() as launched, forward_context(config):
                    stage = "weights"
                    load(config, model, layer)
                    stage = "step"
                    for tokens in TOKENS:
                        run(layer, torch.zeros(tokens, WIDTH, dtype=config.model_config.dtype))
            found = replace(found, launches=tuple(launched))
            if weights.is_ordered and not heeds_order(layer.feed_forward.experts.quant_method):
                return replace(found, stage="wrong", message=NO_ORDER)
            return found
        except Exception as error:
            return of_error(error, stage, found)


def default_dtype(folder: Path, weights: Weights, place: Place) -> str | Outcome:
    """Return what `--dtype auto` comes to, or how it is refused."""
    with environment(place):
        try:
            dtype = engine_config(folder, weights, place).model_config.dtype
        except Exception as error:
            return of_error(error, "config", Outcome())
    return str(dtype).removeprefix("torch.")


def heeds_order(method: object) -> bool:
    """Return whether a method computes with an order of inputs; MoeWNA16Method drops it."""
    return "g_idx" in inspect.getsource(type(method).apply)  # type: ignore[attr-defined]


def construct(config: Any) -> Any:
    """Construct the model as vLLM's loader does."""
    config.compilation_config.static_forward_context.clear()
    for module in ("utils", "loader"):
        found = importlib.import_module(f"vllm.model_executor.model_loader.{module}")
        if hasattr(found, "initialize_model"):
            return found.initialize_model(vllm_config=config)
        if hasattr(found, "_initialize_model"):
            return found._initialize_model(vllm_config=config)
    raise LookupError("this release has no initialize_model")


def load(config: Any, model: Any, layer: Any) -> None:
    """Give a layer weights and have them processed, as a loader does."""
    if config.load_config.load_format == "bitsandbytes":
        check_bitsandbytes(config, model)
    for parameter in layer.parameters():
        parameter.data.zero_() if parameter.dtype.itemsize > 4 else parameter.data.fill_(1)
    base = importlib.import_module("vllm.model_executor.layers.quantization.base_config")
    for module in layer.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, base.QuantizeMethodBase):
            method.process_weights_after_loading(module)


def check_bitsandbytes(config: Any, model: Any) -> None:
    """Ask the loader that quantises to four bits whether it takes the model."""
    for module in ("bitsandbytes_loader", "loader"):
        try:
            found = importlib.import_module(f"vllm.model_executor.model_loader.{module}")
        except ImportError:
            continue
        loader = found.BitsAndBytesModelLoader(config.load_config)
        for check in ("_verify_model_compatibility", "_initialize_loader_state"):
            if hasattr(loader, check):
                getattr(loader, check)(model, config.model_config)
        if not hasattr(loader, "_verify_model_compatibility") and not hasattr(
            model, "packed_modules_mapping"
        ):
            raise AttributeError(f"Model {type(model).__name__} does not support BitsAndBytes")
        return
    raise LookupError("this release has no BitsAndBytesModelLoader")


@contextmanager
def forward_context(config: Any) -> Iterator[None]:
    """Set what vLLM has set while a step runs."""
    module = importlib.import_module("vllm.forward_context")
    with module.set_forward_context(None, config):
        yield


def run(layer: Any, hidden: torch.Tensor) -> None:
    """Run what of a step may be quantised: attention's projections, the experts, the shared one."""
    layer.self_attn.qkv_proj(hidden)
    layer.self_attn.o_proj(hidden.new_zeros(len(hidden), tiny_llama4.HEADS * tiny_llama4.HEAD_SIZE))
    layer.feed_forward(hidden)


def probe_cache(folder: Path, weights: Weights, place: Place) -> Outcome:
    """Construct the attention alone: the KV cache's format is nothing to the rest."""
    with environment(place):
        stage = "config"
        try:
            config = engine_config(folder, weights, place)
            stage = "layers"
            config.compilation_config.static_forward_context.clear()
            with tiny_llama4.loading(config):
                module = importlib.import_module("vllm.model_executor.models.llama4")
                module.Llama4Attention(
                    config=config.model_config.hf_config.text_config,
                    hidden_size=WIDTH,
                    num_heads=tiny_llama4.HEADS,
                    num_kv_heads=tiny_llama4.KV_HEADS,
                    max_position_embeddings=tiny_llama4.MAX_LEN,
                    quant_config=config.quant_config,
                    cache_config=config.cache_config,
                    prefix="model.layers.0.self_attn",
                )
        except Exception as error:
            return of_error(error, stage, Outcome())
    return Outcome()
