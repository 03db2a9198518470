"""The V1 engine of 0.10.0 up to the metadata of a step, with its own model runner, on the CPU.

The model runner, the KV-cache configuration and the metadata builders are the real ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from . import tiny_llama4
from .batches import used_row
from .seen import (
    BLOCK,
    CHUNK,
    DecodeWrapper,
    PrefillWrapper,
    Request,
    Seen,
    flashinfer_seen,
    flex_seen,
    paged_seen,
    sdpa_seen,
)
from .third_party import import_untuned

Blocks = tuple[list[int], ...]
"""Of one request, for each KV-cache group."""


@dataclass(frozen=True)
class Backend:
    """A backend of V1, and how to read its metadata."""

    name: str
    """As in VLLM_ATTENTION_BACKEND."""
    module: str
    cls: str
    seen: Callable[[Any], Seen]
    stubs: tuple[str, ...] = ()
    is_ordered: bool = True
    """Whether what is read has the slots in the order of the sequence."""


BACKENDS = {
    "flash_attn": Backend(
        "FLASH_ATTN_VLLM_V1", "flash_attn", "FlashAttentionBackend", paged_seen
    ),
    "triton": Backend(
        "TRITON_ATTN_VLLM_V1", "triton_attn", "TritonAttentionBackend", paged_seen
    ),
    "flashinfer": Backend(
        "FLASHINFER_VLLM_V1", "flashinfer", "FlashInferBackend", flashinfer_seen, ("flashinfer",)
    ),
    "flex": Backend(
        "FLEX_ATTENTION", "flex_attention", "FlexAttentionBackend", flex_seen, is_ordered=False
    ),
    "cpu": Backend("TORCH_SDPA", "cpu_attn", "TorchSDPABackend", sdpa_seen),
}  # fmt: skip


# The engine around the metadata.


@dataclass
class Engine:
    """A model runner with the layers of a tiny Llama 4, and the blocks it may give out."""

    runner: Any
    layers: dict[str, Any]
    backend: Backend

    def prepare(self, requests: list[Request]) -> tuple[dict[str, Any], list[Blocks]]:
        """Run one step up to the metadata. Return that by layer, and each request's blocks.

        The CPU's builder wants prefills first, FlashInfer's decodes; both order them themselves.
        """
        output = importlib.import_module("vllm.v1.core.sched.output")
        groups = self.runner.kv_cache_config.kv_cache_groups
        order = torch.randperm(
            self.runner.kv_cache_config.num_blocks - 1, generator=torch.Generator().manual_seed(0)
        )
        free = iter((order + 1).tolist())
        new, scheduled, blocks = [], {}, []
        for number, request in enumerate(requests):
            name = f"{number}"
            count = -(-request.end // BLOCK)
            own = tuple([next(free) for _ in range(count)] for _ in groups)
            blocks.append(own)
            scheduled[name] = request.new
            prompt = request.end if request.is_prefill else request.computed
            new.append(
                output.NewRequestData(
                    req_id=name,
                    prompt_token_ids=[1] * prompt,
                    mm_inputs=[],
                    mm_hashes=[],
                    mm_positions=[],
                    sampling_params=importlib.import_module("vllm").SamplingParams(),
                    pooling_params=None,
                    block_ids=own,
                    num_computed_tokens=request.computed,
                    lora_request=None,
                )
            )
        step = output.SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=output.CachedRequestData.make_empty(),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            num_common_prefix_blocks=[0] * len(groups),
            finished_req_ids=set(self.runner.requests),
            free_encoder_input_ids=[],
            structured_output_request_ids={},
            grammar_bitmask=None,
        )
        self.runner._update_states(step)
        for row, name in enumerate(self.runner.input_batch.req_ids):
            tables = self.runner.input_batch.block_table.block_tables
            for table, of_group in zip(tables, blocks[int(name)], strict=True):
                table.add_row(used_row(of_group, table.max_num_blocks_per_req), row)
                table.add_row(of_group, row)
        return self.runner._prepare_inputs(step)[0], blocks

    def check(self, requests: list[Request]) -> None:
        """Compare what each layer's tokens see with the definition."""
        metadata, blocks = self.prepare(requests)
        order = self.runner.input_batch.req_ids
        assert len(order) == len(requests)
        for number, group in enumerate(self.runner.kv_cache_config.kv_cache_groups):
            for layer in group.layer_names:
                chunk = CHUNK if self.layers[layer].use_irope else None
                expected = [
                    slots if self.backend.is_ordered else sorted(slots)
                    for name in order
                    for slots in requests[int(name)].seen(blocks[int(name)][number], chunk)
                ]
                kind = "global" if chunk is None else "chunked"
                found = self.backend.seen(metadata[layer])
                assert found == expected, f"wrong metadata of {kind} layer {layer}"


