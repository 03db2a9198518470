"""Patches as text: read with git, and without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from overlay.base.errors import OverlayError
from overlay.base.git import Git
from overlay.patches.patch import Mail, parse_canonical, parse_mail

PATCHES = Path(__file__).parents[3] / "patches"
NAMES = sorted(path.relative_to(PATCHES).as_posix() for path in PATCHES.glob("*/*.patch"))
MAIL = b"""From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: =?UTF-8?q?J=C3=BCrgen=20Tester?= <juergen@example.org>
Date: Sun, 22 Nov 2026 12:00:00 +0000
Subject: [Bugfix] A subject that is so long that git folds it into a second line,
 as it does
MIME-Version: 1.0
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit

It fails for J\xc3\xbcrgen.

Origin: vendor

diff --git a/a.py b/a.py
--- a/a.py
+++ b/a.py
@@ -1 +1 @@
-diff --git
+A = 1
"""


def same(data: bytes, folder: Path) -> tuple[Mail, Mail]:
    return parse_mail(Git(folder / "none"), data, "it"), parse_canonical(data, "it")


@pytest.mark.parametrize("name", NAMES)
def test_git_is_not_needed_to_read_ours(tmp_path: Path, name: str) -> None:
    by_git, alone = same((PATCHES / name).read_bytes(), tmp_path)
    assert by_git == alone
    assert by_git.message == alone.message


def test_names_and_folded_subjects(tmp_path: Path) -> None:
    by_git, alone = same(MAIL, tmp_path)
    assert by_git == alone
    assert alone.author == "J\u00fcrgen Tester"
    assert alone.subject.endswith("second line, as it does")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"text\n",
        MAIL.replace(b"From: ", b"X-From: "),
        MAIL.replace(b"<juergen@example.org>", b""),
        MAIL.replace(b"Date: ", b"X-Date: "),
        MAIL.replace(b"Subject: ", b"X-Subject: "),
        MAIL.replace(b"From: ", b"From: a <a@example.org>, "),
    ],
)
def test_what_is_no_mail(data: bytes) -> None:
    with pytest.raises(OverlayError, match="is no git mail"):
        parse_canonical(data, "it")


NO_MAILS = {
    b"": "it is empty",
    b"\xff": "it is not UTF-8",
    b"Subject: x\n\n": "header",
    b"From: a <b@c>\nDate: x\n\n": "header",
}


@pytest.mark.parametrize("data", NO_MAILS)
def test_no_mail_is_told_in_plain_words(tmp_path: Path, data: bytes) -> None:
    """With no word of Python's, and of no temporary file."""
    with pytest.raises(OverlayError, match=NO_MAILS[data]) as by_git:
        parse_mail(Git(tmp_path / "none"), data, "it")
    with pytest.raises(OverlayError, match=NO_MAILS[data]) as alone:
        parse_canonical(data, "it")
    for caught in (by_git, alone):
        assert not re.search(r"NoneType|unpack|/tmp|vllm-overlay-", str(caught.value))


def test_two_authors() -> None:
    data = MAIL.replace(b"<juergen@example.org>", b"<juergen@example.org>, A B <a@example.org>")
    with pytest.raises(OverlayError, match="its header can't be read") as caught:
        parse_canonical(data, "it")
    assert "unpack" not in str(caught.value)
