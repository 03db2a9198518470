"""Computing attention with the impls of the V1 engine."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch

from regress import kernels, paged, tiny_llama4, v1_driver
from regress.driver import Piece, Shape
from regress.expected import BY_KEY
from regress.v1_driver import STAND_INS as PLAIN
from regress.v1_driver import decode, prefill

from . import formats
from .probe import Key, demand

MODULES = (
    "flash_attn", "triton_attn", "flashinfer", "flex_attention", "tree_attn", "xformers",
)  # fmt: skip
"""Of the impls whose kernels are stood in for."""

LAYERS = ((0, True), (3, False), (1, True))
"""Of the model, and whether they are chunked."""


def module_of(key: Key) -> str:
    """Return the name of the impl's module."""
    return key.backend.split(".")[1]


def can_run(key: Key) -> bool:
    """Return whether the impl's kernels are stood in for."""
    return module_of(key) in MODULES


@dataclass
class Engine(v1_driver.Engine):
    """The layers of the model, with a cache in the cell's format."""

    kv_dtype: str = "auto"
    dtype: torch.dtype = torch.float16
    """The cell's."""
    numbers: tuple[int, ...] = ()
    """Of the layers in the model."""

    def normal(self, *size: int) -> torch.Tensor:
        """Return random values."""
        return formats.exact(torch.randn(size, generator=self.random))

    def new_layer(self, number: int, is_chunked: bool) -> Any:
        """Construct a layer as `llama4.py` does, for the cell's dtype: it decides on the impl.

        Everything else is told that the dtype is the one that CPUs compute in.
        """
        model = self.config.model_config
        computed, model.dtype = model.dtype, self.dtype
        try:
            return tiny_llama4.attention_layer(self.config, self.numbers[number]).attn
        finally:
            model.dtype = computed

    def new_cache(self) -> torch.Tensor:
        """Return a cache full of what other sequences left."""
        return kernels.stored(super().new_cache(), self.kv_dtype)


@dataclass
class LayerEngine(Engine):
    """The same since 0.10.0: a builder makes the metadata of some layers, and for them alone.

    Whether these are chunked is decided around the builder: by the model runner in 0.10.0, as is
    copied here, and by a subclass of the builder that the layer brings along since 0.10.1.
    """

    def new_builder(self) -> list[Any]:
        """Return a builder for each layer."""
        return [self.builder_of(layer) for layer in self.layers]

    def builder_of(self, layer: Any) -> Any:
        """Construct the builder of a layer's metadata."""
        backend = getattr(self.module, BY_KEY[f"v1-{self.backend}"].backend)
        own = layer.get_attn_backend() if hasattr(layer, "get_attn_backend") else backend
        interface = importlib.import_module("vllm.v1.kv_cache_interface")
        shape = self.shape
        spec = v1_driver.called_with(
            interface.FullAttentionSpec,
            block_size=shape.block,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=torch.uint8 if self.kv_dtype in kernels.FORMATS else torch.float32,
            use_mla=False,
            sliding_window=None,
            attention_chunk_size=shape.chunk,
        )
        return v1_driver.called_with(
            own.get_builder_cls(),
            kv_cache_spec=spec,
            layer_names=[layer.layer_name],
            vllm_config=self.config,
            device=torch.device("cpu"),
        )

    def reordered(self, pieces: Sequence[Piece]) -> v1_driver.InputBatch:
        """Return the batch with decodes first, as every builder of these releases wants it."""
        batch = v1_driver.InputBatch(sorted(pieces, key=lambda piece: piece.length), self.table)
        self.fill_table(batch.pieces)
        return batch

    def metadata(self, batch: v1_driver.InputBatch, common_prefix_len: int) -> list[Any]:
        """Build the metadata of each layer."""
        return [
            builder.build(
                common_prefix_len=common_prefix_len,
                common_attn_metadata=self.common(batch, layer),
            )
            for layer, builder in zip(self.layers, self.builder, strict=True)
        ]

    def common(self, batch: v1_driver.InputBatch, layer: Any) -> Any:
        """Return what builders are told of a step."""
        utils = importlib.import_module("vllm.v1.attention.backends.utils")
        query_lens = [piece.length for piece in batch.pieces]
        starts = v1_driver.int32([0, *accumulate(query_lens)])
        rows = len(batch.pieces)
        table = v1_driver.called_with(self.table.get_device_tensor, num_reqs=rows)
        seq_lens = v1_driver.int32([piece.end for piece in batch.pieces])
        common = v1_driver.called_with(
            utils.CommonAttentionMetadata,
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone(),
            num_computed_tokens_cpu=seq_lens - v1_driver.int32(query_lens),
            num_reqs=rows,
            num_actual_tokens=sum(query_lens),
            max_query_len=max(query_lens),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table[:rows],
            slot_mapping=self.runner.slot_mapping_cpu.long(),
            causal=True,
            logits_indices_padded=None,
            num_logits_indices=None,
            encoder_seq_lens=None,
        )
        if not self.is_local(layer):
            return common
        chunk = self.config.model_config.attention_chunk_size
        return utils.make_local_attention_virtual_batches(chunk, common, self.shape.block)

    def is_local(self, layer: Any) -> bool:
        """Return whether the model runner makes chunks for a layer: where each kind of layer has a
        KV cache of its own, for those that are meant to have them."""
        return bool(getattr(layer, "use_irope", False))

    def forward(self, number: int, pieces: Iterable[Piece], metadata: Any) -> torch.Tensor:
        """Run a layer with its own metadata."""
        return super().forward(number, pieces, metadata[number])


