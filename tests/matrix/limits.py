"""What kernels cannot do, which nothing on a CPU can tell: data, with where it is written.

It comes into play where selection has let a cell through and the layers were constructed. For which
GPUs there is code, and what Triton compiles, is not here: `overlay.answers.runnable` knows both of
what was read and compiled, and lays it over the matrix.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from regress.releases import RELEASES, installed_release, span

from .cells import CAPABILITIES, DTYPES, KV_CACHE_DTYPES, LENGTHS, Cell
from .outcome import CRASH, WRONG, Outcome

FLASH_ATTN = frozenset({"flash_attn.FlashAttentionImpl", "v1.flash_attn.FlashAttentionImpl"})
FLASHINFER = frozenset({"flashinfer.FlashInferImpl", "v1.flashinfer.FlashInferImpl"})
XFORMERS = frozenset({"xformers.XFormersImpl"})


def below(capability: tuple[int, int]) -> frozenset[tuple[int, int]]:
    """Return the capabilities of older GPUs."""
    return frozenset(one for one in CAPABILITIES if one < capability)


@functools.cache
def flex_masks_share_memory() -> bool:
    """Return whether, in torch's CUDA graphs, one group of layers overwrites another's mask."""
    module = importlib.import_module("vllm.v1.attention.backends.flex_attention")
    made = re.search(
        r"^create_block_mask_compiled = torch\.compile\([^)]*\)", inspect.getsource(module), re.M
    )
    return made is not None and '"reduce-overhead"' in made[0]


@dataclass(frozen=True)
class Limit:
    """Cells in which an impl cannot do what it was chosen for."""

    impls: frozenset[str]
    message: str
    source: str
    """Where it is written or was seen: a file and what is in it, an issue, or what ran."""
    verdict: str = CRASH
    capabilities: frozenset[tuple[int, int]] = frozenset(CAPABILITIES)
    kv_cache_dtypes: frozenset[str] = frozenset(KV_CACHE_DTYPES)
    dtypes: frozenset[str] = frozenset(DTYPES)
    lengths: frozenset[str] = frozenset(LENGTHS)
    releases: frozenset[str] = frozenset(RELEASES)
    but_blocks_of: int = 0
    """Tokens of which a KV cache's block must be a multiple for it not to hold."""
    takes_blocks_of: frozenset[int] = frozenset()
    """Tokens of a block for which it does not hold, if it depends on that."""
    holds: Callable[[], bool] = lambda: True
    """Asks the installed vLLM, where that is what matters."""
    constructed_only: bool = False
    """What was computed is known better."""

    def applies(self, cell: Cell, dtype: str, block_size: int, outcome: Outcome) -> bool:
        """Return whether it holds in a cell."""
        return (
            outcome.backend in self.impls
            and cell.capability in self.capabilities
            and cell.kv_cache_dtype in self.kv_cache_dtypes
            and dtype in self.dtypes
            and cell.row.length in self.lengths
            and installed_release() in self.releases
            and not (self.but_blocks_of and block_size % self.but_blocks_of == 0)
            and block_size not in self.takes_blocks_of
            and self.holds()
            and not (self.constructed_only and outcome.basis == "measured")
        )


