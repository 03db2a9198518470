"""V1 local attention: how a batch of sequences is cut into chunks, as virtual batches.

The reference here follows the definition, one token at a time: a query sees the keys of its own
chunk, up to itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .expected import CLIP_ERROR, CLIP_MISSING, VIRTUAL_BATCHES
from .releases import in_order, installed_release, span

RELEASE = installed_release()
BLOCK = 4

pytestmark = pytest.mark.skipif(
    RELEASE not in VIRTUAL_BATCHES, reason=f"{RELEASE} has no local attention"
)

clip_missing = pytest.mark.fail_to_pass(releases=in_order(CLIP_MISSING), raises=CLIP_ERROR)


@dataclass(frozen=True)
class Batch:
    """Sequences as a scheduler gives them: new query tokens, and keys in all, of each."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    chunk: int

    @property
    def fitting_columns(self) -> int:
        """Return how many blocks the longest sequence takes: as narrow as the table can be."""
        return -(-max(self.seq_lens) // BLOCK)

    @property
    def ample_columns(self) -> int:
        """Return a width that no chunk reaches beyond, even one that has only just begun."""
        return (max(self.seq_lens) // self.chunk + 1) * self.chunk // BLOCK


@dataclass(frozen=True)
class Piece:
    """One virtual batch: a run of queries of one chunk, and the blocks their keys lie in."""

    query_len: int
    seq_len: int
    blocks: tuple[int, ...]


def table_of(batch: Batch, columns: int) -> torch.Tensor:
    """Return a block table in which no two entries are alike."""
    rows = len(batch.seq_lens)
    return torch.arange(1, rows * columns + 1, dtype=torch.int32).view(rows, columns)


def reference(batch: Batch, table: torch.Tensor) -> list[Piece]:
    """Cut the batch by definition."""
    pieces = []
    for row, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        positions = range(seq_len - query_len, seq_len)
        for chunk in sorted({position // batch.chunk for position in positions}):
            queries = [position for position in positions if position // batch.chunk == chunk]
            keys = range(chunk * batch.chunk, queries[-1] + 1)
            columns = sorted({key // BLOCK for key in keys})
            blocks = tuple(int(table[row, column]) for column in columns)
            pieces.append(Piece(len(queries), len(keys), blocks))
    return pieces


def common_metadata(module: Any, batch: Batch, table: torch.Tensor, starts: torch.Tensor) -> Any:
    """Return the metadata class that 0.9.2 and later take, with the fields that each has."""
    values = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(batch.seq_lens, dtype=torch.int32),
        "seq_lens_cpu": torch.tensor(batch.seq_lens, dtype=torch.int32),
        "num_computed_tokens_cpu": torch.tensor(batch.seq_lens) - torch.tensor(batch.query_lens),
        "num_reqs": len(batch.seq_lens),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": max(batch.query_lens),
        "max_seq_len": max(batch.seq_lens),
        "block_table_tensor": table,
        "slot_mapping": torch.zeros(int(starts[-1]), dtype=torch.int64),
        "causal": True,
    }
    cls = module.CommonAttentionMetadata
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def virtual_batches(
    batch: Batch, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the installed function, in its release's form: query starts, key counts, tables."""
    where = "flash_attn" if RELEASE in span("0.8.3", "0.9.1") else "utils"
    module = importlib.import_module(f"vllm.v1.attention.backends.{where}")
    cut = module.make_local_attention_virtual_batches
    starts = torch.tensor((0, *batch.query_lens), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if RELEASE in span("0.8.3", "0.9.2"):
        seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32).numpy()
        _, local_starts, local_lens, local_table = cut(
            batch.chunk, starts.numpy(), seq_lens, table, BLOCK
        )
        return torch.from_numpy(local_starts), torch.from_numpy(local_lens), local_table
    local = cut(batch.chunk, common_metadata(module, batch, table, starts), BLOCK)
    return local.query_start_loc_cpu, local.seq_lens_cpu, local.block_table_tensor


def check(batch: Batch, columns: int) -> None:
    """Compare the installed function with the definition, for a block table of this width."""
    table = table_of(batch, columns)
    starts, seq_lens, local_table = virtual_batches(batch, table)
    assert local_table.shape[1] == batch.chunk // BLOCK
    found = [
        # Blocks past the last key are never read, whatever they hold.
        Piece(int(query_len), int(seq_len), tuple(row.tolist()[: -(-int(seq_len) // BLOCK)]))
        for query_len, seq_len, row in zip(starts.diff(), seq_lens, local_table, strict=True)
    ]
    assert found == reference(batch, table)


# The example that upstream's comment works through: prefill, chunked prefill and a short one.
EXAMPLE = Batch(query_lens=(4, 10, 5), seq_lens=(6, 17, 9), chunk=4)
# Decode and prefill at the end of the longest sequence that the table was made for.
LAST_CHUNK = Batch(query_lens=(1, 18), seq_lens=(18, 18), chunk=8)
# max_model_len, and so the table, is shorter than one chunk.
SHORTER_THAN_CHUNK = Batch(query_lens=(6, 1), seq_lens=(6, 9), chunk=16)


@pytest.mark.parametrize("batch", [EXAMPLE, LAST_CHUNK, SHORTER_THAN_CHUNK])
def test_ample_table(batch: Batch) -> None:
    """With room to spare in the block table, every release gets it right."""
    check(batch, batch.ample_columns)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(LAST_CHUNK, id="last-chunk", marks=clip_missing),
        pytest.param(SHORTER_THAN_CHUNK, id="shorter-than-chunk", marks=clip_missing),
    ],
)
def test_fitting_table(batch: Batch) -> None:
    """A table that ends within the last chunk must not be read past its end."""
    check(batch, batch.fitting_columns)


def random_batch(source: random.Random) -> Batch:
    """Return sequences of all kinds: decodes, whole prefills and parts of prefills."""
    seq_lens = tuple(source.randint(1, 70) for _ in range(source.randint(1, 6)))
    query_lens = tuple(source.choice((1, length, source.randint(1, length))) for length in seq_lens)
    return Batch(query_lens, seq_lens, source.choice((4, 8, 16, 32)))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    """The cases above are not special."""
    source = random.Random(seed)
    for _ in range(20):
        batch = random_batch(source)
        check(batch, batch.ample_columns)
