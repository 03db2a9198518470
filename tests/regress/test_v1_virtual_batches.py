"""V1 since 0.10.1: which keys each layer sees, where chunked layers have their own builder.

It makes a virtual batch of each chunk that a request touches. FlashInfer, TREE_ATTN and
XFORMERS_VLLM_V1 take decodes and prefills apart, and FlashInfer has buffers for so many rows.
Layers, builders and the specs of the KV cache are the real ones; what the metadata lets each token
see is compared with the definition.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch

from . import seen, tiny_llama4, v1_driver
from .expected import BUFFERS_ERROR, LAYERS_MAKE_CHUNKS, LAYERS_SPLIT_REFUSES, SPLIT_ERROR
from .releases import in_order, installed_release
from .seen import BLOCK, CHUNK, COLUMNS, MAX_LEN, Request, Seen, decode

RELEASE = installed_release()

pytestmark = pytest.mark.skipif(
    RELEASE not in LAYERS_MAKE_CHUNKS,
    reason=f"the chunked layers of {RELEASE} have no builder of their own",
)

split_refuses = pytest.mark.fail_to_pass(
    releases=in_order(LAYERS_SPLIT_REFUSES), raises=SPLIT_ERROR
)
buffers_overflow = pytest.mark.fail_to_pass(
    releases=in_order(LAYERS_MAKE_CHUNKS), raises=BUFFERS_ERROR
)


# What metadata lets tokens see.


def parts_seen(metadata: Any) -> Seen:
    """Read the parts of TREE_ATTN's metadata. The tree of no speculation is causal attention."""
    parts = (metadata.decode_metadata, metadata.prefill_metadata)
    return [
        slots
        for part in parts
        if part is not None
        for slots in seen.rows_seen(part.query_start_loc, part.seq_lens, part.block_table)
    ]


def xformers_seen(metadata: Any) -> Seen:
    """Read the mask that decodes, one token each, have instead of metadata."""
    if metadata.num_decodes:
        bias = metadata.decode_metadata.attn_bias
        lengths, table = bias.k_seqinfo.seqlen_py, bias.block_tables
        one_each = range(len(lengths) + 1)
        decoded = metadata.decode_metadata
        assert seen.rows_seen(one_each, lengths, table) == seen.rows_seen(
            decoded.query_start_loc, decoded.seq_lens, decoded.block_table
        )
    return parts_seen(metadata)


@dataclass(frozen=True)
class Backend:
    """A backend that takes decodes and prefills apart, and how to read its metadata."""

    module: str
    cls: str
    seen: Callable[[Any], Seen]


BACKENDS = {
    "flashinfer": Backend("flashinfer", "FlashInferBackend", seen.flashinfer_seen),
    "tree": Backend("tree_attn", "TreeAttentionBackend", parts_seen),
    "xformers": Backend("xformers", "XFormersAttentionBackend", xformers_seen),
}

for_backends = pytest.mark.parametrize("backend", BACKENDS)
for_specs = pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "one-group"])


# The builders.


@dataclass
class Engine:
    """A chunked and a global layer, and the builders of their metadata."""

    backend: Backend
    chunks: dict[str, int | None]
    """By layer."""
    builders: dict[str, Any]

    def check(self, requests: Sequence[Request]) -> None:
        """Compare what each layer's tokens see with the definition."""
        order = torch.randperm(len(requests) * COLUMNS, generator=torch.Generator().manual_seed(0))
        table = (order + 1).int().view(len(requests), COLUMNS)
        common = common_metadata(requests, table)
        for name, builder in self.builders.items():
            metadata = builder.build(common_prefix_len=0, common_attn_metadata=common)
            expected = [
                slots
                for request, blocks in zip(requests, table.tolist(), strict=True)
                for slots in request.seen(blocks, self.chunks[name])
            ]
            assert self.backend.seen(metadata) == expected, f"wrong metadata of layer {name}"


def common_metadata(requests: Sequence[Request], table: torch.Tensor) -> Any:
    """Return what builders are told of a step: decodes come first."""
    assert sorted(requests, key=lambda request: request.is_prefill) == list(requests)
    utils = importlib.import_module("vllm.v1.attention.backends.utils")
    new, ends = [request.new for request in requests], [request.end for request in requests]
    starts, lengths = v1_driver.int32([0, *accumulate(new)]), v1_driver.int32(ends)
    return v1_driver.called_with(
        utils.CommonAttentionMetadata,
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        num_computed_tokens_cpu=lengths - v1_driver.int32(new),
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=max(ends),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64),
        causal=True,
        logits_indices_padded=None,
        num_logits_indices=None,
        encoder_seq_lens=None,
    )


