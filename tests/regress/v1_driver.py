"""The V1 engine around the layers of one attention backend, on the CPU.

The real metadata builder plans each step for the layers that the attention layer constructs, as
the model runner has it do: it may reorder the batch, and its metadata serves all the layers.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from . import kernels, paged, tiny_llama4
from .batches import used_row
from .driver import Piece, Request, Shape, check_layer
from .expected import BY_KEY

STAND_INS: dict[str, dict[str, Any]] = {
    # The workspace is what kernels use among themselves.
    "flashinfer": {**paged.FLASHINFER, "FLASHINFER_WORKSPACE_BUFFER_SIZE": 1},
    "flex_attention": {"flex_attention_compiled": paged.flex_attention},
}


MAX_REQUESTS = 4


def prefill(sequence: Request, length: int) -> Piece:
    return Piece(sequence, length, is_prefill=True)


def decode(sequence: Request) -> Piece:
    return Piece(sequence, 1, is_prefill=False)


class InputBatch:
    """The requests of a step, in the order that the builder wants them in."""

    def __init__(self, pieces: Sequence[Piece], block_table: Any) -> None:
        self.pieces, self.block_table = list(pieces), block_table

    @property
    def req_ids(self) -> list[str]:
        return [str(id(piece)) for piece in self.pieces]

    @property
    def num_computed_tokens_cpu(self) -> Any:
        return int32([piece.sequence.computed for piece in self.pieces]).numpy()

    def swap_states(self, one: int, other: int) -> None:
        self.pieces[one], self.pieces[other] = self.pieces[other], self.pieces[one]


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def called_with(function: Callable[..., Any], **known: Any) -> Any:
    """Call `function` with those of the known arguments that it takes in this release."""
    parameters = inspect.signature(function).parameters.values()
    wanted = [it.name for it in parameters if it.name in known or it.default is it.empty]
    return function(**{name: known[name] for name in wanted})


@dataclass
class Engine:
    """The layers of one backend, their caches, and the builder of their metadata."""

    backend: str
    module: Any
    config: Any
    shape: Shape
    kinds: tuple[bool, ...] = (True, False, True, True)
    """Which layers are chunked."""
    layers: list[Any] = field(default_factory=list)
    caches: list[torch.Tensor] = field(default_factory=list)
    free_blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        model, shape = self.config.model_config, self.shape
        model.attention_chunk_size, model.max_model_len = shape.chunk, shape.max_len
        model.dtype = torch.float32
        self.config.cache_config.block_size = shape.block
        self.config.cache_config.num_gpu_blocks = self.total_blocks
        self.config.compilation_config.static_forward_context.clear()
        # The order of the blocks is no sequence's.
        order = torch.randperm(self.total_blocks - 1, generator=self.random) + 1
        self.free_blocks = order.tolist()
        with tiny_llama4.loading(self.config):
            self.layers = [self.new_layer(*kind) for kind in enumerate(self.kinds)]
            self.builder = self.new_builder()
        self.caches = [self.new_cache() for _ in self.layers]

    @functools.cached_property
    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    @property
    def total_blocks(self) -> int:
        # Block 0 is what padding points to.
        return MAX_REQUESTS * self.shape.columns + 1

    @functools.cached_property
    def table(self) -> Any:
        """The release's own block table, one object for good, as builders see it."""
        return called_with(
            importlib.import_module("vllm.v1.worker.block_table").BlockTable,
            block_size=self.shape.block,
            max_num_reqs=MAX_REQUESTS,
            max_num_blocks_per_req=self.shape.columns,
            max_num_batched_tokens=MAX_REQUESTS * self.shape.max_len,
            pin_memory=False,
            device=torch.device("cpu"),
        )

    def fill_table(self, pieces: Sequence[Piece]) -> None:
        """Give each request a row of the table that former requests have used."""
        for row, piece in enumerate(pieces):
            blocks = piece.sequence.blocks[: -(-piece.end // self.shape.block)]
            self.table.add_row(used_row(blocks, self.shape.columns), row)
            self.table.add_row(blocks, row)
        # Since 0.10.0 in two parts.
        commit = getattr(self.table, "commit_block_table", None) or self.table.commit
        commit(len(pieces))
        slots = int32([slot for piece in pieces for slot in piece.slots(self.shape.block)])
        # In 0.8.5 they are the runner's.
        self.runner.slot_mapping_cpu = slots
        if hasattr(self.table, "slot_mapping_cpu"):
            self.table.slot_mapping_cpu[: len(slots)] = slots

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.random)

    def new_layer(self, number: int, is_chunked: bool) -> Any:
        shape = self.shape
        return importlib.import_module("vllm.attention").Attention(
            shape.heads,
            shape.head_size,
            shape.head_size**-0.5,
            num_kv_heads=shape.kv_heads,
            cache_config=self.config.cache_config,
            prefix=f"model.layers.{number}.self_attn.attn",
            use_irope=is_chunked,
        )

    @functools.cached_property
    def runner(self) -> SimpleNamespace:
        """What builders ask of the model runner."""
        shape, model = self.shape, self.config.model_config
        return SimpleNamespace(
            vllm_config=self.config,
            model_config=model,
            parallel_config=self.config.parallel_config,
            cache_config=self.config.cache_config,
            attention_chunk_size=model.attention_chunk_size,
            max_num_reqs=self.config.scheduler_config.max_num_seqs,
            device=torch.device("cpu"),
            dtype=torch.float32,
            kv_cache_dtype=torch.float32,
            block_size=shape.block,
            num_query_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
        )

    def new_builder(self) -> Any:
        shape = self.shape
        spec = SimpleNamespace(
            block_size=shape.block,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=torch.float32,
        )
        cls = getattr(self.module, BY_KEY[f"v1-{self.backend}"].backend).get_builder_cls()
        return called_with(cls, runner=self.runner, kv_cache_spec=spec, block_table=self.table)

    def new_cache(self) -> torch.Tensor:
        """Return a cache full of what other sequences left, which must not be looked at."""
        backend = getattr(self.module, BY_KEY[f"v1-{self.backend}"].backend)
        shape = self.shape
        sizes = (self.total_blocks, shape.block, shape.kv_heads, shape.head_size)
        return 30 * self.normal(*backend.get_kv_cache_shape(*sizes))

    def sequence(self, length: int, after: Request | None = None, shared: int = 0) -> Request:
        """Return a new sequence, its first tokens, if any are shared, those of another one."""
        shape = self.shape
        assert length <= shape.max_len
        assert shared % shape.block == 0
        count = -(-length // shape.block)
        blocks, self.free_blocks = self.free_blocks[:count], self.free_blocks[count:]
        assert len(blocks) == count
        new = Request(
            blocks=blocks,
            query=self.normal(length, shape.heads, shape.head_size),
            key=self.normal(length, shape.kv_heads, shape.head_size),
            value=self.normal(length, shape.kv_heads, shape.head_size),
        )
        if after is not None:
            new.blocks[: shared // shape.block] = after.blocks[: shared // shape.block]
            for name in ("query", "key", "value"):
                getattr(new, name)[:shared] = getattr(after, name)[:shared]
        return new

    def cache_of(self, number: int) -> Iterator[torch.Tensor]:
        """Return the keys and the values of a layer's cache."""
        cache = self.caches[number]
        return iter(cache.unbind(0 if cache.shape[0] == 2 else 1))

    def fill_cache(self, sequence: Request, length: int) -> None:
        """Compute the first tokens of a sequence, as some step before did."""
        slots = torch.tensor(prefill(sequence, length).slots(self.shape.block))
        for number in range(len(self.layers)):
            key, value = sequence.key[:length], sequence.value[:length]
            kernels.reshape_and_cache_flash(key, value, *self.cache_of(number), slots)
        sequence.computed = length

    def reordered(self, pieces: Sequence[Piece]) -> InputBatch:
        """Return a step's batch in the order that the builder wants, the block table filled."""
        batch = InputBatch(pieces, self.table)
        lens = {str(id(piece)): piece.length for piece in pieces}
        self.builder.reorder_batch(batch, SimpleNamespace(num_scheduled_tokens=lens))
        self.fill_table(batch.pieces)
        return batch

    def metadata(self, batch: InputBatch, common_prefix_len: int) -> Any:
        """Have the builder build the metadata of a step, as the model runner does."""
        query_lens = [piece.length for piece in batch.pieces]
        starts = int32([0, *accumulate(query_lens)])
        seq_lens = int32([piece.end for piece in batch.pieces])
        vars(self.runner).update(
            query_start_loc_np=starts.numpy(),
            query_start_loc_cpu=starts,
            seq_lens_np=seq_lens.numpy(),
            seq_lens_cpu=seq_lens,
            input_batch=batch,
        )
        common = {
            "query_start_loc": starts.clone(),
            "seq_lens": seq_lens.clone(),
            "num_reqs": len(batch.pieces),
            "num_actual_tokens": sum(query_lens),
            "max_query_len": max(query_lens),
        }
        return called_with(
            self.builder.build,
            **common,
            common_prefix_len=common_prefix_len,
            common_attn_metadata=SimpleNamespace(**common),
        )

    def forward(self, number: int, pieces: Iterable[Piece], metadata: Any) -> torch.Tensor:
        """Run a layer; a few rows of padding, as for a CUDA graph, come after the tokens."""
        layer, shape = self.layers[number], self.shape

        def stacked(name: str) -> torch.Tensor:
            parts = [getattr(piece.sequence, name)[piece.tokens] for piece in pieces]
            return torch.cat([*parts, parts[0].new_full((3, *parts[0].shape[1:]), 30.0)])

        query, key, value = map(stacked, ("query", "key", "value"))
        output = torch.full_like(query, torch.nan)
        answer = layer.impl.forward(layer, query, key, value, self.caches[number], metadata, output)
        return answer.view(-1, shape.heads, shape.head_size)

    def step(self, *pieces: Piece, common_prefix_len: int = 0) -> Any:
        """Run one batch through all the layers and compare each answer with the reference."""
        batch = self.reordered(pieces)
        metadata = self.metadata(batch, common_prefix_len)
        for number, is_chunked in enumerate(self.kinds):
            answer = self.forward(number, batch.pieces, metadata)
            chunk = self.shape.chunk if is_chunked else None
            check_layer(number, answer, batch.pieces, self.shape, chunk)
        for piece in batch.pieces:
            piece.sequence.computed = piece.end
        return metadata
