"""Patches as text: read with git, and without it."""

from __future__ import annotations

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
