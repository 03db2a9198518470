"""TorchSDPA, the CPU's attention: chunked layers attend within their chunk, global ones do not.

The same as `test_chunked_local.py` for the impl that V0 has on CPUs up to 0.9.2, and V1 in 0.9.1
and 0.9.2. It runs for real, on metadata which the engines' own builders make, but for three
kernels: those of the paged cache, which only a CPU build of vLLM has, and the one of IPEX for
chunked prefill and cached prefixes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import kernels, tiny_llama4
from .drawn import draw_decodes, draw_prefills, examples, shapes
from .driver import SHAPE, Driver, Piece, Shape, decode_across_boundaries, mixed_batch
from .expected import (
    CHUNKS_IGNORED_ERROR,
    SDPA_V0,
    SDPA_V1,
    keyword_missing,
)
from .releases import in_order, installed_release, span
from .third_party import import_untuned

RELEASE = installed_release()
V0 = "vllm.attention.backends.torch_sdpa"
V1 = "vllm.v1.attention.backends.cpu_attn"

pytestmark = [
    pytest.mark.skipif(
        RELEASE not in SDPA_V0, reason=f"{RELEASE} has no TorchSDPA of V0 that Llama 4 can be given"
    ),
    pytest.mark.usefixtures("one_thread"),
]

chunks_ignored = pytest.mark.fail_to_pass(releases=in_order(SDPA_V0), raises=CHUNKS_IGNORED_ERROR)

ENGINES = [
    "v0",
    pytest.param(
        "v1",
        marks=[]
        if RELEASE in SDPA_V1
        else [pytest.mark.skip(reason=f"V1 of {RELEASE} has no TorchSDPA of V0")],
    ),
]


def varlen_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    max_query_len: int,
    max_key_len: int,
    scale: float,
    is_causal: bool,
    tables: torch.Tensor,
    _alibi: None,
) -> None:
    """Stand in for IPEX: causal attention of new tokens over what the cache has of each row."""
    assert is_causal
    assert tables.dtype == query_starts.dtype == key_starts.dtype == torch.int32
    assert len(tables) == len(query_starts) - 1 == len(key_starts) - 1
    assert int(query_starts[-1]) == len(query) == len(out)
    lengths = key_starts.diff().tolist()
    caches = kernels.token_major(key_cache, value_cache)
    for row, (start, end) in enumerate(pairwise(query_starts.tolist())):
        assert end - start <= max_query_len
        assert lengths[row] <= max_key_len
        key, value = (kernels.rows_of(cache, tables[row], lengths[row]) for cache in caches)
        out[start:end] = kernels.attend(query[start:end], key, value, scale)


class CpuDriver(Driver):
    """Drives TorchSDPA as `Driver` does the others."""

    name = "xformers"  # Its cache is laid out as XFormers'.
    engine = "v0"

    def new_impl(self, is_chunked: bool) -> Any:
        shape = self.shape
        with tiny_llama4.loading(self.config):
            return self.module.TorchSDPABackendImpl(
                num_heads=shape.heads,
                head_size=shape.head_size,
                scale=shape.head_size**-0.5,
                num_kv_heads=shape.kv_heads,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype="auto",
                use_irope=is_chunked,
            )

    def metadata(self, pieces: Sequence[Piece], tables: bool, **options: Any) -> Any:
        assert not options
        return self.v0_metadata(pieces, tables) if self.engine == "v0" else self.v1_metadata(pieces)

    def v0_metadata(self, pieces: Sequence[Piece], chunked_prefill: bool) -> Any:
        """Let V0's builder work on what the CPU's model runner gathers."""
        prefills = [piece for piece in pieces if piece.is_prefill]
        decodes = [piece for piece in pieces if not piece.is_prefill]
        block = self.shape.block
        builder = self.module.TorchSDPAMetadataBuilder(
            SimpleNamespace(
                chunked_prefill=chunked_prefill,
                input_data=SimpleNamespace(
                    num_prefills=len(prefills),
                    num_prefill_tokens=sum(piece.length for piece in prefills),
                    num_decode_tokens=len(decodes),
                    seq_lens=[piece.end for piece in pieces],
                    slot_mapping=[slot for piece in pieces for slot in piece.slots(block)],
                    prefill_block_tables=[piece.sequence.blocks for piece in prefills],
                    decode_block_tables=[piece.sequence.blocks for piece in decodes],
                    max_decode_seq_len=max((piece.end for piece in decodes), default=0),
                    multi_modal_inputs_list=[],
                ),
            )
        )
        builder.prepare()
        seq_lens, query_lens = [[f(piece) for piece in pieces] for f in (end_of, length_of)]
        return builder.build(seq_lens, query_lens, -1, len(pieces))

    def v1_metadata(self, pieces: Sequence[Piece]) -> Any:
        """Let V1's builder work on what the model runner keeps for a batch."""
        count, tokens = len(pieces), sum(piece.length for piece in pieces)
        starts = torch.tensor([0, *map(length_of, pieces)]).cumsum(0).int()
        seq_lens = torch.tensor([piece.end for piece in pieces], dtype=torch.int32)
        table = torch.zeros(count + 2, self.shape.columns, dtype=torch.int32)
        for row, piece in enumerate(pieces):
            table[row, : len(piece.sequence.blocks)] = torch.tensor(piece.sequence.blocks)
        slots = torch.tensor([slot for piece in pieces for slot in piece.slots(self.shape.block)])
        runner = SimpleNamespace(
            max_num_reqs=count + 2,
            query_start_loc_cpu=starts,
            query_start_loc_np=starts.numpy(),
            seq_lens_cpu=seq_lens,
            seq_lens_np=seq_lens.numpy(),
        )
        block_table = SimpleNamespace(slot_mapping_cpu=slots, get_device_tensor=lambda: table)
        builder = import_untuned(V1).TorchSDPAMetadataBuilderV1(runner, None, block_table)
        computed = [piece.sequence.computed for piece in pieces]
        # A request is in its prompt as long as not all of that is computed.
        prompts = [piece.end if piece.is_prefill else 0 for piece in pieces]
        builder.reorder_batch(
            SimpleNamespace(
                num_reqs=count, num_computed_tokens_cpu=computed, num_prompt_tokens=prompts
            ),
            None,
        )
        sizes = {
            "num_reqs": count,
            "num_actual_tokens": tokens,
            "max_query_len": max(map(length_of, pieces)),
        }
        if RELEASE in span("0.9.1", "0.9.1"):
            return builder.build(**sizes, common_prefix_len=0, common_attn_metadata=None)
        return builder.build(0, SimpleNamespace(**sizes))


