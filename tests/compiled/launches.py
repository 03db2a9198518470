"""What Llama 4 launches through Triton, by the release's own launchers, in the shape of Scout.

The tensors are on the device `meta`: they have a dtype, a shape and strides, and no memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from regress.v1_driver import called_with

FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
HIDDEN_SIZE = 5120
INTERMEDIATE_SIZE = 8192
EXPERTS = 16
HEADS, KV_HEADS, HEAD_SIZE = 40, 8, 128
"""Of Llama 4 Scout. Maverick differs in its experts, of which no kernel knows the number."""
TOKENS = (16, 32, 8192)
"""Of a step: launchers take other tiles for few than for many."""
GROUP = 128
"""Weights that share a scale, where groups of them do."""
BLOCKS, SEQUENCES = 1024, 4

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = DTYPES[:2]
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2")

NO_OPS = {
    "_C": (
        "silu_and_mul", "static_scaled_fp8_quant", "dynamic_scaled_fp8_quant",
        "dynamic_per_token_scaled_fp8_quant",
    ),
    "_moe_C": ("moe_align_block_size", "moe_sum", "moe_wna16_gemm"),
    "_C_cache_ops": ("reshape_and_cache", "reshape_and_cache_flash"),
}  # fmt: skip
"""Operators of the compiled extension between the launches, which write into tensors they get."""


@dataclass(frozen=True)
class Launch:
    """Something that Llama 4 has computed with the kernels of Triton."""

    use: str
    kind: str
    """Of the weights, or of the KV cache."""
    dtype: str
    run: Callable[[], object]

    def refusal(self, capability: tuple[int, int]) -> str:
        """Return why vLLM does not get as far as this on a GPU; nothing if it does."""
        if capability >= (8, 0):
            return ""
        if self.dtype == "bfloat16":
            return "vLLM has bfloat16 from capability 8.0 on"
        if self.use.startswith("v1-") and v1_wants_ampere():
            return "this release has V1 from capability 8.0 on"
        return ""


def v1_wants_ampere() -> bool:
    """Return whether the release's choice of an engine refuses V1 to older GPUs."""
    args = importlib.import_module("vllm.engine.arg_utils")
    return "Compute Capability < 8.0" in inspect.getsource(args)


def install() -> None:
    """Have the compiled extension's operators do nothing."""
    for library, names in NO_OPS.items():
        for name in names:
            setattr(getattr(torch.ops, library), name, lambda *_, **__: None)


