"""What stock vLLM does with Llama 4, by release: all the data that the tests are judged by.

A test is FAIL_TO_PASS for a release where this table says that stock refuses the keyword; the
tests derive their `fail_to_pass` markers from here and state no release of their own. After
porting to another release, this is the file to edit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from .releases import LLAMA4, in_order, span


@dataclass(frozen=True)
class Impl:
    """An attention implementation that Llama 4 can be given."""

    key: str
    """Name in test ids: the engine, then the module."""
    module: str
    cls: str
    backend: str
    """The `AttentionBackend` class beside it, which the attention layer asks for the impl."""
    exists: frozenset[str]
    rejects: frozenset[str] = frozenset()
    """Releases whose layers pass `use_irope` to this impl while its stock `__init__` has none."""
    stubs: tuple[str, ...] = ()
    """Third-party packages it imports that only its own hardware has."""
    env: dict[str, str] = field(default_factory=dict)
    swallows: frozenset[str] = frozenset()
    """Releases whose stock `__init__` takes any keyword."""
    refuses: frozenset[str] = frozenset()
    """Releases that must not start with it if a sequence can outgrow a chunk."""
    no_chunks: frozenset[str] = frozenset()
    """Releases whose chunked layers stock cannot construct with this impl, for another fault."""

    @property
    def engine(self) -> str:
        """Return "v0" or "v1"."""
        return self.key.partition("-")[0]

    @property
    def passed(self) -> frozenset[str]:
        """Releases whose attention layer passes `use_irope` on to this impl.

        0.10.0 keeps the flag on the layer for V1, 0.10.1 replaced it by ChunkedLocalAttention.
        """
        last = "0.10.0" if self.engine == "v0" else "0.9.2"
        return self.exists & span("0.8.3", last)


V0 = "vllm.attention.backends."
V1 = "vllm.v1.attention.backends."

IMPLS = (
    Impl(
        "v0-xformers",
        V0 + "xformers",
        "XFormersImpl",
        "XFormersBackend",
        exists=span("0.8.2", "0.10.2"),
        rejects=span("0.8.3", "0.8.3"),
    ),
    Impl(
        "v0-flash_attn",
        V0 + "flash_attn",
        "FlashAttentionImpl",
        "FlashAttentionBackend",
        exists=span("0.8.2", "0.10.2"),
        rejects=span("0.8.3", "0.8.3"),
    ),
    Impl(
        "v0-flashinfer",
        V0 + "flashinfer",
        "FlashInferImpl",
        "FlashInferBackend",
        exists=span("0.8.2", "0.10.1.1"),
        rejects=span("0.8.3", "0.8.3"),
        refuses=span("0.8.3", "0.10.1.1"),
        stubs=("flashinfer",),
    ),
    Impl(
        "v0-rocm_flash_attn",
        V0 + "rocm_flash_attn",
        "ROCmFlashAttentionImpl",
        "ROCmFlashAttentionBackend",
        exists=span("0.8.2", "0.10.2"),
        rejects=span("0.8.3", "0.8.3"),
        # By default it imports a kernel that Triton tunes for the GPU found at that moment.
        env={"VLLM_USE_TRITON_FLASH_ATTN": "0"},
    ),
    Impl(
        "v0-torch_sdpa",
        V0 + "torch_sdpa",
        "TorchSDPABackendImpl",
        "TorchSDPABackend",
        exists=span("0.8.2", "0.9.2"),
        rejects=span("0.8.3", "0.8.3"),
    ),
    Impl(
        "v0-pallas",
        V0 + "pallas",
        "PallasAttentionBackendImpl",
        "PallasAttentionBackend",
        exists=span("0.8.2", "0.9.2"),
        rejects=span("0.8.3", "0.8.3"),
        stubs=("torch_xla",),
    ),
    Impl(
        "v0-hpu_attn",
        V0 + "hpu_attn",
        "HPUAttentionImpl",
        "HPUAttentionBackend",
        exists=span("0.8.2", "0.9.2"),
        rejects=span("0.8.3", "0.8.3"),
        stubs=("habana_frameworks", "vllm_hpu_extension"),
    ),
    Impl(
        "v0-ipex_attn",
        V0 + "ipex_attn",
        "IpexAttnBackendImpl",
        "IpexAttnBackend",
        exists=span("0.8.2", "0.9.2"),
        rejects=span("0.8.3", "0.8.3"),
        stubs=("intel_extension_for_pytorch",),
    ),
    Impl(
        "v1-flash_attn",
        V1 + "flash_attn",
        "FlashAttentionImpl",
        "FlashAttentionBackend",
        exists=span("0.8.2"),
    ),
    Impl(
        "v1-triton_attn",
        V1 + "triton_attn",
        "TritonAttentionImpl",
        "TritonAttentionBackend",
        exists=span("0.8.2"),
    ),
    Impl(
        "v1-pallas",
        V1 + "pallas",
        "PallasAttentionBackendImpl",
        "PallasAttentionBackend",
        exists=span("0.8.2"),
        rejects=span("0.8.3", "0.8.3"),
        stubs=("torch_xla",),
        # ChunkedLocalAttention subclasses the metadata builder of a backend; Pallas has none.
        no_chunks=span("0.10.1"),
    ),
    Impl(
        "v1-flashinfer",
        V1 + "flashinfer",
        "FlashInferImpl",
        "FlashInferBackend",
        exists=span("0.8.5"),
        rejects=span("0.8.5", "0.9.0.1"),
        stubs=("flashinfer",),
    ),
    Impl(
        "v1-flex_attention",
        V1 + "flex_attention",
        "FlexAttentionImpl",
        "FlexAttentionBackend",
        exists=span("0.9.1"),
        rejects=span("0.9.1", "0.9.2"),
        swallows=span("0.10.2"),
    ),
    Impl(
        "v1-rocm_aiter_fa",
        V1 + "rocm_aiter_fa",
        "AiterFlashAttentionImpl",
        "AiterFlashAttentionBackend",
        exists=span("0.9.2"),
        stubs=("aiter",),
    ),
    Impl(
        "v1-cpu_attn",
        V1 + "cpu_attn",
        "TorchSDPABackendImpl",
        "TorchSDPABackend",
        # 0.9.1 and 0.9.2 have the module, with the class of v0-torch_sdpa.
        exists=span("0.10.0"),
    ),
    Impl(
        "v1-xformers",
        V1 + "xformers",
        "XFormersAttentionImpl",
        "XFormersAttentionBackend",
        exists=span("0.10.1"),
    ),
    Impl(
        "v1-tree_attn",
        V1 + "tree_attn",
        "TreeAttentionImpl",
        "TreeAttentionBackend",
        exists=span("0.10.1"),
    ),
    Impl(
        "v1-rocm_attn",
        V1 + "rocm_attn",
        "RocmAttentionImpl",
        "RocmAttentionBackend",
        exists=span("0.11.0"),
    ),
)

BY_KEY = {impl.key: impl for impl in IMPLS}

UNREACHABLE = {
    V0 + "mla.": "multi-head latent attention, for models with use_mla",
    V0 + "flashmla": "multi-head latent attention, for models with use_mla",
    V0 + "triton_mla": "multi-head latent attention, for models with use_mla",
    V0 + "cpu_mla": "multi-head latent attention, for models with use_mla",
    V0 + "rocm_aiter_mla": "multi-head latent attention, for models with use_mla",
    V1 + "mla.": "multi-head latent attention, for models with use_mla",
    V0 + "abstract": "the base classes",
    V0 + "blocksparse_attn": "for layers with blocksparse_params, which Llama 4 does not set",
    V0 + "placeholder_attn": "for models without attention",
    V0 + "dual_chunk_flash_attn": "asserts a dual_chunk_attention_config, which Llama 4 lacks",
    V0 + "differential_flash_attn": "asserts a differential_flash_attention_config likewise",
}
"""Module prefixes of impls that a Llama 4 layer is never given, and why."""


@dataclass(frozen=True)
class Scenario:
    """One way of starting the engine on a CUDA machine, and where each release takes it."""

    name: str
    why: str
    capability: tuple[int, int]
    outcomes: tuple[tuple[frozenset[str], str], ...]
    """Releases, and the key of the impl that they choose."""
    engine_args: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    stubs: tuple[str, ...] = ()
    within_chunk: frozenset[str] = frozenset()
    """Releases that patched take this way only as far as one chunk goes."""

    def outcome(self, release: str) -> str | None:
        """Return the key of the impl that `release` chooses.

        None where it refuses the configuration, or does not know it.
        """
        found = [outcome for releases, outcome in self.outcomes if release in releases]
        if len(found) > 1:
            raise ValueError(f"{self.name} has {len(found)} outcomes for {release}")
        return found[0] if found else None

    @property
    def rejects(self) -> dict[str, str]:
        """Return, by release, the class whose stock `__init__` raises the TypeError."""
        return {
            release: BY_KEY[outcome].cls
            for releases, outcome in self.outcomes
            for release in releases & BY_KEY[outcome].rejects
        }


SCENARIOS = (
    Scenario(
        "turing",
        "capability below 8.0 has no FlashAttention, and before 0.10.2 no V1 either",
        capability=(7, 5),
        engine_args={"dtype": "half"},
        outcomes=(
            (span("0.8.3", "0.10.1.1"), "v0-xformers"),
            (span("0.10.2"), "v1-flex_attention"),
        ),
    ),
    Scenario(
        "ampere-fp8-kv",
        "only FlashAttention 3, on Hopper, takes an fp8 KV cache in V1",
        capability=(8, 6),
        engine_args={"kv_cache_dtype": "fp8"},
        outcomes=((span("0.8.3", "0.10.2"), "v0-xformers"),),
    ),
    Scenario(
        "ampere-default",
        "nothing forced: what most users run",
        capability=(8, 0),
        outcomes=((span("0.8.3"), "v1-flash_attn"),),
    ),
    Scenario(
        "ampere-v0",
        "the V0 engine asked for by name",
        capability=(8, 0),
        env={"VLLM_USE_V1": "0"},
        outcomes=((span("0.8.3", "0.10.2"), "v0-flash_attn"),),
    ),
    Scenario(
        "ampere-float32",
        "FlashAttention takes no float32",
        capability=(8, 0),
        engine_args={"dtype": "float32"},
        outcomes=(
            (span("0.8.3", "0.9.1"), "v0-xformers"),
            (span("0.9.2"), "v1-flex_attention"),
        ),
    ),
    Scenario(
        "env-xformers",
        "the XFormers backend asked for by name",
        capability=(8, 0),
        env={"VLLM_ATTENTION_BACKEND": "XFORMERS"},
        outcomes=((span("0.8.3", "0.10.2"), "v0-xformers"), (span("0.11.0"), "v1-xformers")),
    ),
    Scenario(
        "env-flashinfer",
        "the FlashInfer backend asked for by name",
        capability=(8, 0),
        env={"VLLM_ATTENTION_BACKEND": "FLASHINFER"},
        stubs=("flashinfer",),
        outcomes=(
            (span("0.8.3", "0.8.4"), "v0-flashinfer"),
            (span("0.8.5"), "v1-flashinfer"),
        ),
        within_chunk=span("0.8.3", "0.8.4"),
    ),
    Scenario(
        "env-flex-attention",
        "the FlexAttention backend asked for by name",
        capability=(8, 0),
        env={"VLLM_ATTENTION_BACKEND": "FLEX_ATTENTION"},
        outcomes=((span("0.9.1"), "v1-flex_attention"),),
    ),
    Scenario(
        "env-triton",
        "the Triton backend asked for by name",
        capability=(8, 0),
        env={"VLLM_ATTENTION_BACKEND": "TRITON_ATTN_VLLM_V1"},
        outcomes=((span("0.8.3", "0.10.2"), "v1-triton_attn"),),
    ),
    Scenario(
        "env-triton-v1-alone",
        "its name where V1 is the only engine",
        capability=(8, 0),
        env={"VLLM_ATTENTION_BACKEND": "TRITON_ATTN"},
        outcomes=((span("0.11.0"), "v1-triton_attn"),),
    ),
    Scenario(
        "blackwell-flashinfer",
        "capability 10.0 prefers FlashInfer, where it is installed",
        capability=(10, 0),
        stubs=("flashinfer",),
        outcomes=(
            # Before, FlashAttention has no code for it, and only a patched wheel knows that.
            (span("0.9.0", "0.9.0.1"), "v1-flash_attn"),
            (span("0.9.1"), "v1-flashinfer"),
        ),
    ),
)


PLUGIN_NOT_TOLD = span("0.10.1", "0.10.2")
"""Releases whose chunked layers are global, without a word, in V0 impls that are not told of it."""

SAMPLER_IN_MODEL = span("0.8.3", "0.8.4")
"""Releases with Llama 4 whose V1 model runner takes the sampler from the model."""

SAMPLER_MISSING = span("0.8.3", "0.8.3")
SAMPLER_ERROR = (
    r"AttributeError: 'Llama4ForConditionalGeneration' object has no attribute 'sampler'"
)

VIRTUAL_BATCHES = LLAMA4
CLIP_MISSING = span("0.8.3", "0.8.3")
"""Releases whose local attention reads past the block table (upstream PR 16209)."""
CLIP_ERROR = r"IndexError: index \d+ is out of bounds for dimension 1 with size \d+"


def unexpected_keyword(cls: str, keyword: str = "use_irope") -> str:
    """Return a regex for the error of a class that is given a keyword it lacks."""
    message = f"{cls}.__init__() got an unexpected keyword argument '{keyword}'"
    return "TypeError: " + re.escape(message)


V0_CHUNKED = span("0.8.3", "0.10.2")
"""Releases that have both Llama 4 and the V0 engine."""

KEYWORD_MISSING = span("0.8.3", "0.8.3")
KEYWORD_MISSING_ERROR = r"TypeError: .* got an unexpected keyword argument 'use_irope'"
keyword_missing = pytest.mark.fail_to_pass(
    releases=in_order(KEYWORD_MISSING), raises=KEYWORD_MISSING_ERROR
)
"""For tests that stock fails there by that alone."""

CHUNKS_IGNORED = V0_CHUNKED
"""Releases whose V0 impls compute global attention in layers that want it within chunks."""
CHUNKS_IGNORED_ERROR = r"wrong attention in chunked layer|" + KEYWORD_MISSING_ERROR
LOGPROBS_ERROR = r"wrong log-probabilities|" + KEYWORD_MISSING_ERROR
"""What comes of it in a model that is made of these layers."""

NOT_REFUSED_ERROR = r"DID NOT RAISE|" + KEYWORD_MISSING_ERROR

NO_PREFIX_BLOCK_8 = span("0.8.5", "0.10.2")
"""Releases whose prefix kernel multiplies whole blocks, for which Triton wants 16 rows or more."""

SDPA_V0 = span("0.8.3", "0.9.2")
"""Releases whose V0 has TorchSDPA, for CPUs."""
SDPA_V1 = span("0.9.1", "0.9.2")
"""Releases whose V1 uses that same impl."""

V1_CHUNKED = {
    "flashinfer": BY_KEY["v1-flashinfer"].passed,
    "flex_attention": BY_KEY["v1-flex_attention"].passed,
}
"""V1 backends whose impls compute global attention in layers that want it within chunks."""

RUNNER_MAKES_CHUNKS = span("0.10.0", "0.10.0")
"""Releases whose V1 model runner makes the metadata of chunked layers, for every backend."""
HYBRID_OFF_IGNORED = span("0.10.0", "0.10.0")
"""Releases that forget in it which layers are chunked, if one KV-cache group has both kinds."""
HYBRID_OFF_ERROR = r"wrong metadata of chunked layer"
SPLIT_REFUSES = span("0.10.0", "0.10.0")
"""Releases whose V1 FlashInfer takes no prefill of one token behind a longer one."""
SPLIT_ERROR = r"AssertionError"
BUFFERS_ERROR = r"AssertionError|wrong size for the accumulation"
"""Of V1 FlashInfer where layers make chunks: it has a row for each of `max_num_seqs` requests."""
FLEX_STALE_BLOCKS = span("0.9.1", "0.10.1.1")
"""Releases whose V1 FlexAttention reads a block table beyond the end of the sequence."""
FLEX_STALE_ERROR = r"wrong metadata of (chunked|global) layer"

LAYERS_MAKE_CHUNKS = span("0.10.1")
"""Releases whose V1 layers bring a backend of their own that makes the metadata of chunks."""
LAYERS_SPLIT_REFUSES = span("0.10.1", "0.10.2")
"""Those whose backends take no prefill of one token behind a longer one."""
