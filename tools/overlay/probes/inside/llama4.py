"""A Llama 4 so small that it has one layer with chunks, and an engine's config for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .tree import Loose, Tree, UnknownError

CHUNK, MAX_LEN, BLOCK, HEADS, HEAD_SIZE = 4, 16, 2, 2, 32
LLAMA4 = "vllm.model_executor.models.llama4"
LAYER, CHUNKED = "vllm.attention.layer", "vllm.attention.layers.chunked_local_attention"


def engine_config(tree: Tree) -> Any:
    """A VllmConfig, as far as anything asks for it."""
    model = SimpleNamespace(
        attention_chunk_size=CHUNK,
        max_model_len=MAX_LEN,
        dtype=tree.torch.bfloat16,
        model="llama4",
        tokenizer="llama4",
        quantization=None,
        is_multimodal_model=True,
        model_impl="auto",
        architectures=["Llama4ForConditionalGeneration"],
        registry=SimpleNamespace(
            get_supported_archs=lambda: ["Llama4ForConditionalGeneration"],
        ),
        get_head_size=lambda: 128,
        get_num_attention_heads=lambda *_: HEADS,
        get_num_kv_heads=lambda *_: HEADS,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype="auto", num_gpu_blocks=8,
                                     sliding_window=None, is_attention_free=False,
                                     calculate_kv_scales=False),
        scheduler_config=SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=MAX_LEN,
                                         chunked_prefill_enabled=True),
        parallel_config=Loose(pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}, full_cuda_graph=False),
        speculative_config=None,
    )  # fmt: skip


def attention_module(tree: Tree, **instead: Any) -> Any:
    """Llama4Attention, made for a layer with chunks; `instead` stands for what it makes.

    Raises:
        UnknownError: there is no such class.
    """
    config = SimpleNamespace(
        no_rope_layers=[1],
        use_qk_norm=True,
        head_dim=HEAD_SIZE,
        attn_temperature_tuning=0,
        rms_norm_eps=1e-5,
        attention_chunk_size=CHUNK,
        model_type="llama4",
        rope_parameters={},
    )
    unit = tree.unit(LLAMA4)
    unit.set(
        extract_layer_index=lambda _: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
        **instead,
    )
    return unit.take("Llama4Attention")(
        config=config, hidden_size=8, num_heads=HEADS, num_kv_heads=HEADS, prefix="layers.0",
        cache_config=engine_config(tree).cache_config,
    )  # fmt: skip


class Impl:
    """In place of an attention impl: it takes anything, and remembers it."""

    def __init__(self, *_: Any, use_irope: bool = False, **__: Any) -> None:
        self.given = {"use_irope": use_irope}


def chunked_layer(tree: Tree, use_v1: bool) -> dict[str, Any]:
    """What the impl of a layer with chunks is told."""
    backend, config = Backend(), engine_config(tree)
    real = [LAYER, *([CHUNKED] if tree.path(CHUNKED) else [])]
    made = tree.with_(
        *real,
        vllm__envs__VLLM_USE_V1=use_v1,
        vllm__envs__Q_SCALE_CONSTANT=1,
        vllm__envs__K_SCALE_CONSTANT=1,
        vllm__envs__V_SCALE_CONSTANT=1,
        vllm__config__get_current_vllm_config=lambda: config,
        vllm__attention__selector__get_attn_backend=lambda *_, **__: backend,
        vllm__attention__selector__backend_name_to_enum=lambda name: name,
        vllm__utils__supports_kw=lambda *_: True,
        vllm__platforms__current_platform=SimpleNamespace(
            is_cuda_alike=lambda: True,
            is_cpu=lambda: False,
            opaque_attention_op=lambda: True,
        ),
        vllm__v1__attention__backends__utils__subclass_attention_backend=lambda *_, **__: backend,
        vllm__v1__attention__backends__utils__subclass_attention_metadata_builder=(
            lambda *_, **__: Builder
        ),
    )
    made.give("vllm.attention.Attention", made.unit(LAYER).take("Attention"))
    layer = attention_module(made).attn
    impl = getattr(layer, "impl", None)
    if not isinstance(impl, Impl):
        raise UnknownError("no attention layer is made")
    return impl.given


class Builder:
    """In place of a backend's metadata builder."""


class Backend:
    """In place of an attention backend."""

    accept_output_buffer = True
    get_impl_cls = staticmethod(lambda: Impl)
    get_builder_cls = staticmethod(lambda: Builder)
    get_name = staticmethod(lambda: "any")
