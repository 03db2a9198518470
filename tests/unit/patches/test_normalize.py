"""normalize: what quilt or a hand made of a patch is canonical text again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream
from overlay.base.errors import OverlayError
from overlay.patches.hunks import parse_diff
from overlay.patches.normalize import tidy

Run = Callable[..., Ran]
PATCH = "attention-signatures/1.0.patch"


def as_quilt(text: str) -> str:
    """As `quilt refresh` writes it: no git headers, Index lines, folders for a/ and b/, times."""
    text = re.sub(r"^(index|new file mode) .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(
        r"^diff --git a/(.*) b/.*\n", rf"Index: vllm-1.0/\1\n{'=' * 67}\n", text, flags=re.MULTILINE
    )
    text = re.sub(r"^--- a/(.*)", r"--- vllm-1.0.orig/\1\t2026-11-22 12:00:00", text, flags=re.M)
    return re.sub(r"^\+\+\+ b/(.*)", r"+++ vllm-1.0/\1\t2026-11-22 12:00:01", text, flags=re.M)


def wrong_counts(text: str) -> str:
    return re.sub(r"^@@ -\d+,\d+ \+\d+,\d+ @@.*", "@@ -7,99 +7,1 @@ class", text, flags=re.M)


def no_trailing_space(text: str) -> str:
    header, start, diff = text.partition("diff --git")
    return header + start + re.sub(r"^ $", "", diff, flags=re.M)


def signed(text: str) -> str:
    return text + "-- \n2.39.5\n"


def stat(text: str) -> str:
    return text.replace("\n\ndiff", "\n---\n vllm/attention.py | 2 +-\n 1 file changed\n\ndiff", 1)


def other_mail(text: str) -> str:
    return text.partition("\n")[2]


@pytest.mark.parametrize(
    "spoil", [as_quilt, wrong_counts, no_trailing_space, signed, stat, other_mail]
)
def test_canonical_again(run: Run, upstream: Upstream, spoil: Callable[[str], str]) -> None:
    file = upstream.patches / PATCH
    text = file.read_text()
    file.write_text(spoil(text))
    assert file.read_text() != text
    checked = run("normalize", str(file), "--check")
    assert (checked.status, file.read_text()) == (1, spoil(text))
    for arguments in ((str(file),), (PATCH,), ("--all",)):
        file.write_text(spoil(text))
        ran = run("normalize", *arguments)
        assert (ran.status, ran.err) == (0, "")
        assert f"patches/{PATCH}: written" in ran.out
        assert file.read_text() == text
    assert "0 of 1 patches changed" in run("normalize", "--all").out


def test_what_the_header_lacks_is_told(run: Run, upstream: Upstream) -> None:
    file = upstream.patches / PATCH
    text = file.read_text()
    file.write_text(as_quilt(text).replace("Bug: https://example.org/issues/1\n", ""))
    ran = run("normalize", PATCH)
    assert ran.status == 1
    assert f"patches/{PATCH}: no trailer Bug" in ran.err
    assert "\ndiff --git a/" in file.read_text()
    for header in ("From: A", "Date:", "Subject:"):
        bare = re.sub(rf"^{header}.*\n", "", text, flags=re.M)
        file.write_text(bare)
        ran = run("normalize", PATCH)
        assert ran.status == 5
        assert f"there is no {header.split(':')[0]}: header in it" in ran.err
        assert file.read_text() == bare


def test_a_change_that_does_not_apply_is_left_as_it_is(run: Run, upstream: Upstream) -> None:
    file = upstream.patches / PATCH
    text = as_quilt(file.read_text()).replace(" self.num_heads = num", " self.heads = num")
    file.write_text(text)
    ran = run("normalize", PATCH)
    assert ran.status == 5
    assert "expects" in ran.err
    assert file.read_text() == text


def test_a_patch_that_is_not_there(run: Run, upstream: Upstream) -> None:
    (upstream.patches / PATCH).unlink()
    ran = run("normalize", "--all")
    assert (ran.status, ran.out) == (5, "")
    assert "cannot read the patch" in ran.err


def test_usage(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "0.8.3.patch").write_text("")
    other = upstream.patches / "attention-signatures/1.1.patch"
    other.write_bytes((upstream.patches / PATCH).read_bytes())
    for arguments, status, text in (
        ((), 2, "name one or more files, or pass --all"),
        ((PATCH, "--all"), 2, "name one or more files, or pass --all"),
        (("gone/1.0.patch",), 2, "no such file"),
        ((str(tmp_path / "0.8.3.patch"),), 2, "is no patch of this overlay"),
        ((str(other),), 5, "is not in the series of 1.1"),
    ):
        ran = run("normalize", *arguments)
        assert (ran.status, ran.out) == (status, ""), arguments
        assert text in ran.err


@pytest.mark.parametrize(
    "body",
    [
        # A removed line that looks like a file's header, and one that looks like a signature.
        "@@ -1,3 +1,2 @@\n a\n--- b\n+++ c\n-- \n",
        "@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n",
        "@@ -1,2 +1,2 @@\n-a\n+b\n c\n@@ -10,1 +10,3 @@\n+x\n d\n+y\n@@ -20,2 +21,0 @@\n-e\n-f\n",
        "@@ -4,0 +5,2 @@\n+a\n+b\n@@ -9,1 +11,1 @@\n-c\n+d\n",
    ],
)
def test_the_hunks_stay_what_they_are(body: str) -> None:
    diff = f"diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n{body}"
    assert parse_diff(tidy(diff, "it"), "it") == parse_diff(diff, "it")


def test_made_and_deleted_files() -> None:
    diff = (
        "--- /dev/null\t1970-01-01\n+++ v/new.py\n@@ -0,0 +1 @@\n+a\n"
        "--- v.orig/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n"
    )
    made, deleted = parse_diff(tidy(diff, "it"), "it")
    assert (made.path, made.is_new, made.is_deleted) == ("new.py", True, False)
    assert (deleted.path, deleted.is_new, deleted.is_deleted) == ("old.py", False, True)


@pytest.mark.parametrize("refused", ["rename from a.py", "old mode 100644", "GIT binary patch"])
def test_what_a_patch_may_not_do_is_still_seen(refused: str) -> None:
    diff = f"diff --git a/a.py b/a.py\n{refused}\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a\n+b\n"
    with pytest.raises(OverlayError, match="is broken"):
        parse_diff(tidy(diff, "it"), "it")


def test_a_line_of_no_hunk() -> None:
    with pytest.raises(OverlayError, match="no line of a diff"):
        tidy("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\nno line\n", "it")
