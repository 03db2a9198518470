"""The engines that are run: backend, settings, and how near the reference each must come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from llama4_checkpoint import CHUNK, VOCAB
from regress.expected import SAMPLER_MISSING
from regress.releases import LLAMA4, RELEASES, WITH_V0, backend_name, span

from .engine import IMAGE_TOKEN, Settings

NEW_TOKENS = 64
PROMPT_LENGTHS = (40, CHUNK, CHUNK + 1, 150, 250)
"""Below, at, one past and several times the chunk; each outgrows at least one chunk later."""
SOME_ARE_SHORT = (64, 23, 64, 41, 64)
"""Tokens for which some prompts end while others step over a boundary."""
IMAGE_SIDE = 56
"""Pixels: four tiles and one of the whole image."""

V0_XFORMERS = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "XFORMERS"}
V0_FLASH = {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}

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

SMALL = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.15,
    "disable_log_stats": True,
    "seed": 0,
}
"""What leaves room for other engines on the GPU, and captures few graphs."""
FIXED = {
    **SMALL,
    "dtype": "float16",
    "block_size": 16,
    "num_gpu_blocks_override": 512,
    "enable_prefix_caching": False,
}
"""With prompts computed anew, whose log-probabilities V1 gives then too."""


class Checkpoint(Enum):
    """Which of the tiny checkpoints."""

    IMAGES = "images"
    """`Llama4ForConditionalGeneration`, as the released models."""
    DEEP = "deep"
    """The same with twice the layers: halves of it have layers of the same kinds, as halves of the
    released models have."""
    TEXT = "text"
    """`Llama4ForCausalLM`."""
    AWQ = "awq"
    """`Llama4ForCausalLM` with experts of 4 bits."""

    @property
    def reads_images(self) -> bool:
        return self in (Checkpoint.IMAGES, Checkpoint.DEEP)


class Images(Enum):
    """What `limit_mm_per_prompt` says, and whether prompts have an image."""

    ALLOWED = "allowed"
    OFF = "off"
    SHOWN = "shown"


@dataclass(frozen=True)
class Bound:
    """How far an engine may be from the reference."""

    distance: float
    """Largest difference of a token's log-probability."""
    misses: int
    """How many generated tokens need not be the reference's greedy choice, of 320."""
    beyond_first: float | None = None
    """How much farther tokens past the first chunk may be than those in it, which nothing that
    these tests are for can spoil."""


EXACT = Bound(0.3, 5)
BFLOAT16 = Bound(1.0, 40)
"""Its rounding, of a model that was written in float16."""
EIGHT_BITS = Bound(2.0, 100, 0.5)
"""From a reference that reads the same format. Values on the edge of two of its steps are rounded
either way, and attention of this model is pointed: kernels that round queries and weights too cost
0.9 to 1.5 and a quarter of the choices. Global attention costs 9 to 12, and nearly all of them."""


