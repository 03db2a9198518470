"""validate: each check finds its fault, and all faults are told."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from made_upstream import Ran, Upstream

Run = Callable[..., Ran]


def test_clean(run: Run) -> None:
    ran = run("validate", "--all")
    assert ran.status == 0, ran.err
    table = [line.split() for line in ran.out.splitlines()]
    assert ["1.0", "1", "as", "locked"] in table
    assert ["1.1", "0", "as", "locked", "attention-signatures", "offset", "+3"] in table
    assert "3 releases, 0 problems" in ran.out


def test_json(run: Run) -> None:
    ran = run("validate", "1.1", "--json")
    assert json.loads(ran.out) == {
        "releases": {
            "1.1": {
                "patches": {"attention-signatures": "offset +3"},
                "tree": "as locked",
                "problems": [],
            }
        },
        "problems": [],
    }


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("Origin: vendor\n", "", "no trailer Origin"),
        ("Signed-off-by: A Tester <tester@example.org>\n", "", "no trailer Signed-off-by"),
        ("Forwarded: no (made up)", "Forwarded: no", "trailer Forwarded: 'no' is not of the form"),
        ("Forwarded: no (made up)", "Forwarded: no ()", "trailer Forwarded: 'no ()' is not of"),
        ("Remove-When: https://example.org/pull/2\n", "", "no condition for its removal"),
        ("Remove-When: https://example.org/pull/2", "Remove-When: v1.2", "'v1.2' is not of the"),
        ("Remove-When: https://example.org/pull/2", "Remove-When: some day", "is not of the form"),
        ("Remove-When: ", "Applied-Upstream: v1.2, https://example.org/2\nRemove-When: ",
         "are two conditions"),
        ("Forwarded: no (made up)", "Forwarded: maybe", "trailer Forwarded: 'maybe' is not of"),
        ("Forwarded: no (made up)", "Forwarded: not-needed", "'not-needed' is not of the form"),
        ("Last-Update: 2026-11-22", "Last-Update: today", "trailer Last-Update"),
        ("Forwarded: no", "Reason: none\nForwarded: no", "unknown trailer Reason"),
        ("[Bugfix] Accept", "Accept", "has no upstream prefix"),
        ("Llama 4 passes use_irope, which the impl refuses with a TypeError.\n\n", "",
         "no justification"),
        ("Subject: ", "Subject:  ", "not canonical text (line 4"),
        ("index ", "index 1", "not canonical text"),
    ],
)  # fmt: skip
def test_headers_and_canonical_text(
    upstream: Upstream, run: Run, old: str, new: str, problem: str
) -> None:
    file = upstream.patches / "attention-signatures/1.0.patch"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    ran = run("validate", "--all")
    assert ran.status == 1
    assert problem in ran.err
    assert "Traceback" not in ran.err


def test_unlisted_missing_misnamed_and_unlocked_are_all_told(upstream: Upstream, run: Run) -> None:
    patch = upstream.patches / "attention-signatures/1.0.patch"
    for name in ("orphan/1.0.patch", "notes.txt", "series/2.0"):
        file = upstream.patches / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(patch.read_bytes())
    (upstream.patches / "series/1.0").write_text("# dropped\n")
    (upstream.patches / "series/1.1").write_text("gone/1.1.patch\n")
    ran = run("validate", "--all")
    assert ran.status == 1
    for problem in (
        "cannot read the patch gone/1.1.patch: No such file",
        "1.0: the tree after the series is",
        "patches/orphan/1.0.patch: no series lists it",
        "patches/attention-signatures/1.0.patch: no series lists it",
        "patches/notes.txt: its name is not",
        "patches/series/2.0: no release of VERSIONS.toml uses it",
    ):
        assert problem in ran.err
    assert "missing" in ran.out
    assert "6 problems" in ran.out


def test_first_tag_must_list_the_patch(upstream: Upstream, run: Run) -> None:
    (upstream.patches / "series/1.0").write_text("# dropped\n")
    ran = run("validate", "--all")
    assert "patches/attention-signatures/1.0.patch: series/1.0 does not list it" in ran.err


def test_a_broken_series_leaves_the_others_checked(upstream: Upstream, run: Run) -> None:
    (upstream.patches / "series/1.0").write_text("../x/1.0.patch\n")
    ran = run("validate", "--all")
    assert ran.status == 1
    assert "series/1.0 line 1: '../x/1.0.patch' is not <topic>/<first-tag>.patch" in ran.err
    assert "offset +3" in ran.out


def test_files_that_are_not_as_locked(upstream: Upstream, run: Run) -> None:
    file = upstream.root / "VERSIONS.toml"
    digest = upstream.workspace().versions.get("1.0").files
    file.write_text(file.read_text().replace(str(digest), "0" * 64, 1))
    ran = run("validate", "1.0")
    assert ran.status == 1
    assert "`files` in VERSIONS.toml is not what the series makes of the package" in ran.err


def test_lock_shows_old_and_new(upstream: Upstream, run: Run) -> None:
    (upstream.patches / "series/1.1").write_text("# none\n")
    before = (upstream.root / "VERSIONS.toml").read_text()
    dry = run("lock", "--all", "--dry-run")
    assert "1.1 tree: " in dry.out
    assert "1.1 files: " in dry.out
    assert "4 of 11 fields would change" in dry.out
    assert (upstream.root / "VERSIONS.toml").read_text() == before
    assert run("lock", "--all").status == 0
    assert run("validate", "--all").status == 0
