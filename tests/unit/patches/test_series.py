"""Series files: the part of quilt's syntax that every tool reads alike."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.base.errors import Exit, OverlayError
from overlay.patches import series
from overlay.patches.series import PatchPath


def test_paths_comments_and_blank_lines() -> None:
    text = "# why\n\nattention-signatures/0.8.3.patch\nllama4-sampler/0.8.5.post1.patch\n"
    assert series.parse(text, "series/0.8.3") == (
        PatchPath("attention-signatures", "0.8.3"),
        PatchPath("llama4-sampler", "0.8.5.post1"),
    )


@pytest.mark.parametrize(
    "line",
    [
        "../evil/0.8.3.patch",
        "/etc/0.8.3.patch",
        "topic/0.8.3.patch -p1",
        "topic/0.8.3.patch # comment",
        "topic/0.8.3.diff",
        "topic name/0.8.3.patch",
        "01-Topic/0.8.3.patch",
        " topic/0.8.3.patch",
        "topic/0.8.3.patch\r",
        "0.8.3.patch",
    ],
)
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(OverlayError, match=r"series/0\.8\.3 line 2") as caught:
        series.parse(f"# first\n{line}\n", "series/0.8.3")
    assert caught.value.status is Exit.PATCH


def test_a_topic_stands_once() -> None:
    with pytest.raises(OverlayError, match="topic a is listed twice"):
        series.parse("a/0.8.3.patch\na/0.8.4.patch\n", "series/0.8.4")


def test_missing_series(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="cannot read the series"):
        series.read_series(tmp_path, "series/0.8.3")


@given(st.text(max_size=60))
def test_any_text_is_a_series_or_an_error(text: str) -> None:
    with contextlib.suppress(OverlayError):
        for path in series.parse(text, "series/x"):
            assert ".." not in str(path)
            assert not str(path).startswith("/")