def new_engine(
    config: Any, backend_name: str, monkeypatch: pytest.MonkeyPatch, max_len: int
) -> Engine:
    """Return an engine whose KV cache is as the engine's config has it: in groups, or in one."""
    backend, is_cpu = BACKENDS[backend_name], backend_name == "cpu"
    config.model_config.attention_chunk_size = CHUNK
    config.model_config.max_model_len = max_len
    config.cache_config.block_size = BLOCK
    worker = import_untuned("vllm.v1.worker.gpu_model_runner")
    module = importlib.import_module(f"vllm.v1.attention.backends.{backend.module}")
    stand_in(module, backend_name, monkeypatch)
    chosen = getattr(module, backend.cls)
    for user in ("vllm.attention.layer", worker.__name__):
        monkeypatch.setattr(f"{user}.get_attn_backend", lambda *_, **__: chosen)
    # The pipeline has one stage.
    monkeypatch.setattr("vllm.distributed.parallel_state._PP", tiny_llama4.OneRank())
    layers = {
        made.attn.layer_name: made.attn
        for made in (tiny_llama4.attention_layer(config, layer) for layer in range(4))
    }
    assert [layer.use_irope for layer in layers.values()] == [True, True, True, False]
    runner = new_runner(config, is_cpu, monkeypatch)
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    cache = utils.get_kv_cache_config(config, runner.get_kv_cache_spec(), 32 << 20)
    is_hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    assert len(cache.kv_cache_groups) == (4 if is_hybrid else 1)
    config.cache_config.num_gpu_blocks = cache.num_blocks
    runner.initialize_kv_cache(cache)
    return Engine(runner, layers, backend)


def stand_in(module: Any, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what a backend needs a GPU or its own package for."""
    if backend_name == "flashinfer":
        name = "BatchPrefillWithPagedKVCacheWrapper"
        monkeypatch.setattr(module, name, PrefillWrapper)
        name = "BatchDecodeWithPagedKVCacheWrapper"
        monkeypatch.setattr(module, name, DecodeWrapper)
        monkeypatch.setattr(module, "FLASHINFER_WORKSPACE_BUFFER_SIZE", 1)
        layout = "vllm.v1.attention.backends.utils.get_kv_connector_cache_layout"
        monkeypatch.setattr(layout, lambda: "NHD")
    if backend_name == "flex":
        # A tensor form of the mask, which is asked for here as a function.
        monkeypatch.setattr(module, "create_block_mask_compiled", lambda *_, **__: None)


def new_runner(config: Any, is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a model runner on the CPU."""
    worker = import_untuned("vllm.v1.worker.gpu_model_runner")
    # Llama 4's processor is not needed to make metadata.
    monkeypatch.setattr(worker, "compute_encoder_budget", lambda **_: (0, 0))
    monkeypatch.setattr(worker, "is_pin_memory_available", lambda: False)
    monkeypatch.setattr(worker.GPUModelRunner, "_init_device_properties", lambda self: None)
    cls = worker.GPUModelRunner
    if is_cpu:
        cls = importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    with tiny_llama4.loading(config):
        runner = cls(config, torch.device("cpu"))
    runner.cascade_attn_enabled = False
    return runner
