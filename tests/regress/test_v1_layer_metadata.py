"""V1 since 0.10.1: which keys each layer sees in a block table that was used before.

There a chunked layer brings a backend of its own, whose builder makes virtual batches first. The
layers, the builders and the block table are the real ones; what the metadata lets each token see is
compared with the definition.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import tiny_llama4
from .batches import used_row
from .expected import FLEX_STALE_BLOCKS, FLEX_STALE_ERROR, LAYERS_MAKE_CHUNKS
from .releases import backend_name, in_order, installed_release
from .seen import BATCHES, BLOCK, CHUNK, COLUMNS, MAX_LEN, Request, Seen, flex_seen, paged_seen
from .third_party import import_untuned
from .v1_driver import called_with, int32

RELEASE = installed_release()

pytestmark = pytest.mark.skipif(
    RELEASE not in LAYERS_MAKE_CHUNKS, reason=f"layers of {RELEASE} bring no backend of their own"
)

flex_stale_blocks = pytest.mark.fail_to_pass(
    releases=in_order(FLEX_STALE_BLOCKS), raises=FLEX_STALE_ERROR
)

BACKENDS = [
    "FLASH_ATTN_VLLM_V1",
    "TRITON_ATTN_VLLM_V1",
    "TREE_ATTN",
    "XFORMERS_VLLM_V1",
    pytest.param("FLEX_ATTENTION", marks=flex_stale_blocks),
]


def seen_by(builder: Any, requests: list[Request], blocks: list[list[int]]) -> Seen:
    """Return the slots that each token sees, in ascending order, by what the builder builds."""
    table = called_with(
        importlib.import_module("vllm.v1.worker.block_table").BlockTable,
        block_size=BLOCK,
        max_num_reqs=len(requests),
        max_num_blocks_per_req=COLUMNS,
        max_num_batched_tokens=len(requests) * MAX_LEN,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    for row, own in enumerate(blocks):
        table.add_row(used_row(own, COLUMNS), row)
        table.add_row(own, row)
    starts = int32([0, *(request.new for request in requests)]).cumsum(0, dtype=torch.int32)
    seq_lens = int32([request.end for request in requests])
    common = called_with(
        importlib.import_module("vllm.v1.attention.backends.utils").CommonAttentionMetadata,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        num_computed_tokens_cpu=int32([request.computed for request in requests]),
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(request.new for request in requests),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table.get_cpu_tensor(),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        causal=True,
    )
    metadata = builder.build(0, common)
    seen = flex_seen if hasattr(metadata, "physical_to_logical") else paged_seen
    return [sorted(slots) for slots in seen(metadata)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_used_block_table(
    backend: str, batch: str, start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within a chunk every backend is let in.
    env = {"VLLM_USE_V1": "1", "VLLM_ATTENTION_BACKEND": backend_name(backend)}
    config = start_engine(env, max_model_len=tiny_llama4.CHUNK)
    config.model_config.max_model_len = MAX_LEN
    config.model_config.hf_config.text_config.attention_chunk_size = CHUNK
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = 4 * COLUMNS + 1
    import_untuned("vllm.v1.worker.gpu_model_runner")
    spec = called_with(
        importlib.import_module("vllm.v1.kv_cache_interface").FullAttentionSpec,
        block_size=BLOCK,
        num_kv_heads=tiny_llama4.KV_HEADS,
        head_size=tiny_llama4.HEAD_SIZE,
        dtype=torch.bfloat16,
        use_mla=False,
    )
    requests = BATCHES[batch]
    free = iter(
        (torch.randperm(4 * COLUMNS, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    )
    blocks = [[next(free) for _ in range(-(-request.end // BLOCK))] for request in requests]
    for number, kind in tiny_llama4.LAYERS.items():
        layer = tiny_llama4.attention_layer(config, number).attn
        chosen = layer.get_attn_backend()
        module = importlib.import_module(chosen.get_impl_cls().__module__)
        # A tensor form of the mask, which is asked for here as a function.
        monkeypatch.setattr(module, "create_block_mask_compiled", lambda *_, **__: None, False)
        device = torch.device("cpu")
        builder = chosen.get_builder_cls()(spec, [layer.layer_name], config, device)
        chunk = CHUNK if kind == "chunked" else None
        expected = [
            sorted(slots)
            for request, own in zip(requests, blocks, strict=True)
            for slots in request.seen(own, chunk)
        ]
        assert seen_by(builder, requests, blocks) == expected, f"wrong metadata of {kind} layer"
