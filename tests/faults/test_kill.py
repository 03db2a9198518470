"""kill -9 at 50 points of fetch, apply and build: a rerun gives what an undisturbed run gives."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from made_upstream import Upstream

from .tool import Counter, Place, Truth, go, kill_at, require_same, require_whole, spread

#: At a write of the tool's; while git is at work; in the middle of a file.
AT_WRITES, IN_GIT, IN_FILES = 34, 10, (1, 200, 1000, 2000, 4000, 6000)
POINTS = AT_WRITES + IN_GIT + len(IN_FILES)

GIT = """#!/bin/sh
echo >>"$GIT_CALLS"
[ "$(wc -l <"$GIT_CALLS")" -ne "$KILL_AT" ] || { "$REAL_GIT" "$@" <&0 & kill -9 0; }
exec "$REAL_GIT" "$@"
"""


def test_there_are_50_points() -> None:
    assert POINTS == 50


def test_killed_at_a_write(patched: Upstream, undisturbed: Truth, tmp_path: Path) -> None:
    counter = Counter()
    assert go(*Place.below(patched, tmp_path / "all").all, before=kill_at(0, counter)).status == 0
    points = spread(AT_WRITES, counter.value)
    for point in points:
        place = Place.below(patched, tmp_path / str(point))
        assert go(*place.all, before=kill_at(point, Counter())).status == -signal.SIGKILL
        require_whole(place, undisturbed)
        require_same(place, undisturbed)
    assert len(set(points)) == AT_WRITES


def killing_git(folder: Path, at: int) -> tuple[Path, Callable[[], None]]:
    """A list of git's calls, and what makes the whole run die at its `at`th (0: never)."""
    calls = folder / "calls"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "git"
    program.write_text(GIT)
    program.chmod(0o755)

    def before() -> None:
        os.environ.update(
            REAL_GIT=shutil.which("git") or "", GIT_CALLS=str(calls), KILL_AT=str(at),
            PATH=f"{program.parent}:{os.environ['PATH']}",
        )  # fmt: skip

    return calls, before


def test_killed_while_git_works(patched: Upstream, undisturbed: Truth, tmp_path: Path) -> None:
    calls, count = killing_git(tmp_path / "all", 0)
    assert go(*Place.below(patched, tmp_path / "all").all, before=count).status == 0
    points = spread(IN_GIT, len(calls.read_text().splitlines()))
    for point in points:
        place = Place.below(patched, tmp_path / str(point))
        _, before = killing_git(tmp_path / str(point), point)
        assert go(*place.all, before=before).status == -signal.SIGKILL
        require_whole(place, undisturbed)
        require_same(place, undisturbed)
    assert len(set(points)) == IN_GIT


def test_killed_in_the_middle_of_a_file(
    patched: Upstream, undisturbed: Truth, tmp_path: Path
) -> None:
    for size in IN_FILES:

        def before(size: int = size) -> None:
            # The signal of a file that grows too large ends a process as abruptly as SIGKILL.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        place = Place.below(patched, tmp_path / str(size))
        assert go(*place.all, before=before).status == -signal.SIGXFSZ
        require_whole(place, undisturbed)
        require_same(place, undisturbed)
    assert len(IN_FILES) == 6


def test_a_store_whose_making_was_cut_short(
    patched: Upstream, undisturbed: Truth, tmp_path: Path
) -> None:
    """git init, killed; git fast-import, killed while it held the lock of the ref."""
    stale = [
        ".git-abc/git/HEAD",
        f"git/refs/overlay/base/{patched.workspace().versions.get('1.0').sdist.sha256}.lock",
    ]
    for number, name in enumerate(stale):
        place = Place.below(patched, tmp_path / str(number))
        if name.startswith("git/"):
            require_same(place, undisturbed)
            shutil.rmtree(place.cache / "git" / "refs" / "overlay")
        file = place.cache / name
        file.parent.mkdir(parents=True)
        file.write_text("")
        require_same(place, undisturbed)
    assert len(stale) == 2
