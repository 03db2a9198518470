"""Batches that nobody thought of, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from .driver import Driver, Piece, Shape


@st.composite
def shapes(draw: st.DrawFn, max_heads: int = 6, blocks: tuple[int, ...] = (8, 16, 32)) -> Shape:
    block = draw(st.sampled_from(blocks))
    chunk = block * draw(st.integers(1, 64 // block))
    kv_heads = draw(st.sampled_from((1, 2)))
    heads = kv_heads * draw(st.integers(1, min(3, max_heads // kv_heads)))
    max_len = chunk * 3 + draw(st.sampled_from((0, 1, block // 2, block)))
    return Shape(chunk, block, heads, kv_heads, max_len)


def lengths(shape: Shape, first: int, last: int) -> st.SearchStrategy[int]:
    """Draw lengths, many of them next to a multiple of the chunk."""
    near = {
        multiple + offset
        for multiple in range(0, shape.max_len + 1, shape.chunk)
        for offset in (-1, 0, 1, 2)
    }
    allowed = sorted(length for length in near if first <= length <= last)
    anywhere = st.integers(first, last)
    return st.one_of(st.sampled_from(allowed), anywhere) if allowed else anywhere


def draw_decodes(data: st.DataObject, driver: Driver, count: int) -> list[Piece]:
    shape, pieces = driver.shape, []
    for _ in range(count):
        length = data.draw(lengths(shape, 1, shape.max_len))
        sequence = driver.sequence(length)
        if length > 1:
            driver.fill_cache(sequence, length - 1)
        pieces.append(Piece(sequence, 1, is_prefill=False))
    return pieces


def draw_prefills(data: st.DataObject, driver: Driver, count: int, cached: bool) -> list[Piece]:
    shape, pieces = driver.shape, []
    for _ in range(count):
        length = data.draw(lengths(shape, 1, shape.max_len))
        sequence = driver.sequence(length)
        start = data.draw(lengths(shape, 0, length - 1)) if cached else 0
        if start:
            driver.fill_cache(sequence, start)
        pieces.append(Piece(sequence, length - start, is_prefill=True))
    return pieces


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        # One counterexample will do, as it is: on stock there are many.
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