def launches() -> Iterator[Launch]:
    """Return all that this release has."""
    for weights in WEIGHTS:
        for dtype in weights.dtypes if weights.is_offered() else ():
            yield Launch(
                "fused_moe", weights.kind, _name(dtype), partial(fused_moe, weights, dtype)
            )
    for attention in ATTENTION:
        for kind in attention.kv_cache_dtypes if attention.is_offered() else ():
            # Nobody asks for a cache of 8 bits and a model of 32, which take longest to compile.
            for dtype in DTYPES if kind == "auto" else HALF:
                yield Launch(attention.use, kind, _name(dtype), partial(attention.run, dtype, kind))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(*size, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Weights:
    """How a checkpoint holds its experts, or what vLLM makes of them while it loads."""

    kind: str
    dtype: torch.dtype | None = None
    """None: the model's."""
    packed: int = 1
    """Weights of an element."""
    scales: str = ""
    """What shares a scale: tensor, channel or group."""
    zeros: bool = False
    """Whether groups have a zero point."""
    options: tuple[str, ...] = ()
    """Arguments of vLLM's launcher that are true."""
    dtypes: tuple[torch.dtype, ...] = HALF

    def is_offered(self) -> bool:
        """Return whether this release has such experts."""
        parameters = inspect.signature(_fused_moe().fused_experts_impl).parameters
        return set(self.options) <= parameters.keys()

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return what they are to vLLM's launcher."""
        found: dict[str, Any] = dict.fromkeys(self.options, True)
        shapes = {
            "w1": (EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "w2": (EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
        for name, (experts, rows, columns) in shapes.items():
            found[name] = empty(experts, rows, columns // self.packed, dtype=self.dtype or dtype)
            groups = (experts, rows, columns // GROUP)
            if self.scales == "group":
                found[f"{name}_scale"] = empty(*groups, dtype=dtype)
            elif self.scales:
                size = {"tensor": (experts,), "channel": (experts, rows, 1), "row": (experts, rows)}
                found[f"{name}_scale"] = empty(*size[self.scales], dtype=torch.float32)
            if self.zeros:
                zeros = (experts, rows // self.packed, columns // GROUP)
                found[f"{name}_zp"] = empty(*zeros, dtype=torch.uint8)
        if self.scales == "group":
            found["block_shape"] = [0, GROUP]
        return found


WEIGHTS = (
    Weights("unquantised", dtypes=DTYPES),
    Weights("fp8", torch.float8_e4m3fn, scales="tensor", options=("use_fp8_w8a8",)),
    Weights(
        "fp8-channel", torch.float8_e4m3fn, scales="channel",
        options=("use_fp8_w8a8", "per_channel_quant"),
    ),
    Weights(
        "int8-w8a8", torch.int8, scales="channel", options=("use_int8_w8a8", "per_channel_quant")
    ),
    Weights("experts_int8", torch.int8, scales="row", options=("use_int8_w8a16",)),
    Weights(
        "awq-int4", torch.uint8, packed=2, scales="group", zeros=True, options=("use_int4_w4a16",)
    ),
    Weights("gptq-int4", torch.uint8, packed=2, scales="group", options=("use_int4_w4a16",)),
    Weights("gptq-int8", torch.uint8, scales="group", options=("use_int8_w8a16",)),
)  # fmt: skip


def _fused_moe() -> Any:
    return importlib.import_module(FUSED_MOE)


def fused_moe(weights: Weights, dtype: torch.dtype) -> None:
    """Launch the experts of a layer, which Llama 4 picks one of, and weighs before it computes."""
    for tokens in TOKENS:
        _fused_moe().fused_experts_impl(
            empty(tokens, HIDDEN_SIZE, dtype=dtype),
            topk_weights=empty(tokens, 1, dtype=torch.float32),
            topk_ids=empty(tokens, 1, dtype=torch.int32),
            activation="silu",
            apply_router_weight_on_input=True,
            **weights.arguments(dtype),
        )


@dataclass(frozen=True)
class Step:
    """The tensors of a step: a few sequences, each with `new` tokens."""

    dtype: torch.dtype
    kv_cache_dtype: str
    new: int

    @property
    def tokens(self) -> int:
        """Return the tokens of all sequences."""
        return SEQUENCES * self.new

    def rows(self, heads: int) -> torch.Tensor:
        """Return queries, keys or values of all tokens."""
        return empty(self.tokens, heads, HEAD_SIZE, dtype=self.dtype)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Return the dtype in which vLLM holds the cache."""
        return self.dtype if self.kv_cache_dtype == "auto" else torch.uint8

    @property
    def block(self) -> int:
        """Return the tokens of a block of the cache: V1's Triton demands more of them for fp8."""
        return 16 if self.kv_cache_dtype == "auto" else 32

    def metadata(self) -> SimpleNamespace:
        """Return what V1's impls read of a batch, in any release."""
        batch = self.batch()
        is_decode = self.new == 1
        batch.use_cascade = False
        batch.local_attn_metadata = None
        batch.num_decode_tokens = self.tokens if is_decode else 0
        batch.decode_metadata = self.batch() if is_decode else None
        batch.prefill_metadata = None if is_decode else self.batch()
        return batch

    def batch(self) -> SimpleNamespace:
        """Return what attention of any kind reads of a batch."""
        return SimpleNamespace(
            num_actual_tokens=self.tokens,
            max_query_len=self.new,
            query_start_loc=empty(SEQUENCES + 1, dtype=torch.int32),
            max_seq_len=self.block * BLOCKS // SEQUENCES,
            seq_lens=empty(SEQUENCES, dtype=torch.int32),
            block_table=empty(SEQUENCES, BLOCKS // SEQUENCES, dtype=torch.int32),
            slot_mapping=empty(self.tokens, dtype=torch.int64),
            tree_attn_bias=empty(1, 1, dtype=torch.float32),
        )


class One:
    """The scale of queries, of which vLLM demands that it is 1: a fake tensor has no value."""

    def __eq__(self, other: object) -> bool:
        return other == 1.0

    def __hash__(self) -> int:
        return hash(1.0)

    def numel(self) -> int:
        """Return how many values it has."""
        return 1


def v0_prefix(dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """Launch V0's attention of new tokens to what is in the cache."""
    attention = importlib.import_module("vllm.attention.ops.paged_attn").PagedAttention
    step = Step(dtype, kv_cache_dtype, new=32)
    cache = empty(2, BLOCKS, 16 * KV_HEADS * HEAD_SIZE, dtype=step.cache_dtype)
    keys, values = attention.split_kv_cache(cache, KV_HEADS, HEAD_SIZE)
    batch = step.batch()
    attention.forward_prefix(
        step.rows(HEADS),
        step.rows(KV_HEADS),
        step.rows(KV_HEADS),
        kv_cache_dtype,
        keys,
        values,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        batch.max_query_len,
        None,
        None,
        empty(1, dtype=torch.float32),
        empty(1, dtype=torch.float32),
    )


def v1_triton(dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """Launch V1's Triton attention: of prompts and of decodes at once since 0.9.0, apart before."""
    module = importlib.import_module("vllm.v1.attention.backends.triton_attn")
    forward(module.TritonAttentionBackend, dtype, kv_cache_dtype)


def v1_tree(dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """Launch V1's tree attention, of prompts and of decodes."""
    module = importlib.import_module("vllm.v1.attention.backends.tree_attn")
    forward(module.TreeAttentionBackend, dtype, kv_cache_dtype)


def forward(backend: Any, dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """Run a backend of V1 on a step of decodes, and on one of prompts."""
    layer = SimpleNamespace(
        _q_scale=One(),
        _q_scale_float=1.0,
        _k_scale=empty(1, dtype=torch.float32)[0],
        _v_scale=empty(1, dtype=torch.float32)[0],
    )
    made = called_with(
        backend.get_impl_cls(),
        num_heads=HEADS,
        head_size=HEAD_SIZE,
        scale=HEAD_SIZE**-0.5,
        num_kv_heads=KV_HEADS,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype=kv_cache_dtype,
    )
    for new in (1, 32):
        step = Step(dtype, kv_cache_dtype, new)
        sizes = backend.get_kv_cache_shape(BLOCKS, step.block, KV_HEADS, HEAD_SIZE)
        cache = empty(*sizes, dtype=step.cache_dtype)
        made.forward(
            layer,
            step.rows(HEADS),
            step.rows(KV_HEADS),
            step.rows(KV_HEADS),
            cache,
            step.metadata(),
            output=step.rows(HEADS),
        )


@dataclass(frozen=True)
class Attention:
    """Attention that is computed by kernels of Triton."""

    use: str
    run: Callable[[torch.dtype, str], None]
    module: str
    """Of what launches it."""
    kv_cache_dtypes: tuple[str, ...] = KV_CACHE_DTYPES

    def is_offered(self) -> bool:
        """Return whether this release has it."""
        return importlib.util.find_spec(self.module) is not None


ATTENTION = (
    Attention("v0-prefix", v0_prefix, "vllm.attention.backends.xformers"),
    Attention("v1-triton", v1_triton, "vllm.v1.attention.backends.triton_attn"),
    Attention("v1-tree", v1_tree, "vllm.v1.attention.backends.tree_attn", ("auto",)),
)