@dataclass(frozen=True)
class Case:
    """One engine."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    bound: Bound = EXACT
    checkpoint: Checkpoint = Checkpoint.IMAGES
    images: Images = Images.OFF
    base: Mapping[str, Any] = field(default_factory=lambda: FIXED)
    """Arguments that `engine_args` add to."""
    is_cached: bool = False
    has_prompt_logprobs: bool = True
    new_tokens: tuple[int, ...] = ()
    """How many tokens each prompt is continued by, if not by as many as the others."""
    gpus: int = 1
    split: str = "tensor"
    """What several GPUs share: the layers (tensor), or the model in stages (pipeline)."""
    executor: str = "mp"
    """What starts the workers of several GPUs: mp (multiprocessing) or ray."""
    needs: str = ""
    """A package that vLLM does not depend on."""
    releases: frozenset[str] = frozenset(RELEASES)
    wrong_on_stock: frozenset[str] = frozenset()
    """Releases of which the stock wheel answers wrong, or dies."""

    @property
    def backend(self) -> str:
        """A part of the module name of the impl that must have served it."""
        name = self.env.get("VLLM_ATTENTION_BACKEND")
        return BACKEND_MODULES[name] if name else ""

    @property
    def max_len(self) -> int:
        return int({**self.base, **self.engine_args}["max_model_len"])

    @property
    def image_side(self) -> int:
        return IMAGE_SIDE if self.images is Images.SHOWN else 0

    def settings(self, model: Path) -> Settings:
        """Prompts of random tokens, the same for every engine of one maximum length."""
        random = torch.Generator().manual_seed(1)
        room = self.max_len - NEW_TOKENS
        lengths = PROMPT_LENGTHS if room >= max(PROMPT_LENGTHS) else (5, 10, 20, 30, 40)
        new_tokens = min(NEW_TOKENS, self.max_len - max(lengths))
        prompts = [torch.randint(10, VOCAB, (n,), generator=random).tolist() for n in lengths]
        args: dict[str, Any] = {**self.base, **self.engine_args}
        if self.checkpoint.reads_images and self.images is Images.OFF:
            args["limit_mm_per_prompt"] = {"image": 0}
        if self.images is Images.SHOWN:
            prompts = [[*each[:20], IMAGE_TOKEN, *each[20:]] for each in prompts]
        if self.gpus > 1:
            args[f"{self.split}_parallel_size"] = self.gpus
            args["distributed_executor_backend"] = self.executor
        return Settings(
            str(model),
            prompts,
            list(self.new_tokens) or [new_tokens] * len(prompts),
            args,
            self.image_side,
            self.is_cached,
            self.has_prompt_logprobs,
        )


BACKEND_MODULES = {
    "XFORMERS": "backends.xformers",
    "FLASH_ATTN": "backends.flash_attn",
    "FLASH_ATTN_VLLM_V1": "v1.attention.backends.flash_attn",
    "TRITON_ATTN_VLLM_V1": "v1.attention.backends.triton_attn",
    "FLEX_ATTENTION": "v1.attention.backends.flex_attention",
    "XFORMERS_VLLM_V1": "v1.attention.backends.xformers",
    "TREE_ATTN": "v1.attention.backends.tree_attn",
    "TRITON_ATTN": "v1.attention.backends.triton_attn",
    "FLASHINFER": "v1.attention.backends.flashinfer",
}


def v0_cases(backend: str, env: Mapping[str, str]) -> list[Case]:
    """What both V0 backends are asked to do."""
    text = Checkpoint.TEXT
    return [
        Case(f"{backend}-eager", env, EAGER),
        Case(f"{backend}-graphs", env),
        Case(f"{backend}-image", env, images=Images.SHOWN),
        Case(f"{backend}-text-eager", env, EAGER, checkpoint=text),
        Case(f"{backend}-text-graphs", env, checkpoint=text),
        Case(
            f"{backend}-chunked-prefill-eager", env, {**CHUNKED_PREFILL, **EAGER}, checkpoint=text
        ),
        Case(f"{backend}-chunked-prefill-graphs", env, CHUNKED_PREFILL, checkpoint=text),
        Case(
            f"{backend}-prefix-caching",
            env,
            PREFIX_CACHING,
            checkpoint=text,
            is_cached=True,
            has_prompt_logprobs=False,
        ),
        Case(f"{backend}-few-at-a-time", env, {"max_num_seqs": 2}, new_tokens=SOME_ARE_SHORT),
        Case(f"{backend}-tensor-parallel", env, gpus=2),
        Case(f"{backend}-ray", env, gpus=2, executor="ray"),
        Case(f"{backend}-pipeline-parallel", env, gpus=2, split="pipeline"),
    ]


XFORMERS_CASES = [
    *v0_cases("xformers", V0_XFORMERS),
    Case("xformers-fp8", V0_XFORMERS, {"kv_cache_dtype": "fp8"}, EIGHT_BITS),
    Case("xformers-fp8-eager", V0_XFORMERS, {"kv_cache_dtype": "fp8", **EAGER}, EIGHT_BITS),
    Case("xformers-fp8_e5m2", V0_XFORMERS, {"kv_cache_dtype": "fp8_e5m2"}, EIGHT_BITS),
    Case("xformers-awq", V0_XFORMERS, {"quantization": "moe_wna16"}, checkpoint=Checkpoint.AWQ),
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
        checkpoint=Checkpoint.TEXT,
        has_prompt_logprobs=False,
    )
]
"""V0 verifies proposed tokens, and takes several steps at once, with FlashAttention only."""

WITHIN_CHUNK = [
    Case(f"{name}-within-chunk", env, {"max_model_len": CHUNK}, Bound(0.3, 320))
    for name, env in (("xformers", V0_XFORMERS), ("flash_attn", V0_FLASH))
]
"""No sequence can outgrow a chunk: stock is right too."""

# Without a block size, which would be asked for like anything else.
ANY_BLOCKS: dict[str, Any] = {"block_size": None, "num_gpu_blocks_override": None}
SELECTED = [
    Case(
        f"selected-{name}",
        engine_args={"kv_cache_dtype": name, **ANY_BLOCKS},
        bound=EIGHT_BITS,
        releases=releases,
    )
    for name, releases in (("fp8", LLAMA4), ("fp8_e5m2", WITH_V0))
]
"""Nothing forced, in float16: V1 FlashAttention, which stock selects on Hopper, fails or misreads
the cache. Without V0, nothing reads e5m2 there."""

TEXT_ONLY_MODE = span("0.10.1")
"""Stock's compiled language model reads embeddings from where others were."""
TEXT_MODEL = span("0.8.4", "0.10.0")
"""Stock serves `Llama4ForCausalLM` with Transformers' model, all of it global."""
IMAGES_BFLOAT16 = span("0.8.3", "0.9.0.1")
"""Stock hands images in bfloat16 to a vision model of another dtype."""
ONE_TOKEN_PIECES = span("0.10.1", "0.10.2")
"""Stock takes the last token of a prompt of one chunk and a token for a decode."""
ON_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() == (9, 0)
"""Kept answers are Hopper's."""
FEW_SCHEDULED = span("0.11.0") if ON_HOPPER else frozenset[str]()
"""Stock's compiled FlashAttention 3 has no room for more chunks than `max_num_seqs`."""