def specs(names: Sequence[str], hybrid: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return the KV cache's form of a chunked and a global layer, in groups of their own or not."""
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    known = {
        "block_size": BLOCK,
        "num_kv_heads": tiny_llama4.KV_HEADS,
        "head_size": tiny_llama4.HEAD_SIZE,
        "dtype": dtype,
        "use_mla": False,
    }
    chunked, whole = names
    made = {
        chunked: v1_driver.called_with(
            interface.ChunkedLocalAttentionSpec, attention_chunk_size=CHUNK, **known
        ),
        whole: v1_driver.called_with(interface.FullAttentionSpec, **known),
    }
    if not hybrid:
        importlib.import_module("vllm.v1.core.kv_cache_utils").unify_hybrid_kv_cache_specs(made)
        made = dict.fromkeys(names, made[chunked].merge(list(made.values())))
    return made


NewEngine = Callable[..., Engine]


@pytest.fixture
def new_engine(
    start_engine: Callable[..., Any],
    stubs: Callable[[tuple[str, ...]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> NewEngine:
    """Return a function that gives an engine by backend."""

    def new(name: str, hybrid: bool = True, **limits: int) -> Engine:
        backend = BACKENDS[name]
        stubs(("flashinfer",))
        config = start_engine({"VLLM_USE_V1": "1"})
        config.model_config.hf_config.text_config.attention_chunk_size = CHUNK
        config.model_config.attention_chunk_size = CHUNK
        config.model_config.max_model_len = MAX_LEN
        config.cache_config.block_size = BLOCK
        vars(config.scheduler_config).update(limits)
        module = importlib.import_module(f"vllm.v1.attention.backends.{backend.module}")
        if name == "flashinfer":
            stand_in(module, monkeypatch)
        chosen = getattr(module, backend.cls)
        for user in ("vllm.attention.layer", "vllm.attention.layers.chunked_local_attention"):
            monkeypatch.setattr(f"{user}.get_attn_backend", lambda *_, **__: chosen)
        layers = [tiny_llama4.attention_layer(config, number).attn for number in tiny_llama4.LAYERS]
        names = [layer.layer_name for layer in layers]
        made = specs(names, hybrid, config.model_config.dtype)
        builders = {
            layer.layer_name: layer.get_attn_backend().get_builder_cls()(
                made[layer.layer_name], [layer.layer_name], config, torch.device("cpu")
            )
            for layer in layers
        }
        return Engine(backend, dict(zip(names, (CHUNK, None), strict=True)), builders)

    return new


def stand_in(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what FlashInfer needs a GPU or its own package for."""
    monkeypatch.setattr(module, "BatchPrefillWithPagedKVCacheWrapper", seen.PrefillWrapper)
    monkeypatch.setattr(module, "BatchDecodeWithPagedKVCacheWrapper", seen.DecodeWrapper)
    monkeypatch.setattr(module, "FLASHINFER_WORKSPACE_BUFFER_SIZE", 1)
    monkeypatch.setattr(module, "is_pin_memory_available", lambda: False)
    monkeypatch.setattr(module, "get_kv_cache_layout", lambda: "NHD")


WHOLE = {
    "prompts": [Request(0, MAX_LEN), Request(0, CHUNK)],
    "decodes": [decode(MAX_LEN), decode(CHUNK), decode(CHUNK + 1), decode(3)],
    "mixed": [decode(2 * CHUNK + 5), Request(CHUNK - 5, CHUNK + 9), Request(0, CHUNK + 4)],
}
"""Batches in which no chunk has but one or two tokens of a prompt, behind longer ones."""

SHORT = {
    "after-a-chunk": [Request(0, CHUNK + 1)],
    "before-a-chunk": [Request(0, 5), Request(CHUNK - 1, CHUNK)],
    "behind-decodes": [decode(2 * CHUNK + 5), Request(CHUNK - 5, 6), Request(CHUNK - 1, CHUNK)],
}
"""Batches in which some chunk has one token of a prompt, behind longer ones."""


@for_specs
@for_backends
@pytest.mark.parametrize("batch", WHOLE)
def test_whole_pieces(backend: str, hybrid: bool, batch: str, new_engine: NewEngine) -> None:
    new_engine(backend, hybrid).check(WHOLE[batch])


@split_refuses
@for_specs
@for_backends
@pytest.mark.parametrize("batch", SHORT)
def test_one_token_piece(backend: str, hybrid: bool, batch: str, new_engine: NewEngine) -> None:
    """A chunk boundary may cut a single token off a prefill: no decode, though as short as one."""
    new_engine(backend, hybrid).check(SHORT[batch])


@split_refuses
@pytest.mark.parametrize("length", [1, 2, 3])
def test_piece_as_short_as_a_tree(length: int, new_engine: NewEngine) -> None:
    """TREE_ATTN takes up to as many tokens for a decode as its tree has, and two without one."""
    engine = new_engine("tree")
    engine.check([decode(2 * CHUNK), Request(0, CHUNK + length), Request(0, CHUNK + 1)])


def test_pieces_in_front(new_engine: NewEngine) -> None:
    """Pieces in front of all longer ones may be computed as decodes are."""
    for backend in BACKENDS:
        new_engine(backend).check([decode(40), Request(CHUNK - 1, 2), Request(CHUNK - 1, 9)])


@buffers_overflow
@for_specs
@pytest.mark.parametrize("length", [CHUNK + 2, MAX_LEN])
def test_one_sequence(length: int, hybrid: bool, new_engine: NewEngine) -> None:
    """max_num_seqs is 1, and the prompt has two chunks or more."""
    engine = new_engine("flashinfer", hybrid, max_num_seqs=1)
    engine.check([Request(0, length)])
    engine.check([decode(length)])


@buffers_overflow
@for_specs
def test_a_row_too_many(hybrid: bool, new_engine: NewEngine) -> None:
    """As many requests as there may be, of which one has two chunks."""
    engine = new_engine("flashinfer", hybrid, max_num_seqs=256)
    engine.check([decode(1 + number % MAX_LEN) for number in range(255)] + [Request(0, CHUNK + 9)])


@buffers_overflow
@for_specs
@pytest.mark.parametrize("tokens", [9, 12, 64, 70])
def test_most_rows(tokens: int, hybrid: bool, new_engine: NewEngine) -> None:
    """Each request has two tokens of two chunks; one has more, of as many chunks as fit."""
    engine = new_engine("flashinfer", hybrid, max_num_seqs=4, max_num_batched_tokens=tokens)
    engine.check([Request(CHUNK - 1, 2)] * 3 + [Request(CHUNK - 1, tokens - 6)])
