"""The engines that are run: backend, settings, and how near the reference each must come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama4_checkpoint import CHUNK, VOCAB

from .engine import Settings

NEW_TOKENS = 64
PROMPT_LENGTHS = (40, CHUNK, CHUNK + 1, 150, 250)
"""Below, at, one past and several times the chunk; each outgrows at least one chunk later."""

V0_XFORMERS = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "XFORMERS"}
V0_FLASH = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}
V1_TRITON = {
    "VLLM_USE_V1": "1",
    "VLLM_ATTENTION_BACKEND": "TRITON_ATTN_VLLM_V1",
    # It borrows FlashAttention's metadata builder, which for version 3 plans what Triton lacks.
    "VLLM_FLASH_ATTN_VERSION": "2",
}

EAGER = {"enforce_eager": True}
CHUNKED_PREFILL = {"enable_chunked_prefill": True, "max_num_batched_tokens": 96}
PREFIX_CACHING = {"enable_prefix_caching": True}
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
        "disable_logprobs": False,
    }
}


@dataclass(frozen=True)
class Bound:
    """How far an engine may be from the reference."""

    distance: float
    """Largest difference of a token's log-probability."""
    agreement: int
    """Generated tokens, of 320, that are the reference's greedy choice."""


FP16 = Bound(0.3, 315)
FP8 = Bound(6.0, 180)
"""A cache of 8 bits costs this model, whose attention is so pointed, that much: some 2 to 4, and a
quarter of the tokens. Global attention costs 9 to 12, and nearly all of them."""


@dataclass(frozen=True)
class Case:
    """One engine."""

    name: str
    env: Mapping[str, str]
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    bound: Bound = FP16
    is_multimodal: bool = True
    is_cached: bool = False
    has_prompt_logprobs: bool = True
    gpus: int = 1

    @property
    def backend(self) -> str:
        """A part of the module name of the impl that must have served it."""
        return {
            "XFORMERS": "backends.xformers",
            "FLASH_ATTN": "backends.flash_attn",
            "TRITON_ATTN_VLLM_V1": "backends.triton_attn",
            None: "",
        }[self.env.get("VLLM_ATTENTION_BACKEND")]

    @property
    def max_len(self) -> int:
        return int(self.engine_args.get("max_model_len", 512))

    def settings(self, model: Path) -> Settings:
        """Prompts of random tokens, the same for every engine of one maximum length."""
        random = torch.Generator().manual_seed(1)
        room = self.max_len - NEW_TOKENS
        lengths = PROMPT_LENGTHS if room >= max(PROMPT_LENGTHS) else (5, 10, 20, 30, 40)
        new_tokens = min(NEW_TOKENS, self.max_len - max(lengths))
        prompts = [torch.randint(10, VOCAB, (n,), generator=random).tolist() for n in lengths]
        args: dict[str, Any] = dict(self.engine_args)
        if self.is_multimodal:
            args["limit_mm_per_prompt"] = {"image": 0}
        if self.gpus > 1:
            args["tensor_parallel_size"] = self.gpus
        return Settings(
            str(model),
            prompts,
            new_tokens,
            args,
            self.is_cached,
            self.has_prompt_logprobs,
        )


def v0_cases(backend: str, env: Mapping[str, str]) -> list[Case]:
    """What both V0 backends are asked to do."""
    return [
        Case(f"{backend}-eager", env, EAGER),
        Case(f"{backend}-graphs", env),
        Case(f"{backend}-text-eager", env, EAGER, is_multimodal=False),
        Case(f"{backend}-text-graphs", env, is_multimodal=False),
        Case(
            f"{backend}-chunked-prefill-eager",
            env,
            {**CHUNKED_PREFILL, **EAGER},
            is_multimodal=False,
        ),
        Case(f"{backend}-chunked-prefill-graphs", env, CHUNKED_PREFILL, is_multimodal=False),
        Case(
            f"{backend}-prefix-caching",
            env,
            PREFIX_CACHING,
            is_multimodal=False,
            is_cached=True,
            has_prompt_logprobs=False,
        ),
        # FlashAttention reads a cache of 8 bits in bfloat16 models only.
        Case(f"{backend}-fp8", env, {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, FP8),
        Case(f"{backend}-tensor-parallel", env, gpus=2),
    ]


XFORMERS_CASES = [
    *v0_cases("xformers", V0_XFORMERS),
    Case("xformers-fp8-half", V0_XFORMERS, {"kv_cache_dtype": "fp8"}, FP8),
    Case("xformers-fp8-eager", V0_XFORMERS, {"kv_cache_dtype": "fp8", **EAGER}, FP8),
    Case("xformers-fp8_e5m2", V0_XFORMERS, {"kv_cache_dtype": "fp8_e5m2"}, FP8),
    Case(
        "xformers-fp8-chunked-prefill",
        V0_XFORMERS,
        {"kv_cache_dtype": "fp8", **CHUNKED_PREFILL},
        FP8,
        is_multimodal=False,
    ),
]

FLASH_CASES = v0_cases("flash_attn", V0_FLASH)

MULTI_STEP = [
    Case("flash_attn-multi-step-eager", V0_FLASH, {"num_scheduler_steps": 8, **EAGER}),
    Case("flash_attn-multi-step-graphs", V0_FLASH, {"num_scheduler_steps": 8}),
]
SPECULATIVE = [
    Case(
        "flash_attn-speculative",
        V0_FLASH,
        {**NGRAM, **EAGER},
        is_multimodal=False,
        has_prompt_logprobs=False,
    )
]
"""V0 verifies proposed tokens, and takes several steps at once, with FlashAttention only."""

WITHIN_CHUNK = [
    Case(f"{name}-within-chunk", env, {"max_model_len": CHUNK}, Bound(0.3, 0))
    for name, env in (("xformers", V0_XFORMERS), ("flash_attn", V0_FLASH))
]
"""No sequence can outgrow a chunk: stock is right too."""

# Without a block size, which would be asked for like anything else.
ANY_BLOCKS: dict[str, Any] = {"block_size": None, "num_gpu_blocks_override": None}
SELECTED = [
    Case(f"selected-{name}", {}, {"kv_cache_dtype": name, **ANY_BLOCKS, **EAGER}, FP8)
    for name in ("fp8", "fp8_e5m2")
]
"""Nothing forced, in float16: V1 FlashAttention, which stock selects on Hopper, fails or misreads
the cache."""

V1_CASES = [Case("v1-triton", V1_TRITON, EAGER)]
"""The yardstick: V1 has chunked local attention, and comes this near the reference."""
