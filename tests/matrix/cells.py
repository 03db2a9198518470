"""The cells of the matrix: all the configurations that selection can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e5m2")
DTYPES = ("auto", "float16", "bfloat16", "float32")
"""`--dtype`. Llama 4 is a model of bfloat16."""
V1 = ("unset", "0", "1")
LENGTHS = ("past", "at")
"""`max_model_len`: past the chunk, or just the chunk, where global attention is exact."""
UNSET = "unset"


@dataclass(frozen=True)
class Row:
    """Cells that differ in the GPU, the dtype and the format of the KV cache only."""

    backend: str
    """VLLM_ATTENTION_BACKEND."""
    v1: str
    """VLLM_USE_V1."""
    length: str
    flashinfer: bool
    """Whether FlashInfer is installed."""


@dataclass(frozen=True)
class Setting:
    """What an engine is started with beside what cells tell apart."""

    name: str
    arguments: Callable[[Path], Mapping[str, Any]]
    """Engine arguments, given the folder of the models."""


@dataclass(frozen=True)
class Cell:
    """One configuration."""

    row: Row
    dtype: str
    kv_cache_dtype: str
    capability: tuple[int, int]
    setting: Setting | None = None

    @property
    def env(self) -> dict[str, str]:
        """Return the environment variables that are set."""
        pairs = {"VLLM_ATTENTION_BACKEND": self.row.backend, "VLLM_USE_V1": self.row.v1}
        return {name: value for name, value in pairs.items() if value != UNSET}


def asks_flashinfer(backend: str) -> bool:
    """Return whether it can matter that FlashInfer is installed: by name, or by default."""
    return backend == UNSET or "FLASHINFER" in backend


def rows(backends: Sequence[str]) -> Iterator[Row]:
    """Return the rows in the order of the file."""
    for flashinfer, length, backend, v1 in product((False, True), LENGTHS, backends, V1):
        if asks_flashinfer(backend) or not flashinfer:
            yield Row(backend, v1, length, flashinfer)


def cells(row: Row) -> Iterator[Cell]:
    """Return the cells of a row in the order of the file."""
    for dtype, kv_cache_dtype, capability in product(DTYPES, KV_CACHE_DTYPES, CAPABILITIES):
        yield Cell(row, dtype, kv_cache_dtype, capability)
