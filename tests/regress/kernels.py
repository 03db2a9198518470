"""Plain torch in the place of kernels that have no form for CPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return causal attention of the last tokens of one sequence, the queries, over all of it."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(key) - len(query) + 1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float())


FORMATS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Types of a KV cache that hold it in bytes."""


def stored(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return values as a cache of this type holds them."""
    return values.to(FORMATS[dtype]).view(torch.uint8) if dtype in FORMATS else values


def loaded(cache: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return what a cache of this type holds."""
    return cache.view(FORMATS[dtype]).float() if dtype in FORMATS else cache


def rows_of(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Return a sequence's tokens from a cache [blocks, block size, heads, head size]."""
    used = table[: -(-length // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:length].float()


def token_major(key_cache: torch.Tensor, value_cache: torch.Tensor) -> list[torch.Tensor]:
    """View PagedAttention's caches as [blocks, block size, heads, head size]."""
    key_cache = key_cache.permute(0, 3, 1, 2, 4).flatten(3, 4)
    return [key_cache, value_cache.permute(0, 3, 1, 2)]


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    dtype: str,
    *_: Any,
) -> None:
    x = key_cache.shape[-1]
    # A kernel stores as many tokens as there are slots, whatever comes after them.
    key, value, used = key[: len(slots)], value[: len(slots)], slots >= 0
    rows, columns = slots[used] // value_cache.shape[3], slots[used] % value_cache.shape[3]
    key_cache.permute(0, 3, 1, 2, 4)[rows, columns] = stored(key[used].unflatten(2, (-1, x)), dtype)
    value_cache.permute(0, 3, 1, 2)[rows, columns] = stored(value[used], dtype)


def paged_attention_v1(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    _kv_heads: int,
    scale: float,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    _block: int,
    max_seq_len: int,
    _alibi: None,
    dtype: str,
    *_: Any,
) -> None:
    assert tables.is_contiguous()
    assert tables.dtype == seq_lens.dtype == torch.int32
    assert len(tables) == len(seq_lens) == len(query)
    assert int(seq_lens.max()) <= max_seq_len
    keys, values = token_major(loaded(key_cache, dtype), loaded(value_cache, dtype))
    for row, length in enumerate(seq_lens.tolist()):
        if length:
            key, value = (rows_of(cache, tables[row], length) for cache in (keys, values))
            out[row] = attend(query[row : row + 1], key, value, scale)[0]


def paged_attention_v2(out: torch.Tensor, _1: Any, _2: Any, _3: Any, *rest: Any) -> None:
    paged_attention_v1(out, *rest)


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any,
    p: float,
    scale: float,
) -> torch.Tensor:
    bias = attn_bias.materialize((query.shape[1], key.shape[1]))
    weights = (torch.einsum("bq...d,bk...d->b...qk", query, key) * scale + bias).softmax(-1)
    return torch.einsum("b...qk,bk...d->bq...d", weights, value)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    dtype: str = "auto",
    *_: Any,
) -> None:
    """Store tokens in caches [blocks, block size, heads, head size], views of any strides."""
    used = slots >= 0
    place = slots[used] // key_cache.shape[1], slots[used] % key_cache.shape[1]
    key_cache[place] = stored(key[: len(slots)][used], dtype)
    value_cache[place] = stored(value[: len(slots)][used], dtype)


def flash_attn_varlen(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    **_: Any,
) -> None:
    assert causal
    starts = cu_seqlens_q.tolist()
    key_starts = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    assert starts[-1] == len(q) == len(out)
    for row, (start, end) in enumerate(pairwise(starts)):
        if key_starts is not None:
            keys = slice(key_starts[row], key_starts[row + 1])
            key, value = k[keys], v[keys]
        else:
            assert seqused_k is not None
            assert block_table is not None
            length = int(seqused_k[row])
            key, value = (rows_of(cache, block_table[row], length) for cache in (k, v))
        assert end - start <= max_seqlen_q
        assert len(key) <= max_seqlen_k
        out[start:end] = attend(q[start:end], key, value, softmax_scale)


def flash_attn_kvcache(
    *,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    **_: Any,
) -> None:
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert len(block_table) == len(cache_seqlens) == len(q)
    for row, length in enumerate(cache_seqlens.tolist()):
        if length:
            caches = (k_cache, v_cache)
            key, value = (rows_of(cache, block_table[row], length) for cache in caches)
            out[row] = attend(q[row], key, value, softmax_scale)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str,
    apply_router_weight_on_input: bool,
    **_: Any,
) -> torch.Tensor:
    assert activation == "silu"
    assert apply_router_weight_on_input
    answers = torch.zeros_like(hidden_states)
    for ids, weights in zip(topk_ids.long().T, topk_weights.T, strict=True):
        scaled = (hidden_states * weights[:, None])[:, :, None]
        gate, up = (w1[ids] @ scaled).chunk(2, dim=1)
        answers += (w2[ids] @ (torch.nn.functional.silu(gate) * up)).squeeze(-1)
    return answers


BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "xformers": {"xops.memory_efficient_attention_forward": memory_efficient_attention},
    "flash_attn": {
        "flash_attn_varlen_func": flash_attn_varlen,
        "flash_attn_with_kvcache": flash_attn_kvcache,
    },
}
"""What the modules of the V0 backends call by names of their own."""


def stand_in(monkeypatch: pytest.MonkeyPatch, backend: str) -> Any:
    """Replace the kernels of a V0 backend and return its module."""
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "reshape_and_cache", reshape_and_cache)
    monkeypatch.setattr(_custom_ops, "paged_attention_v1", paged_attention_v1)
    monkeypatch.setattr(_custom_ops, "paged_attention_v2", paged_attention_v2)
    cache_ops = torch.ops._C_cache_ops
    monkeypatch.setattr(
        cache_ops, "reshape_and_cache_flash", reshape_and_cache_flash, raising=False
    )
    name = f"vllm.attention.backends.{backend}"
    module = importlib.import_module(name)
    for what, kernel in BACKENDS[backend].items():
        monkeypatch.setattr(f"{name}.{what}", kernel)
    return module
