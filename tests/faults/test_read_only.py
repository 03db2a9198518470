"""A cache that nobody may write to serves what only reads upstream's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from made_upstream import Upstream

from .tool import Place, as_nobody, go, with_matrix

NAME = "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"


@pytest.fixture
def shared(patched: Upstream) -> Iterator[Place]:
    """A cache with all files and no more, and a checkout, where other users may look."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        place = Place.below(with_matrix(patched, folder), folder)
        assert go(place.command("fetch", "--all")).status == 0
        yield place


def commands(place: Place) -> dict[str, tuple[str, ...]]:
    """What is promised of such a cache, by name."""
    output = str(place.dist / "report.html")
    words = {
        "build": ("build", "1.0", "--out", str(place.dist)),
        "verify": ("verify", str(place.dist / NAME)),
        "validate": ("validate", "--all"),
        "status": ("status",),
        "series": ("series", "1.0"),
        "show": ("show", "attention-signatures"),
        "report": ("report", "--output", output),
        "apply": ("apply", "1.0", str(place.work)),
    }
    return {name: ("--offline", *place.command(*each)) for name, each in words.items()}


def entries(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@contextmanager
def mounted(place: Place, _warm: Place) -> Iterator[tuple[Place, Callable[[], None]]]:
    """As whoever this is, on a disk that is mounted read-only."""
    folder = str(place.cache)
    for options in (("--bind",), ("-o", "remount,bind,ro")):
        command = ("mount", *options, folder, folder)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield place, lambda: None
    finally:
        subprocess.run(("umount", "-l", folder), check=True)


@contextmanager
def of_another_user(place: Place, warm: Place) -> Iterator[tuple[Place, Callable[[], None]]]:
    """As nobody, in a folder of root's; where this is not root, in one without its write bits."""
    mine = place.cache.parent / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    used = replace(place, work=mine / "work", dist=mine / "dist")
    if os.geteuid() == 0:
        shutil.copytree(place.cache, warm.cache)
        yield used, as_nobody(*commands(warm).values())
        return
    folders = [place.cache, *(path for path in place.cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield used, lambda: None
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("with_objects", [False, True], ids=["files alone", "objects too"])
@pytest.mark.parametrize("closed", [mounted, of_another_user])
def test_all_that_reads(
    shared: Place,
    tmp_path: Path,
    closed: Callable[..., AbstractContextManager[tuple[Place, Callable[[], None]]]],
    with_objects: bool,
) -> None:
    if with_objects:
        assert go(shared.command("validate", "--all")).status == 0
    before = entries(shared.cache)
    with closed(shared, Place.below(shared.upstream, tmp_path)) as (place, become):
        ended = go(*commands(place).values(), before=become)
    assert ended.status == 0, ended
    for name in (NAME, "report.html"):
        assert (place.dist / name).is_file()
    assert (place.work / "tests/test_irope.py").is_file()
    assert entries(shared.cache) == before
