"""Which kernels Llama 4 launches, and where they are.

From vLLM's sources, 0.8.3 to 0.11.0. Not in the list, since nothing launches them for Llama 4: the
router's `topkGatingSoftmax` (it brings a routing function of its own, in torch) and
`moe_sum_kernel` (one expert a token, which torch sums). What runs in Triton is in no library.
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
    operators: tuple[str, ...] = ()
    """vLLM's operators that launch them, for quantised weights."""
    majors: tuple[int, ...] = ()
    """Major capabilities on which the operators launch them; empty: on all."""
    is_choice: bool = False
    """Whether the operator takes those of the kernels that the GPU can run."""

    def is_needed(self, backend: str, capability: str) -> bool:
        """Whether the attention impl `backend` launches them on a GPU of that capability."""
        is_hopper = capability.startswith("9.")
        return (not self.backends or backend in self.backends) and self.hopper in (None, is_hopper)

    def is_launched(self, operator: str, capability: str) -> bool:
        """Whether an operator launches them on a GPU of that capability."""
        major = int(capability.partition(".")[0])
        return operator in self.operators and (not self.majors or major in self.majors)


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


_BEFORE_HOPPER, _FROM_HOPPER = (7, 8), (9, 10, 11, 12)

#: What quantised weights need beside. A release has some of them.
QUANTISED = (
    Need(
        "Marlin", C, ("Marlin", "gptq_marlin_repack_kernel", "awq_marlin_repack_kernel"),
        "Linear layers of 4 and 8 bits, and of fp8 where the GPU has none, from capability 8.0 on.",
        operators=("gptq_marlin_gemm", "fp8_marlin_gemm", "gptq_marlin_repack",
                   "awq_marlin_repack"),
    ),
    Need(
        "Marlin's experts", MOE_C, ("Marlin", "MarlinMoE"),
        "Experts in fp8 where the GPU has none, since 0.9.0.",
        operators=("moe_wna16_marlin_gemm", "marlin_gemm_moe"),
    ),
    Need(
        "experts of 4 bits", MOE_C, ("moe_wna16_gemm_kernel",),
        "moe_wna16, for few tokens; for many it is Triton's.", operators=("moe_wna16_gemm",),
    ),
    Need(
        "AWQ", C, ("gemm_forward_4bit_cuda_m16nXk32", "dequantize_weights"),
        "Linear layers, where it is not Marlin.", operators=("awq_gemm", "awq_dequantize"),
    ),
    Need(
        "GPTQ", C,
        ("gemm_half_q_half_gptq_4bit_kernel", "gemm_half_q_half_gptq_8bit_kernel",
         "reconstruct_exllama_4bit_kernel", "reconstruct_exllama_8bit_kernel",
         "shuffle_4bit_kernel", "shuffle_8bit_kernel"),
        "Linear layers, where it is not Marlin.", operators=("gptq_gemm", "gptq_shuffle"),
    ),
    Need(
        "Machete", C, ("prepack_B_kernel",),
        "Linear layers of 4 and 8 bits, on major capability 9, in early releases on later ones.",
        operators=("machete_prepack_B", "machete_mm"),
    ),
    Need(
        "columns in GPTQ's order", C, ("permute_cols_kernel",),
        "Linear layers of GPTQ with act order, before Machete.",
        operators=("permute_cols",), is_choice=True,
    ),
    Need(
        "AllSpark", C,
        ("ampere_hgemm_W8A16_perc_f16_f16_MtilexNtilex32_hmma16816_multistage_AN_BTN32K16_CN_"
         "splitk_kernel", "rearrange_kn_weight_as_n32k16_order_ldg16_kernel"),
        "Linear layers of 8 bits, a scale an output, on major capability 8.",
        operators=("allspark_repack_weight", "allspark_w8a16_gemm",
                   "rearrange_kn_weight_as_n32k16_order"),
    ),
    Need(
        "fp8 inputs", C,
        ("scaled_fp8_quant_kernel", "scaled_fp8_quant_kernel_strided",
         "scaled_fp8_quant_kernel_strided_dynamic", "dynamic_per_token_scaled_fp8_quant_kernel",
         "dynamic_per_token_scaled_fp8_quant_kernel_strided"),
        "fp8 experts and linear layers, and weights that are made fp8 while they load.",
        operators=("static_scaled_fp8_quant", "dynamic_scaled_fp8_quant",
                   "dynamic_per_token_scaled_fp8_quant"),
    ),
    Need(
        "int8 inputs", C, ("static_scaled_int8_quant_kernel", "dynamic_scaled_int8_quant_kernel"),
        "Linear layers of 8 bits, inputs too.",
        operators=("static_scaled_int8_quant", "dynamic_scaled_int8_quant"),
    ),
    Need(
        "inputs in blocks", C, ("per_token_group_quant_8bit_kernel",),
        "fp8 in blocks; Triton's in early releases.",
        operators=("per_token_group_fp8_quant", "per_token_group_quant_int8"),
    ),
    Need(
        "CUTLASS 2 products", C, ("enable_sm75_to_sm80", "enable_sm80_to_sm89",
                                  "enable_sm89_to_sm90"),
        "Linear layers in fp8 or int8, up to capability 8.9.",
        operators=("cutlass_scaled_mm", "cutlass_scaled_mm.int8", "cutlass_scaled_mm_azp"),
        majors=_BEFORE_HOPPER, is_choice=True,
    ),
    Need(
        "CUTLASS 3 products", C,
        ("cutlass_3x_gemm", "MainloopSm100TmaUmmaWarpSpecialized",
         "MainloopSm120TmaWarpSpecialized"),
        "Linear layers in fp8, from capability 9.0 on.",
        operators=("cutlass_scaled_mm",), majors=_FROM_HOPPER, is_choice=True,
    ),
    Need(
        "CUTLASS 3 products in int8", C, ("cutlass_3x_gemm",),
        "Linear layers in int8, on major capability 9: later ones refuse it.",
        operators=("cutlass_scaled_mm.int8", "cutlass_scaled_mm_azp"), majors=_FROM_HOPPER,
    ),
    Need(
        "CUTLASS products in blocks", C, ("cutlass_3x_gemm_fp8_blockwise",),
        "Linear layers in fp8 in blocks, from capability 9.0 on.",
        operators=("cutlass_scaled_mm.block",), is_choice=True,
    ),
    Need(
        "CUTLASS experts", C, ("cutlass_3x_group_gemm",),
        "Experts in fp8 with a scale an output, on major capability 9, since 0.10.0 on 10.",
        operators=("cutlass_moe_mm",), is_choice=True,
    ),
    Need(
        "sizes of CUTLASS experts", C,
        ("compute_problem_sizes", "compute_expert_offsets", "compute_arg_sorts"),
        "Before CUTLASS experts.",
        operators=("get_cutlass_moe_mm_data", "get_cutlass_moe_mm_problem_sizes"), is_choice=True,
    ),
    Need(
        "tokens by expert", MOE_C,
        ("expandInputRowsKernel", "finalizeMoeRoutingKernel", "shuffleInputRowsKernel"),
        "Around CUTLASS experts.",
        operators=("moe_permute", "moe_unpermute", "shuffle_rows"),
    ),
)  # fmt: skip


def of_operator(operator: str) -> tuple[Need, ...]:
    """What an operator launches, for quantised weights, on some GPU."""
    return tuple(need for need in QUANTISED if operator in need.operators)


def names_in(library: str) -> frozenset[str]:
    """What is looked for in a library."""
    return frozenset(
        name for need in (*NEEDS, *QUANTISED) if need.library == library for name in need.kernels
    )


#: The libraries, each once.
LIBRARIES = tuple(dict.fromkeys(need.library for need in NEEDS))
