"""A Llama 4 small enough to construct on a CPU, from the engine arguments down to one layer."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

HIDDEN_SIZE = 64
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 128
CHUNK = 8192
MAX_LEN = 2 * CHUNK

ROPE_LAYER, NOPE_LAYER = 0, 3
LAYERS = {ROPE_LAYER: "chunked", NOPE_LAYER: "global"}
"""Of every four layers, three are rotary and chunked; the fourth has no positions, nor chunks."""

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "llama4_text",
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": 128,
    "max_position_embeddings": MAX_LEN,
    "attention_chunk_size": CHUNK,
    "no_rope_layers": [1, 1, 1, 0],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}

VISION_CONFIG: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}

CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG,
    "boi_token_index": 1,
    "eoi_token_index": 2,
    "image_token_index": 3,
}

LLAMA3_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 128,
    "max_position_embeddings": MAX_LEN,
}
"""For 0.8.2, which has no Llama 4, so that its impls are constructed under some model too."""


SELECTION_ENV = ("VLLM_USE_V1", "VLLM_ATTENTION_BACKEND", "_VLLM_USE_V1_DEFAULT")
"""What decides on engine and backend. vLLM itself sets the first; a patched one notes in the last
that the user did not."""


def forget_engines() -> None:
    """Make this process one in which nothing is set and no engine was started."""
    for name in SELECTION_ENV:
        os.environ.pop(name, None)
    selector = importlib.import_module("vllm.attention.selector")
    if hasattr(selector, "engine_attn_backend"):
        setattr(selector, "engine_attn_backend", None)  # noqa: B010
    selector._cached_get_attn_backend.cache_clear()


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write `config` as a model folder that vLLM can load offline, and return the folder."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def register_in_process(architecture: str, module: str) -> None:
    """Register a model class with vLLM.

    vLLM inspects its own, lazily registered classes in a subprocess, which would detect the
    platform anew, without the fake GPU, and cost half a minute.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    cls = getattr(importlib.import_module(module), architecture)
    ModelRegistry.register_model(architecture, cls)


def engine_config(model: Path, engine_args: Mapping[str, Any]) -> Any:
    """Return the `VllmConfig` an engine started with these arguments gets."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(model), skip_tokenizer_init=True, **{"enforce_eager": True, **engine_args}
    )
    return args.create_engine_config()


class OneRank:
    """A process group of one, as far as a model asks for it: nothing to talk about."""

    world_size = 1
    rank_in_group = 0
    is_first_rank = is_last_rank = True

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, _dim: int) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor, _dst: int, _dim: int) -> torch.Tensor:
        return tensor


class FirstOfRanks(OneRank):
    """The first process of several that share a layer: what it would send does not matter."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size


@contextmanager
def one_rank(tensor_parallel_size: int = 1) -> Iterator[None]:
    """Stand in for the process groups of tensor, pipeline and data parallelism."""
    from vllm.distributed import parallel_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "_TP", FirstOfRanks(tensor_parallel_size))
        for group in ("_PP", "_DP"):
            patch.setattr(parallel_state, group, OneRank())
        yield


@contextmanager
def loading(config: Any) -> Iterator[None]:
    """Set what vLLM has set while it constructs a model: current config, dtype and rank."""
    from vllm.config import set_current_vllm_config

    before = torch.get_default_dtype()
    ranks = config.parallel_config.tensor_parallel_size
    with set_current_vllm_config(config), one_rank(ranks):
        torch.set_default_dtype(config.model_config.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def attention_layer(config: Any, layer: int) -> Any:
    """Construct the attention of one Llama 4 layer as `llama4.py` does, and return it."""
    from vllm.model_executor.models.llama4 import Llama4Attention

    with loading(config):
        return Llama4Attention(
            config=config.model_config.hf_config.text_config,
            hidden_size=HIDDEN_SIZE,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            max_position_embeddings=MAX_LEN,
            cache_config=config.cache_config,
            prefix=f"model.layers.{layer}.self_attn",
        )


def load(config: Any) -> Any:
    """Load a model's weights with vLLM's loader and return the model, to be run on the CPU."""
    from vllm.model_executor.model_loader import get_model

    config.device_config.device = torch.device("cpu")
    # The forms of its operators that are plain torch. That of fused experts calls a kernel alike.
    config.compilation_config.custom_ops = ["none"]
    with loading(config):
        return get_model(vllm_config=config)
