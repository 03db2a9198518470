"""Matching hunks: one place, another place, several, none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.base.errors import OverlayError
from overlay.base.paths import is_safe_path
from overlay.patches.hunks import (
    FileDiff,
    MatchKind,
    apply_hunks,
    is_applied,
    parse_diff,
    split_lines,
)

DIFF = """diff --git a/f.py b/f.py
index 1111111111111111111111111111111111111111..2222222222222222222222222222222222222222 100644
--- a/f.py
+++ b/f.py
@@ -2,3 +2,3 @@
 b
-c
+C
 d
"""


def one(diff: str = DIFF) -> FileDiff:
    (file,) = parse_diff(diff, "t/1.0.patch")
    return file


def test_clean() -> None:
    after, (match,) = apply_hunks(one(), "a\nb\nc\nd\ne\n")
    assert (after, match.kind, match.line) == ("a\nb\nC\nd\ne\n", MatchKind.CLEAN, 2)


def test_offset() -> None:
    after, (match,) = apply_hunks(one(), "x\ny\na\nb\nc\nd\n")
    assert (after, match.kind, match.offset) == ("x\ny\na\nb\nC\nd\n", MatchKind.OFFSET, 2)


def test_a_moved_hunk_that_matches_twice_is_refused() -> None:
    after, (match,) = apply_hunks(one(), "x\ny\nz\nb\nc\nd\nb\nc\nd\n")
    assert after is None
    assert (match.kind, match.found) == (MatchKind.AMBIGUOUS, ("line 4", "line 7"))


def test_a_hunk_in_its_place_may_match_elsewhere_too() -> None:
    after, (match,) = apply_hunks(one(), "a\nb\nc\nd\nb\nc\nd\n")
    assert (after, match.kind) == ("a\nb\nC\nd\nb\nc\nd\n", MatchKind.CLEAN)


def test_no_fuzz() -> None:
    after, (match,) = apply_hunks(one(), "a\nB\nc\nd\n")
    assert after is None
    assert match.kind is MatchKind.CONFLICT
    assert match.found == ("B\n", "c\n", "d\n")


def test_a_hunk_at_the_start_of_the_file_stays_there() -> None:
    # git's rule; GNU patch would move it.
    at_start = DIFF.replace("@@ -2,3 +2,3 @@", "@@ -1,3 +1,3 @@")
    after, (match,) = apply_hunks(one(at_start), "x\nb\nc\nd\n")
    assert (after, match.kind) == (None, MatchKind.CONFLICT)


def test_a_hunk_without_trailing_context_stays_at_the_end() -> None:
    at_end = DIFF.replace("@@ -2,3 +2,3 @@", "@@ -2,2 +2,2 @@").removesuffix(" d\n")
    assert apply_hunks(one(at_end), "x\na\nb\nc\n")[1][0].kind is MatchKind.OFFSET
    assert apply_hunks(one(at_end), "x\na\nb\nc\nd\n")[1][0].kind is MatchKind.CONFLICT


def test_missing_file() -> None:
    after, (match,) = apply_hunks(one(), None)
    assert after is None
    assert match.found == ("no such file in this release",)


def test_no_newline_at_end() -> None:
    diff = DIFF.replace(" d\n", " d\n\\ No newline at end of file\n")
    after, (match,) = apply_hunks(one(diff), "a\nb\nc\nd")
    assert (after, match.kind) == ("a\nb\nC\nd", MatchKind.CLEAN)


def test_reverse_finds_what_is_applied_already() -> None:
    assert is_applied([one()], {"f.py": "a\nb\nC\nd\n"})
    assert not is_applied([one()], {"f.py": "a\nb\nc\nd\n"})


def test_form_feed_is_no_line_end() -> None:
    assert split_lines("a\x0cb\nc\u2028d") == ["a\x0cb\n", "c\u2028d"]


@given(st.lists(st.text("ab\n\r\x0c", max_size=4)))
def test_lines_join_to_the_text(parts: list[str]) -> None:
    text = "".join(parts)
    assert "".join(split_lines(text)) == text


@given(st.text(max_size=60))
def test_safe_paths_stay_below_the_root(path: str) -> None:
    if is_safe_path(path):
        assert not path.startswith("/")
        assert ".." not in path.split("/")


@given(st.text(alphabet=st.sampled_from("diff-git ab/+@1,\n\\r x"), max_size=200))
def test_any_text_is_a_diff_or_an_error(text: str) -> None:
    with contextlib.suppress(OverlayError):
        assert parse_diff("diff --git a/f b/f\n" + text, "t/1.0.patch")


def test_a_file_touched_twice_is_refused() -> None:
    with pytest.raises(OverlayError, match=r"touches f\.py twice"):
        parse_diff(DIFF + DIFF, "t/1.0.patch")
