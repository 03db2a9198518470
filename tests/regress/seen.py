"""Which keys each token of a batch sees: by definition, and as V1's metadata has it."""

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
