"""Which kernels Llama 4 launches, unquantised, and where they are.

From vLLM's sources, 0.8.3 to 0.10.2. Not in the list, since nothing launches them for Llama 4: the
router's `topkGatingSoftmax` (it brings a routing function of its own, in torch), `moe_sum_kernel`
(one expert a token, which torch sums), and Marlin, Machete and CUTLASS (quantised checkpoints).
What runs in Triton has no code in a library.
"""

from __future__ import annotations

from dataclasses import dataclass

C, MOE_C = "vllm/_C.abi3.so", "vllm/_moe_C.abi3.so"
FA2, FA3 = (f"vllm/vllm_flash_attn/_vllm_fa{version}_C.abi3.so" for version in (2, 3))


@dataclass(frozen=True)
class Need:
    """Kernels that something needs together."""

    name: str
    """What for, in a few words."""
    library: str
    """Its path in the wheel."""
    kernels: tuple[str, ...]
    """Function or, of CUTLASS, struct, without namespaces. A release has some of them: names come
    and go."""
    why: str
    """When Llama 4 launches them."""
    backends: tuple[str, ...] = ()
    """Attention impls that need it, as `matrix.Outcome.backend` has them; empty: all do."""
    hopper: bool | None = None
    """Needed on major capability 9 alone, or on all others alone; None: everywhere."""
    optional: bool = False
    """Whether a setting asks for it: without, nothing launches them."""

    def is_needed(self, backend: str, capability: str) -> bool:
        """Whether the attention impl `backend` launches them on a GPU of that capability."""
        is_hopper = capability.startswith("9.")
        return (not self.backends or backend in self.backends) and self.hopper in (None, is_hopper)


NEEDS = (
    Need(
        "layers", C,
        ("rms_norm_kernel", "fused_add_rms_norm_kernel", "rotary_embedding_kernel",
         "act_and_mul_kernel"),
        "RMSNorm, RoPE and SiluAndMul are custom operators: V0 calls them in every layer, V1 where "
        "torch.compile is off; the MoE layer calls silu_and_mul in any case.",
    ),
    Need(
        "KV cache", C, ("reshape_and_cache_kernel", "reshape_and_cache_flash_kernel"),
        "Every attention backend writes keys and values to the cache with one of the two, which "
        "are compiled from one file.",
    ),
    Need(
        "paged attention", C,
        ("paged_attention_v1_kernel", "paged_attention_v2_kernel",
         "paged_attention_v2_reduce_kernel"),
        "V0 XFormers decodes with v1 up to 8192 tokens, and with v2 past them.",
        ("xformers.XFormersImpl",),
    ),
    Need(
        "MoE alignment", MOE_C,
        ("moe_align_block_size_kernel", "moe_align_block_size_global_mem_kernel",
         "moe_align_block_size_small_batch_expert_kernel", "count_and_sort_expert_tokens_kernel"),
        "Tokens are sorted by expert before the Triton kernel; which of them does it goes by the "
        "number of experts (16 or 128) and of tokens.",
    ),
    Need(
        "FlashAttention 2", FA2,
        ("flash_fwd_kernel", "flash_fwd_splitkv_kernel", "flash_fwd_splitkv_combine_kernel"),
        "FlashAttention, V0 and V1, on every GPU but those of major capability 9.",
        ("flash_attn.FlashAttentionImpl", "v1.flash_attn.FlashAttentionImpl"), hopper=False,
    ),
    Need(
        "FlashAttention 3", FA3,
        ("FlashAttnFwdSm90", "FlashAttnFwdCombine", "prepare_varlen_num_blocks_kernel"),
        "FlashAttention, V0 and V1, on major capability 9. FlashAttnFwdSm90 is empty in the cubin "
        "of 8.0, where nothing chooses it.",
        ("flash_attn.FlashAttentionImpl", "v1.flash_attn.FlashAttentionImpl"), hopper=True,
    ),
    Need(
        "fp8 queries", C, ("scaled_fp8_quant_kernel", "scaled_fp8_quant_kernel_strided"),
        "With an fp8 KV cache, backends that compute in fp8 quantise queries, and V0 "
        "FlashAttention keys and values too.",
        optional=True,
    ),
    Need(
        "all-reduce", C, ("cross_device_reduce_1stage", "cross_device_reduce_2stage"),
        "Tensor parallel, over NVLink or two GPUs, unless --disable-custom-all-reduce is set.",
        optional=True,
    ),
)  # fmt: skip


def names_in(library: str) -> frozenset[str]:
    """What is looked for in a library."""
    return frozenset(name for need in NEEDS if need.library == library for name in need.kernels)


#: The libraries, each once.
LIBRARIES = tuple(dict.fromkeys(need.library for need in NEEDS))
