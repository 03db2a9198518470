"""Which slots of the KV cache tokens attend to: by definition, and by the metadata of V1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CHUNK, BLOCK, COLUMNS = 32, 16, 7
MAX_LEN = COLUMNS * BLOCK

Seen = list[list[int]]
"""For each token of a batch, the slots of the KV cache that it attends to, in order."""


@dataclass(frozen=True)
class Request:
    """New tokens of a sequence that has some computed before."""

    computed: int
    new: int
    is_prefill: bool = True

    @property
    def end(self) -> int:
        return self.computed + self.new

    def seen(self, blocks: list[int], chunk: int | None) -> Seen:
        """Return by definition what its new tokens see, with chunks or (None) without."""
        return [
            [
                blocks[key // BLOCK] * BLOCK + key % BLOCK
                for key in range(0 if chunk is None else query // chunk * chunk, query + 1)
            ]
            for query in range(self.computed, self.end)
        ]


def decode(end: int) -> Request:
    return Request(end - 1, 1, is_prefill=False)


BATCHES = {
    "prompts": [Request(0, MAX_LEN), Request(0, CHUNK)],
    "decodes": [decode(MAX_LEN), decode(CHUNK), decode(CHUNK + 1), decode(3)],
    "mixed": [decode(2 * CHUNK + 5), Request(CHUNK - 5, CHUNK + 9), Request(0, CHUNK + 4)],
    "within-chunk": [decode(5), Request(0, CHUNK)],
    "last-chunk": [decode(MAX_LEN), Request(3 * CHUNK, BLOCK)],
}

ONE_TOKEN_PIECE = [decode(2 * CHUNK + 5), Request(CHUNK - 5, 6), Request(CHUNK - 1, CHUNK)]
"""Prefills of which one token is in a chunk of its own, behind others."""


def rows_seen(starts: Any, lengths: Any, table: Any) -> Seen:
    """Read rows of sequences: where their queries start, how many keys, in which blocks."""
    seen = []
    starts, lengths = torch.as_tensor(starts).tolist(), torch.as_tensor(lengths).tolist()
    for row, length in enumerate(lengths):
        queries = starts[row + 1] - starts[row]
        assert queries > 0
        blocks = [int(block) for block in table[row]]
        slots = [blocks[key // BLOCK] * BLOCK + key % BLOCK for key in range(length)]
        seen += [slots[: length - queries + 1 + query] for query in range(queries)]
    return seen


def paged_seen(metadata: Any) -> Seen:
    return rows_seen(metadata.query_start_loc, metadata.seq_lens, metadata.block_table)


def flex_seen(metadata: Any) -> Seen:
    """Ask FlexAttention's mask, and order the slots it allows as the sequence has them."""
    queries = torch.arange(metadata.num_actual_tokens)[:, None]
    slots = torch.arange(metadata.total_cache_tokens)[None, :]
    # 0.10.1 keeps no mask.
    is_kept = getattr(metadata, "mask_mod", None) is not None
    mask_mod = metadata.mask_mod if is_kept else metadata.get_causal_mask_mod()
    mask = mask_mod(None, None, queries, slots)
    return [row.nonzero().flatten().tolist() for row in mask]


class Wrapper:
    """Stands in for a wrapper of FlashInfer: it remembers its last plan."""

    is_cuda_graph_enabled = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: Seen = []


def pages_seen(starts: Any, indptr: Any, indices: Any, last: Any) -> Seen:
    bounds = list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))
    pages = [indices[start:end].tolist() for start, end in bounds]
    lengths = [(len(p) - 1) * BLOCK + int(n) for p, n in zip(pages, last, strict=True)]
    return rows_seen(starts, lengths, pages)


class PrefillWrapper(Wrapper):
    def plan(self, starts: Any, indptr: Any, indices: Any, last: Any, *_: Any, **__: Any) -> None:
        self.seen = pages_seen(starts, indptr, indices, last)


class DecodeWrapper(Wrapper):
    def plan(self, indptr: Any, indices: Any, last: Any, *_: Any, **__: Any) -> None:
        self.seen = pages_seen(range(len(last) + 1), indptr, indices, last)


def flashinfer_seen(metadata: Any) -> Seen:
    """Read the plans as they are when the model runs: decodes come first."""
    wrappers = (metadata.decode_wrapper, metadata.prefill_wrapper)
    return [seen for wrapper in wrappers if wrapper is not None for seen in wrapper.seen]


def sdpa_seen(metadata: Any) -> Seen:
    """Read TorchSDPA's metadata: prefills come first."""
    seen = []
    if metadata.num_prefill_tokens:
        lengths = metadata.kv_start_loc.diff()
        table = metadata.prefill_block_tables
        seen += rows_seen(metadata.prefill_query_start_loc, lengths, table)
        assert int(lengths.max()) == metadata.max_kv_len
        assert metadata.seq_lens[: len(lengths)] == lengths.tolist()
    if metadata.num_decode_tokens:
        lengths = metadata.seq_lens_tensor
        seen += rows_seen(range(len(lengths) + 1), lengths, metadata.block_tables)
        assert int(lengths.max()) == metadata.max_decode_seq_len
    return seen