class V1CpuDriver(CpuDriver):
    """The same impl with the metadata of V1."""

    engine = "v1"


def end_of(piece: Piece) -> int:
    return piece.end


def length_of(piece: Piece) -> int:
    return piece.length


NewDriver = Callable[..., CpuDriver]


@pytest.fixture
def new_driver(start_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> NewDriver:
    """Return a function that gives a driver, by the engine, with the kernels stood in for."""
    config = start_engine({"VLLM_USE_V1": "0"})
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "reshape_and_cache", kernels.reshape_and_cache)
    monkeypatch.setattr(_custom_ops, "paged_attention_v1", kernels.paged_attention_v1)
    # Imported first: with IPEX at hand it would take all kernels from there.
    module = importlib.import_module(V0)
    ipex = "intel_extension_for_pytorch"
    for name in (ipex, f"{ipex}.llm", f"{ipex}.llm.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    paged = SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    vars(sys.modules[f"{ipex}.llm.modules"])["PagedAttention"] = paged
    drivers = {"v0": CpuDriver, "v1": V1CpuDriver}

    def new(engine: str, shape: Shape, **options: Any) -> CpuDriver:
        return drivers[engine](module, config, shape, **options)

    return new


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, marks=keyword_missing),
        pytest.param(SHAPE.chunk, marks=keyword_missing),
        pytest.param(SHAPE.chunk + 1, marks=chunks_ignored),
        pytest.param(3 * SHAPE.chunk, marks=chunks_ignored),
        pytest.param(SHAPE.max_len, marks=chunks_ignored),
    ],
)
def test_prompt(length: int, new_driver: NewDriver) -> None:
    """Without chunked prefill, prompts are given to torch's attention."""
    driver = new_driver("v0", SHAPE)
    driver.step([Piece(driver.sequence(length), length, is_prefill=True)], tables=False)


@chunks_ignored
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scenario", [decode_across_boundaries, mixed_batch])
def test_scenario(engine: str, scenario: Callable[[Driver], None], new_driver: NewDriver) -> None:
    scenario(new_driver(engine, SHAPE))


@chunks_ignored
def test_drawn_prompts_and_decodes(new_driver: NewDriver) -> None:
    @examples(60)
    @given(st.data(), shapes())
    def run(data: st.DataObject, shape: Shape) -> None:
        driver = new_driver("v0", shape)
        driver.step(draw_prefills(data, driver, 2, cached=False), tables=False)
        driver.step(draw_decodes(data, driver, 2), tables=True)

    run()


@chunks_ignored
@pytest.mark.parametrize("engine", ENGINES)
def test_drawn_mixed_batches(engine: str, new_driver: NewDriver) -> None:
    @examples(60)
    @given(st.data(), shapes())
    def run(data: st.DataObject, shape: Shape) -> None:
        driver = new_driver(engine, shape)
        pieces = draw_prefills(data, driver, data.draw(st.integers(1, 2)), cached=True)
        pieces += draw_decodes(data, driver, data.draw(st.integers(0, 2)))
        driver.step(pieces, tables=True)

    run()


@keyword_missing
def test_no_longer_than_a_chunk(new_driver: NewDriver) -> None:
    """No sequence outgrows its first chunk: global attention is the same, and stays as it is."""
    shape = Shape(chunk=40, block=16, heads=2, kv_heads=1, max_len=40)
    driver = new_driver("v0", shape)
    driver.step([Piece(driver.sequence(40), 40, is_prefill=True)], tables=False)
    assert {getattr(layer.impl, "chunked_local", None) for layer in driver.layers} == {None}
