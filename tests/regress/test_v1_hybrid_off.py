"""V1 of 0.10.0: which keys each layer sees, with and without the hybrid KV-cache manager.

There the model runner makes the metadata of chunked layers. It, the KV-cache configuration and
the metadata builders are the real ones; what the metadata lets each token see is compared with
the definition. With the hybrid manager, chunked and global layers are in groups of their own.
Without (a flag, KV transfer, KV events, EAGLE), they are in one group.
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
    BLOCK,
    CHUNK,
    MAX_LEN,
    ONE_TOKEN_PIECE,
    DecodeWrapper,
    PrefillWrapper,
    Request,
    Seen,
    decode,
    flashinfer_seen,
    flex_seen,
    paged_seen,
    sdpa_seen,
)
from .third_party import import_untuned

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
        is_cpu = backend_name == "cpu"
        stubs(backend.stubs)
        # The CPU's backend is chosen by its platform, and here by what follows.
        env = {} if is_cpu else {"VLLM_ATTENTION_BACKEND": backend.name}
        config = start_engine({"VLLM_USE_V1": "1", **env})
        config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid
        config.model_config.attention_chunk_size = CHUNK
        config.model_config.max_model_len = max_len
        config.cache_config.block_size = BLOCK
        worker = import_untuned("vllm.v1.worker.gpu_model_runner")
        module = importlib.import_module(f"vllm.v1.attention.backends.{backend.module}")
        stand_in(module, backend_name, monkeypatch)
        chosen = getattr(module, backend.cls)
        for user in ("vllm.attention.layer", worker.__name__):
            monkeypatch.setattr(f"{user}.get_attn_backend", lambda *_, **__: chosen)
        layers = {
            made.attn.layer_name: made.attn
            for made in (tiny_llama4.attention_layer(config, layer) for layer in range(4))
        }
        assert [layer.use_irope for layer in layers.values()] == [True, True, True, False]
        runner = new_runner(config, is_cpu, monkeypatch)
        utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
        cache = utils.get_kv_cache_config(config, runner.get_kv_cache_spec(), 32 << 20)
        assert len(cache.kv_cache_groups) == (4 if hybrid else 1)
        config.cache_config.num_gpu_blocks = cache.num_blocks
        runner.initialize_kv_cache(cache)
        return Engine(runner, layers, backend)

    # The pipeline has one stage.
    monkeypatch.setattr("vllm.distributed.parallel_state._PP", tiny_llama4.OneRank())
    return new


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
