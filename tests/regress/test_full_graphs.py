"""Full CUDA graphs, which keep reading the virtual batches they were captured with.

Chunked layers get new ones in each step, so V1 has to refuse such graphs or make none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from . import tiny_llama4
from .releases import in_order, installed_release, span
from .third_party import import_untuned

RELEASE = installed_release()
FLAG = span("0.9.0", "0.10.0")
"""Releases with `full_cuda_graph`, which became `cudagraph_mode`."""
MODES = span("0.10.1")

of_flag = pytest.mark.skipif(RELEASE not in FLAG, reason=f"{RELEASE} has another setting or none")


def full_graphs() -> dict[str, Any]:
    """Return the engine argument that asks for them."""
    config = importlib.import_module("vllm.config").CompilationConfig
    return {"compilation_config": config(full_cuda_graph=True)}


@of_flag
@pytest.mark.fail_to_pass(releases=in_order(FLAG), raises=r"DID NOT RAISE")
def test_refused(start_engine: Callable[..., Any]) -> None:
    """Refused when the engine is configured, before any worker starts."""
    with pytest.raises(ValueError, match=r"set max_model_len to 8192 or less"):
        start_engine({"VLLM_USE_V1": "1"}, **full_graphs())


@of_flag
@pytest.mark.fail_to_pass(releases=in_order(FLAG), raises=r"assert 8192 is None")
def test_within_a_chunk(start_engine: Callable[..., Any]) -> None:
    """No virtual batches are made: stock's are read anew in 0.10.0 alone."""
    config = start_engine({"VLLM_USE_V1": "1"}, max_model_len=tiny_llama4.CHUNK, **full_graphs())
    assert config.compilation_config.full_cuda_graph
    assert config.model_config.attention_chunk_size is None


@of_flag
@pytest.mark.parametrize("use_v1", [False, True])
def test_not_concerned(use_v1: bool, start_engine: Callable[..., Any]) -> None:
    """V0 does not capture such graphs, and piecewise graphs have no attention in them."""
    config = start_engine({"VLLM_USE_V1": str(int(use_v1))}, **({} if use_v1 else full_graphs()))
    assert config.model_config.attention_chunk_size == tiny_llama4.CHUNK


@of_flag
def test_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V1", "1")
    tiny_llama4.register_in_process("LlamaForCausalLM", "vllm.model_executor.models.llama")
    model = tiny_llama4.write_config(tmp_path, tiny_llama4.LLAMA3_CONFIG)
    assert tiny_llama4.engine_config(model, full_graphs()).compilation_config.full_cuda_graph


@pytest.mark.skipif(RELEASE not in MODES, reason=f"{RELEASE} has no cudagraph_mode")
@pytest.mark.fail_to_pass(
    releases=in_order(span("0.10.1", "0.10.2")), raises=r"assert not .*has_full_cudagraphs"
)
@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_modes(mode: str) -> None:
    """The model runner refuses, and says what works, or takes a mode that works."""
    worker = import_untuned("vllm.v1.worker.gpu_model_runner")
    layers = importlib.import_module("vllm.attention.layers.chunked_local_attention")
    triton = importlib.import_module("vllm.v1.attention.backends.triton_attn")
    config = importlib.import_module("vllm.config").CompilationConfig(cudagraph_mode=mode)
    backend = layers.create_chunked_local_attention_backend(triton.TritonAttentionBackend, 64, 16)
    builder = MagicMock(cudagraph_support=backend.get_builder_cls().cudagraph_support)
    group = SimpleNamespace(metadata_builder=builder, get_metadata_builder=lambda: builder)
    runner = MagicMock(
        _attn_group_iterator=lambda: [group], compilation_config=config, uniform_decode_query_len=1
    )
    try:
        worker.GPUModelRunner.initialize_cudagraph_capture(runner)
    except ValueError as error:
        assert "please try cudagraph_mode=PIECEWISE" in str(error)  # noqa: PT017
    else:
        assert not config.cudagraph_mode.has_full_cudagraphs()