def start_of(
    name: str,
    wrong: frozenset[str] = frozenset(),
    wrong_eager: frozenset[str] = frozenset(),
    args: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[Case]:
    """What people start, with nothing forced: compiled, with CUDA graphs and prefix caching as they
    come; and the same eager. Stock is wrong in the releases `wrong` or `wrong_eager`."""
    fields: dict[str, Any] = {"base": SMALL, "has_prompt_logprobs": False, **more}
    return [
        Case(
            f"default-{name}-{mode}",
            engine_args={**(args or {}), **extra},
            wrong_on_stock=SAMPLER_MISSING | releases,
            **fields,
        )
        for mode, extra, releases in (
            ("graphs", {}, wrong | FEW_SCHEDULED),
            ("eager", EAGER, wrong_eager),
        )
    ]


DEFAULTS = [
    *start_of("images-allowed", IMAGES_BFLOAT16, IMAGES_BFLOAT16, images=Images.ALLOWED),
    *start_of("images-off", wrong=TEXT_ONLY_MODE),
    *start_of("image", IMAGES_BFLOAT16, IMAGES_BFLOAT16, images=Images.SHOWN),
    *start_of("text", TEXT_MODEL, TEXT_MODEL, checkpoint=Checkpoint.TEXT),
    *start_of(
        "bfloat16",
        images=Images.ALLOWED,
        args={"dtype": "bfloat16"},
        bound=BFLOAT16,
    ),
]


def few_graphs(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of up to 512 tokens, as they come, but 10 instead of 67: capturing took half of the time.

    Sizes that are asked for vLLM does not cut to the most tokens of a step.
    """
    most = min(512, args.get("max_num_batched_tokens", 512))
    sizes = [2**n for n in range(10) if 2**n <= most]
    return {"compilation_config": {"cudagraph_capture_sizes": sizes}}


def v1(
    name: str,
    args: Mapping[str, Any] | None = None,
    backend: str = "",
    wrong: frozenset[str] = frozenset(),
    **more: Any,
) -> Case:
    """A case of V1, compiled, with log-probabilities of the prompts."""
    env = {"VLLM_USE_V1": "1"}
    if backend:
        env["VLLM_ATTENTION_BACKEND"] = backend_name(backend)
    if backend == "TRITON_ATTN_VLLM_V1":
        # To 0.8.5 it borrows FlashAttention's metadata builder, which for version 3 plans what
        # Triton lacks.
        env["VLLM_FLASH_ATTN_VERSION"] = "2"
    if backend == "FLASHINFER":
        # Its kernels are built where they are first used, and those of sampling prove nothing.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if more.get("split") == "pipeline":
        # An engine core in the caller's process does not wait for stages.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    args = args or {}
    return Case(
        f"v1-{name}",
        env,
        args if args.get("enforce_eager") else {**few_graphs(args), **args},
        **{"images": Images.ALLOWED, "wrong_on_stock": SAMPLER_MISSING | wrong, **more},
    )


FLASH, TRITON, FLEX = "FLASH_ATTN_VLLM_V1", "TRITON_ATTN_VLLM_V1", "FLEX_ATTENTION"
BACKENDS = [
    case
    for backend, name, args, wrong, releases in (
        (FLASH, "flash_attn", {}, frozenset[str](), LLAMA4),
        (TRITON, "triton", {}, frozenset[str](), LLAMA4),
        (FLEX, "flex", {}, span("0.9.1"), span("0.9.1")),
        ("TREE_ATTN", "tree", {}, ONE_TOKEN_PIECES, span("0.10.1")),
        ("XFORMERS_VLLM_V1", "xformers", ANY_BLOCKS, ONE_TOKEN_PIECES, span("0.10.1")),
    )
    for case in (
        v1(
            f"{name}-graphs",
            args,
            backend,
            wrong | FEW_SCHEDULED if backend == FLASH else wrong,
            releases=releases,
        ),
        v1(f"{name}-eager", {**args, **EAGER}, backend, wrong, releases=releases),
    )
]
"""Every V1 backend that the patches list as right, but FlashInfer, which is no dependency."""

FLASHINFER = [
    v1(
        f"flashinfer-{name}",
        # It is warmed up with 9 requests, whatever the model, and dies if they are too many.
        {"max_num_seqs": 9, **args},
        "FLASHINFER",
        bound=bound,
        wrong=span("0.11.0"),
        needs="flashinfer",
        releases=span("0.11.0"),
    )
    for name, args, bound in (
        ("graphs", {}, EXACT),
        ("eager", EAGER, EXACT),
        ("fp8", {"kv_cache_dtype": "fp8"}, EIGHT_BITS),
        ("fp8_e5m2", {"kv_cache_dtype": "fp8_e5m2"}, EIGHT_BITS),
    )
]
"""A first step has more chunks than `max_num_seqs`, for which stock's buffers are too small."""

V1_CASES = [
    *BACKENDS,
    *FLASHINFER,
    v1("blocks-of-64-xformers", {"block_size": 64}, "XFORMERS_VLLM_V1", ONE_TOKEN_PIECES,
       releases=span("0.10.1")),
    v1("chunked-prefill", {"max_num_batched_tokens": 96}),
    v1("chunked-prefill-eager", {"max_num_batched_tokens": 96, **EAGER}),
    v1("few-at-a-time", {"max_num_seqs": 2}, wrong=FEW_SCHEDULED, new_tokens=SOME_ARE_SHORT),
    v1(
        "prefix-caching",
        PREFIX_CACHING,
        wrong=FEW_SCHEDULED,
        is_cached=True,
        has_prompt_logprobs=False,
    ),
    v1("tensor-parallel", wrong=FEW_SCHEDULED, gpus=2),
    v1("ray", wrong=FEW_SCHEDULED, gpus=2, executor="ray"),
    v1(
        "pipeline-parallel",
        gpus=2,
        split="pipeline",
        checkpoint=Checkpoint.DEEP,
        # Stages of V1 give more or fewer of a prompt than it has tokens: 0.9.2, 0.10.1.1.
        has_prompt_logprobs=False,
        wrong=FEW_SCHEDULED,
        releases=span("0.9.0"),
    ),
    v1(
        "awq",
        {"quantization": "moe_wna16"},
        checkpoint=Checkpoint.AWQ,
        wrong=TEXT_MODEL | FEW_SCHEDULED,
    ),
    v1(
        "fp8-triton",
        {"kv_cache_dtype": "fp8", "block_size": 32},
        TRITON,
        bound=EIGHT_BITS,
        releases=span("0.9.2"),
    ),
    v1(
        "fp8-flash_attn",
        {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
        FLASH,
        wrong=FEW_SCHEDULED,
        bound=EIGHT_BITS,
        releases=span("0.9.2"),
    ),
]  # fmt: skip