def leave_unscheduled(patch: pytest.MonkeyPatch) -> None:
    """Have nothing computed of which kernel does what: FlashAttention's answers do not show it."""
    module = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    patch.setattr(module, "get_scheduler_metadata", lambda **_: None, raising=False)


def flash_attn(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlashAttention's kernels."""
    patch.setattr(module, "flash_attn_varlen_func", formats.flash_attn_varlen, raising=False)
    leave_unscheduled(patch)
    ops = importlib.import_module("vllm._custom_ops")
    patch.setattr(ops, "scaled_fp8_quant", formats.scaled_fp8_quant)


def chunked_prefill_paged_decode(
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache_dtype: str,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    max_query_len: int,
    sm_scale: float,
    **_: Any,
) -> None:
    """Read the caches of PagedAttention, in the format that `kv_cache_dtype` names."""
    caches = [kernels.loaded(cache, kv_cache_dtype) for cache in (key_cache, value_cache)]
    key, value = kernels.token_major(*caches)
    kernels.flash_attn_varlen(
        q=query,
        k=key,
        v=value,
        out=output,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_seq_len,
        seqused_k=seq_lens,
        block_table=block_table,
        softmax_scale=sm_scale,
        causal=True,
    )


WIDE_BLOCKS = "Block size must be at least 32 for fp8"
"""What the function around Triton's kernel says since 0.9.0."""


def wide_blocks_varlen(**arguments: Any) -> torch.Tensor:
    """Insist on blocks as wide as Triton wants for 8 bits."""
    assert arguments["q"].element_size() >= 2 or arguments["v"].shape[1] >= 32, WIDE_BLOCKS
    return formats.flash_attn_varlen(**arguments)


def triton_attn(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace what stands around Triton's kernels, and what plans for them in some releases."""
    leave_unscheduled(patch)
    ops = importlib.import_module("vllm._custom_ops")
    patch.setattr(ops, "reshape_and_cache", kernels.reshape_and_cache)
    patch.setattr(ops, "scaled_fp8_quant", formats.scaled_fp8_quant)
    name = "chunked_prefill_paged_decode"
    patch.setattr(module, name, chunked_prefill_paged_decode, raising=False)
    # Since 0.11.0 it stores with a kernel of its own, in the type that the cache is viewed as.
    patch.setattr(module, "triton_reshape_and_cache_flash", formats.reshape_and_cache_flash, False)
    unified = "vllm.attention.ops.triton_unified_attention"
    if importlib.util.find_spec(unified) is None:
        return
    kernels_module = importlib.import_module(unified)
    has_demand = WIDE_BLOCKS in inspect.getsource(kernels_module.unified_attention)
    stand_in = wide_blocks_varlen if has_demand else formats.flash_attn_varlen
    # Impls import it with their module, or since 0.10.0 when they are constructed.
    for user in (kernels_module, module):
        patch.setattr(user, "unified_attention", stand_in, raising=user is kernels_module)


def tree_attn(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace Triton's kernels. The tree of no speculation is causal attention."""
    patch.setattr(module, "unified_attention", formats.flash_attn_varlen)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any,
    p: float,
    scale: float,
) -> torch.Tensor:
    """Return attention [1, tokens, KV heads, queries per KV head, head size], a token a row.

    All blocks of the cache come one after the other in `key` and `value`, in a shape like that.
    """
    assert p == 0.0
    caches = [cache[0, :, :, 0].unflatten(0, (-1, attn_bias.page_size)) for cache in (key, value)]
    answers = []
    for row, length in enumerate(attn_bias.k_seqinfo.seqlen_py):
        table = attn_bias.block_tables[row]
        keys, values = (kernels.rows_of(cache, table, length) for cache in caches)
        one = query[:, row].flatten(1, 2)
        answers.append(kernels.attend(one, keys, values, scale).view_as(query[:, row]))
    return torch.stack(answers, 1)


def xformers(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace Triton's kernels, and that of xformers, which decodes."""
    patch.setattr(module, "unified_attention", formats.flash_attn_varlen)
    patch.setattr(module.xops, "memory_efficient_attention_forward", paged_attention)


def flashinfer(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlashInfer, and keep what it plans in memory that needs no driver."""
    patch.setattr(module, "is_pin_memory_available", lambda: False, raising=False)
    for name, stand_in in PLAIN["flashinfer"].items():
        patch.setattr(module, name, stand_in)


def flex_attention(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Replace FlexAttention's compiled kernel, and make block masks on the CPU."""
    for name, stand_in in PLAIN["flex_attention"].items():
        patch.setattr(module, name, stand_in)
    create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
    on_cpu = tuple("cpu" if default == "cuda" else default for default in create.__defaults__)
    patch.setattr(create, "__defaults__", on_cpu)
    torch.compiler.set_stance("force_eager")


STAND_INS = {
    "flash_attn": flash_attn,
    "triton_attn": triton_attn,
    "flashinfer": flashinfer,
    "flex_attention": flex_attention,
    "tree_attn": tree_attn,
    "xformers": xformers,
}


def has_layer_builders() -> bool:
    """Return whether builders are told of a step by their argument alone."""
    module = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    builder = module.FlashAttentionMetadataBuilder
    return "vllm_config" in inspect.signature(builder.__init__).parameters


def new_engine(
    config: Any,
    key: Key,
    shape: Shape,
    patch: pytest.MonkeyPatch,
    layers: Sequence[tuple[int, bool]],
) -> Engine:
    """Return an engine with the kernels stood in for."""
    name = module_of(key)
    module = importlib.import_module(f"vllm.v1.attention.backends.{name}")
    patch.setattr(
        torch.ops._C_cache_ops,
        "reshape_and_cache_flash",
        kernels.reshape_and_cache_flash,
        raising=False,
    )
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: paged.PROPERTIES)
    STAND_INS[name](module, patch)
    engine = LayerEngine if has_layer_builders() else Engine
    made = engine(
        name,
        module,
        config,
        shape,
        kinds=tuple(is_chunked for _, is_chunked in layers),
        numbers=tuple(number for number, _ in layers),
        kv_dtype=key.kv_cache_dtype,
        dtype=config.model_config.dtype,
    )
    demand(key, [layer.impl for layer in made.layers])
    return made


def run(
    config: Any,
    key: Key,
    shape: Shape,
    patch: pytest.MonkeyPatch,
    layers: Sequence[tuple[int, bool]] = LAYERS,
) -> None:
    """Prefill two prompts, one of them in parts, and decode."""
    engine = new_engine(config, key, shape, patch, layers)
    long, short = engine.sequence(shape.max_len), engine.sequence(shape.max_len)
    part = min(shape.chunk + 3, shape.max_len // 2)
    engine.step(prefill(long, part), prefill(short, 3))
    rest = min(shape.chunk + 1, shape.max_len - part - 2)
    engine.step(prefill(long, rest), decode(short))
    for _ in range(2):
        engine.step(decode(long), decode(short))
    if key.length == "past":
        # A boundary cuts one token off the next part of a prompt, before another prompt's.
        chunk = shape.chunk
        one, other = engine.sequence(shape.max_len), engine.sequence(shape.max_len)
        engine.step(prefill(one, chunk - 5), prefill(other, chunk - 1))
        engine.step(decode(short), prefill(one, 6), prefill(other, chunk))
    if key.verifies:
        config.model_config.dtype = engine.dtype
        verify(new_engine(config, key, shape, patch, layers))


def verify(engine: Engine) -> None:
    """Decode several proposed tokens of sequences at once, over the end of a chunk."""
    shape = engine.shape
    one, other = engine.sequence(shape.max_len), engine.sequence(shape.max_len)
    engine.step(prefill(one, min(shape.chunk - 2, shape.max_len - 3)), prefill(other, 3))
    engine.step(prefill(one, 3), prefill(other, 3))
