"""Plain torch in place of the attention kernels of V1 backends that read a paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys, and the log-sum-exp that weighs it against other keys."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> Partial:
    """Return attention of the queries, the last tokens if causal, over all the keys."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(key) - len(query) + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1).T


def merge(parts: Sequence[Partial]) -> torch.Tensor:
    """Return attention over the keys of all the parts together."""
    weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    return (weights * torch.stack([answer for answer, _ in parts])).sum(0)


class Plan:
    """One batch of sequences as FlashInfer describes it.

    Row i has the queries `qo_indptr[i]` to `qo_indptr[i + 1]` and the pages
    `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`, of which the last holds `last_page_len[i]` tokens.
    """

    def __init__(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        last_page_len: torch.Tensor,
        shape: tuple[int, ...],
        causal: bool,
        sm_scale: float,
    ) -> None:
        tensors = (qo_indptr, kv_indptr, kv_indices, last_page_len)
        assert {tensor.dtype for tensor in tensors} == {torch.int32}
        assert len(qo_indptr) == len(kv_indptr) == len(last_page_len) + 1
        # Copies: a kernel works on what it was planned for, whatever happens to the arguments.
        self.starts = qo_indptr.tolist()
        self.page_starts = kv_indptr.tolist()
        self.pages = kv_indices.tolist()
        self.last_page_len = last_page_len.tolist()
        self.heads, self.kv_heads, self.head_size, self.page_size = shape
        self.causal, self.scale = causal, sm_scale
        assert self.starts[0] == 0
        assert all(1 <= length <= self.page_size for length in self.last_page_len)

    def attend(self, query: torch.Tensor, cache: torch.Tensor) -> Partial:
        """Return what the kernel computes from a cache [pages, 2, page size, heads, head size].

        One of 8 bits is read in the type that it is viewed as.
        """
        cache = cache.float()
        assert cache.shape[1:] == (2, self.page_size, self.kv_heads, self.head_size)
        assert query.shape == (self.starts[-1], self.heads, self.head_size)
        answers = []
        for row, (start, end) in enumerate(pairwise(self.starts)):
            pages = self.pages[self.page_starts[row] : self.page_starts[row + 1]]
            length = (len(pages) - 1) * self.page_size + self.last_page_len[row]
            key, value = cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]
            assert not self.causal or end - start <= length
            answers.append(attend(query[start:end].float(), key, value, self.scale, self.causal))
        return torch.cat([answer for answer, _ in answers]), torch.cat([lse for _, lse in answers])


class _Wrapper:
    """What both wrappers share: the attributes that the impl asserts on."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **_: Any) -> None:
        assert kv_layout in ("NHD", "HND")
        assert workspace.dtype == torch.uint8
        self.kv_layout = kv_layout
        self.planned: Plan | None = None

    def _set(self, plan: Plan, window_left: int, logits_soft_cap: float | None) -> None:
        self.planned, self._causal, self._sm_scale = plan, plan.causal, plan.scale
        self._window_left, self._logits_soft_cap = window_left, logits_soft_cap or 0.0
        assert window_left == -1
        assert not logits_soft_cap

    def run(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        *,
        out: torch.Tensor,
        k_scale: float,
        v_scale: float,
    ) -> torch.Tensor:
        assert k_scale == v_scale == 1.0
        assert self.planned is not None
        pages = cache if self.kv_layout == "NHD" else cache.transpose(2, 3)
        out.copy_(self.planned.attend(query, pages)[0])
        return out


class PrefillWrapper(_Wrapper):
    """In place of `flashinfer.BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        *shape: int,
        causal: bool = False,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        kv = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._set(Plan(qo_indptr, *kv, shape, causal, sm_scale), window_left, logits_soft_cap)


class DecodeWrapper(_Wrapper):
    """In place of `flashinfer.BatchDecodeWithPagedKVCacheWrapper`: one query a row."""

    is_cuda_graph_enabled = False

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        *_: Any,
    ) -> None:
        assert pos_encoding_mode == "NONE"
        assert sm_scale is not None
        shape = num_qo_heads, num_kv_heads, head_dim, page_size
        one_each = torch.arange(len(indptr), dtype=torch.int32)
        plan = Plan(one_each, indptr, indices, last_page_len, shape, False, sm_scale)
        self._set(plan, window_left, logits_soft_cap)


class CascadeWrapper:
    """In place of `flashinfer.MultiLevelCascadeAttentionWrapper`: only the last level is causal."""

    def __init__(self, num_levels: int, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        self.num_levels = num_levels
        self.levels: list[Plan] = []

    def plan(
        self,
        qo_indptr: list[torch.Tensor],
        kv_indptr: list[torch.Tensor],
        kv_indices: list[torch.Tensor],
        last_page_len: list[torch.Tensor],
        *shape: int,
        causal: bool = False,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype,
    ) -> None:
        batches = list(zip(qo_indptr, kv_indptr, kv_indices, last_page_len, strict=True))
        assert len(batches) == self.num_levels
        causals = [False] * (self.num_levels - 1) + [causal]
        self.levels = [
            Plan(*batch, shape, level_causal, sm_scale)
            for batch, level_causal in zip(batches, causals, strict=True)
        ]

    def run(self, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return merge([level.attend(query, cache) for level in self.levels])


FLASHINFER = {
    "BatchPrefillWithPagedKVCacheWrapper": PrefillWrapper,
    "BatchDecodeWithPagedKVCacheWrapper": DecodeWrapper,
    "MultiLevelCascadeAttentionWrapper": CascadeWrapper,
}


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: None,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    kernel_options: dict[str, Any],
) -> torch.Tensor:
    """Return attention [batch, heads, tokens, head size] under a block mask.

    A kernel skips the blocks of 128 x 128 that the block mask leaves out, computes in full those
    that it calls full, and asks `mask_mod` in the others only.
    """
    del score_mod, kernel_options
    repeat = query.shape[1] // key.shape[1]
    assert enable_gqa == (repeat > 1)
    visible = visible_keys(block_mask, query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)


def visible_keys(block_mask: Any, queries: int, keys: int) -> torch.Tensor:
    """Return which query sees which key [queries, keys], block by block."""
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    zero = torch.zeros((), dtype=torch.int32)
    within = block_mask.mask_mod(zero, zero, rows, columns)
    partial = _blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    height, width = block_mask.BLOCK_SIZE
    block = rows // height, columns // width
    return (partial[block] & within) | full[block]


def _blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return which blocks [rows, columns] one of the two lists of a block mask names."""
    counts, indices = counts[0, 0], indices[0, 0]
    named = torch.zeros(indices.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        named[row, indices[row, :count].long()] = True
    return named


PROPERTIES = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
"""What FlexAttention asks of the GPU."""
