"""What a batch of the V0 engine is made of, and the metadata that a backend gets with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch


@dataclass(kw_only=True)
class Request:
    """A sequence: the blocks of its KV cache, and how many of its tokens were computed so far."""

    blocks: list[int]
    computed: int = 0


R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Piece(Generic[R]):
    """What one step computes of one sequence."""

    sequence: R
    length: int
    is_prefill: bool

    @property
    def end(self) -> int:
        return self.sequence.computed + self.length

    @property
    def tokens(self) -> slice:
        return slice(self.sequence.computed, self.end)

    def slots(self, block: int) -> list[int]:
        tokens, blocks = range(self.sequence.computed, self.end), self.sequence.blocks
        return [blocks[token // block] * block + token % block for token in tokens]


def used_row(blocks: Sequence[int], columns: int) -> list[int]:
    """Return a row of a block table that former requests had, before it gets these blocks.

    They are not cleared: behind the blocks come the same ones again, and those of others.
    """
    return [*blocks, *reversed(blocks), *range(1, columns + 1)][:columns]


def metadata(
    module: Any,
    block: int,
    pieces: Sequence[Piece[R]],
    tables: bool,
    padding: int = 0,
    capture_len: int | None = None,
    columns: int = 0,
) -> Any:
    """Build a batch's metadata as the builder of the backend in `module` does.

    `tables`: prefills come with block tables, as with chunked prefill or a cached prefix.
    `capture_len`: the batch is one for a CUDA graph captured for this length, with `padding` and
    block tables that have all their `columns`, and were used before.
    """
    prefills = [piece for piece in pieces if piece.is_prefill]
    decodes = [piece for piece in pieces if not piece.is_prefill]
    assert list(pieces) == prefills + decodes
    query_lens = [piece.length for piece in pieces]
    seq_lens = [piece.end for piece in pieces] + [1] * padding
    rows = [
        piece.sequence.blocks[: -(-piece.end // block)] if tables or not piece.is_prefill else []
        for piece in pieces
    ] + [[]] * padding
    width = max(map(len, rows)) if capture_len is None else columns
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    for row, blocks in enumerate(rows):
        used = blocks if capture_len is None else used_row(blocks, columns)
        table[row, : len(used)] = torch.tensor(used)
    slots = [slot for piece in pieces for slot in piece.slots(block)] + [-1] * padding
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    key_starts = torch.tensor([0, *seq_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    decode_lens = [piece.end for piece in decodes]
    is_xformers = module.__name__.endswith(".xformers")
    cls = "XFormersMetadata" if is_xformers else "FlashAttentionMetadata"
    return getattr(module, cls)(
        num_prefills=len(prefills),
        num_prefill_tokens=sum(piece.length for piece in prefills),
        num_decode_tokens=sum(piece.length for piece in decodes) + padding,
        slot_mapping=torch.tensor(slots),
        multi_modal_placeholder_index_maps=None,
        enable_kv_scales_calculation=False,
        seq_lens=seq_lens,
        seq_lens_tensor=torch.tensor(seq_lens, dtype=torch.int32),
        max_prefill_seq_len=max((piece.end for piece in prefills), default=0),
        max_decode_seq_len=capture_len or max(decode_lens, default=0),
        context_lens_tensor=torch.tensor([piece.sequence.computed for piece in pieces]),
        block_tables=table,
        use_cuda_graph=capture_len is not None,
        max_query_len=max(query_lens),
        max_decode_query_len=max((piece.length for piece in decodes), default=1),
        query_start_loc=starts,
        seq_start_loc=key_starts,
    )