LIMITS = (
    Limit(
        FLASH_ATTN,
        "FlashAttention only support fp16 and bf16 data type",
        "flash-attention csrc/flash_attn/flash_api.cpp, mha_varlen_fwd",
        dtypes=frozenset({"float32"}),
    ),
    Limit(
        FLASH_ATTN,
        "FlashAttention only supports Ampere GPUs or newer.",
        "flash-attention csrc/flash_attn/flash_api.cpp, mha_varlen_fwd",
        capabilities=below((8, 0)),
    ),
    Limit(
        FLASH_ATTN,
        "For FP8 input, output must have dtype BF16",
        "docs/gpu-results.md; flash-attention hopper/flash_api.cpp, mha_fwd",
        kv_cache_dtypes=frozenset({"fp8", "fp8_e5m2"}),
        dtypes=frozenset({"float16"}),
    ),
    Limit(
        FLASHINFER,
        "FlashInfer requires sm75+",
        "flashinfer/jit/core.py, check_cuda_arch",
        capabilities=below((7, 5)),
    ),
    Limit(
        FLASHINFER,
        "FlashInfer has kernels for fp16 and bf16 queries only",
        "flashinfer csrc/pytorch_extension_utils.h, DISPATCH_PYTORCH_DTYPE_TO_CTYPE_FP16",
        dtypes=frozenset({"float32"}),
    ),
    Limit(
        frozenset({"v1.xformers.XFormersAttentionImpl"}),
        "No operator found for `memory_efficient_attention_forward`",
        "xformers/ops/fmha, triton_splitk.py and flash.py, which alone take decodes' paged bias",
        capabilities=below((8, 0)),
    ),
    Limit(
        frozenset({"v1.xformers.XFormersAttentionImpl"}),
        "No operator found for `memory_efficient_attention_forward`",
        "docs/gpu-results.md; xformers/ops/fmha/triton_splitk.py, BLOCK_N",
        but_blocks_of=64,
    ),
    Limit(
        frozenset({"v1.flex_attention.FlexAttentionImpl"}),
        "accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run",
        "vllm issue 25256, and a run on an H100",
        # The others make one mask a step.
        releases=span("0.10.0"),
        holds=flex_masks_share_memory,
    ),
    Limit(
        frozenset({"v1.triton_attn.TritonAttentionImpl"}),
        "type fp8e4nv not supported",
        "vllm issue 26431",
        capabilities=below((8, 9)),
        kv_cache_dtypes=frozenset({"fp8"}),
        # The kernel of other dtypes is tried: matrix/RELEASE.triton.json.
        dtypes=frozenset({"float32"}),
        releases=span("0.11.0"),
    ),
    Limit(
        frozenset({"v1.triton_attn.TritonAttentionImpl"}),
        "the cache is of fp8_e4m3, whatever is asked for: values past 448 are lost",
        "vllm/v1/attention/backends/triton_attn.py, fp8_dtype; and triton_reshape_and_cache_flash",
        verdict=WRONG,
        kv_cache_dtypes=frozenset({"fp8_e5m2"}),
        releases=span("0.11.0"),
    ),
    Limit(
        frozenset({"flashinfer.FlashInferImpl"}),
        "wrong attention in chunked layers",
        "vllm/attention/backends/flashinfer.py: nothing in it knows of chunks",
        verdict=WRONG,
        lengths=frozenset({"past"}),
        constructed_only=True,
    ),
)


def judge(
    cell: Cell, dtype: str, block_size: int, outcome: Outcome, more: Iterable[Limit] = ()
) -> Outcome:
    """Return what becomes of a cell on the GPU, given what was found on a CPU.

    `dtype` is what the cell's came to, `block_size` the tokens of a block; `more` limits come last.
    """
    if outcome.verdict not in ("right", "wrong"):
        return outcome
    for limit in (*LIMITS, *more):
        if limit.applies(cell, dtype, block_size, outcome):
            return _limited(outcome, limit.verdict, limit.message, limit.source)
    if outcome.backend in XFORMERS and not _xformers_runs(cell, dtype):
        message = "No operator found for `memory_efficient_attention_forward`"
        return _limited(outcome, CRASH, message, "the installed xformers/ops/fmha")
    return outcome


def _limited(outcome: Outcome, verdict: str, message: str, source: str) -> Outcome:
    return replace(outcome, verdict=verdict, stage="kernel", message=message, basis=source)


def _xformers_runs(cell: Cell, dtype: str) -> bool:
    """Return whether one of xformers' kernels for varying lengths takes the dtype on the GPU."""
    for name in ("flash", "cutlass"):
        kernel = importlib.import_module(f"xformers.ops.fmha.{name}").FwOp
        newest = getattr(kernel, "CUDA_MAXIMUM_COMPUTE_CAPABILITY", None)
        dtypes = {str(dtype).removeprefix("torch.") for dtype in kernel.SUPPORTED_DTYPES}
        is_new_enough = cell.capability >= kernel.CUDA_MINIMUM_COMPUTE_CAPABILITY
        if is_new_enough and (newest is None or cell.capability <= newest) and dtype in dtypes:
            return True
    return False
