"""A made-up matrix, simple enough to know its answers by heart.

V1 needs capability 8.0 and a KV cache of the model's dtype; everything else runs on V0 XFormers,
which is wrong past the chunk on stock. On 7.0 nothing runs.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from overlay.answers import matrix
from overlay.answers.matrix import Matrix, Variant

AXES = {
    "dtype": ["auto", "float16", "float32"],
    "kv_cache_dtype": ["auto", "fp8", "fp8_e5m2"],
    "capability": ["7.0", "7.5", "8.6", "8.9"],
}
BACKENDS = ("unset", "XFORMERS", "TRITON_ATTN_VLLM_V1", "FLASHINFER", "HPU_ATTN")
XFORMERS = {"engine": "v0", "backend": "xformers.XFormersImpl"}
TRITON = {"engine": "v1", "backend": "v1.triton_attn.TritonAttentionImpl"}
FLASH = {"engine": "v1", "backend": "v1.flash_attn.FlashAttentionImpl"}


def refused(message: str) -> dict[str, str]:
    return {"verdict": "explained", "stage": "config", "message": message}


def outcome(variant: Variant, backend: str, v1: str, length: str, place: Any) -> dict[str, str]:
    dtype, kv_cache_dtype, capability = place
    if capability == "7.0":
        return {"verdict": "crash", "message": "no kernel image", "basis": "hearsay"}
    if dtype == "auto" and capability == "7.5":
        return refused("Your made-up GPU has compute capability 7.5. Use --dtype=half.")
    on_v1 = capability != "7.5" and kv_cache_dtype == "auto" and v1 != "0"
    if backend == "TRITON_ATTN_VLLM_V1" and on_v1:
        return {"verdict": "right", **TRITON, "basis": "measured"}
    if backend == "unset" and on_v1:
        return {"verdict": "right", **FLASH, "basis": "constructed"}
    if v1 == "1" or backend == "TRITON_ATTN_VLLM_V1":
        return refused("Unset VLLM_USE_V1 or VLLM_ATTENTION_BACKEND.")
    if variant == "patched" and kv_cache_dtype == "fp8" and capability == "8.6":
        return refused("Use kv_cache_dtype=fp8_e5m2.")
    if length == "at" or (variant == "patched" and backend != "FLASHINFER"):
        return {"verdict": "right", **XFORMERS, "basis": "measured"}
    message = "wrong attention in chunked layers"
    return {"verdict": "wrong", **XFORMERS, "message": message, "basis": "measured"}


def made(release: str, variant: Variant, backends: tuple[str, ...] = BACKENDS) -> Matrix:
    outcomes, rows = list[dict[str, str]](), list[dict[str, Any]]()
    for flashinfer, backend, v1, length in product(
        (False, True), backends, ("unset", "0", "1"), ("past", "at")
    ):
        if flashinfer and backend not in ("unset", "FLASHINFER"):
            continue
        found = [outcome(variant, backend, v1, length, place) for place in product(*AXES.values())]
        for one in found:
            if one not in outcomes:
                outcomes.append(one)
        numbers = [outcomes.index(one) for one in found]
        name = {"backend": backend, "v1": v1, "length": length, "flashinfer": flashinfer}
        rows.append({**name, "llama4": numbers, "control": numbers})
    run = {"release": release, "axes": AXES, "outcomes": outcomes, "rows": rows}
    return matrix.from_run(run, variant)


def keep(root: Path, *releases: str, backends: tuple[str, ...] = BACKENDS) -> None:
    """Write the made-up matrix of releases into a project."""
    variants: tuple[Variant, ...] = ("stock", "patched")
    for release, variant in product(releases, variants):
        matrix.write(root, made(release, variant, backends))
