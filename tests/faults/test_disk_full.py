"""A full disk in cache, work and dist: one line, nothing half-done, and a rerun succeeds."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from made_upstream import Upstream

from .tool import Place, Truth, go, require_same, require_whole

#: Largest file in bytes that may be written; upstream's made-up files have some 5,000.
SIZES = {
    "fetch": (1, 200, 1000, 3000, 4600),
    "apply": (1, 50, 200, 600, 1000),
    "build": (1, 200, 1000, 3000, 4600),
}
#: What the folder has for a disk of its own.
DISKS = {
    "cache": ("size=4k", "size=24k", "size=60k", "size=1m,nr_inodes=6"),
    "work": ("size=4k", "size=40k", "size=80k", "size=1m,nr_inodes=30"),
    "dist": ("size=4k", "size=8k", "size=1m,nr_inodes=1"),
}


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_files_that_may_not_grow(patched: Upstream, undisturbed: Truth, tmp_path: Path) -> None:
    """Each step in turn meets the limit, the ones before it not."""
    cases = 0
    for step, (name, sizes) in enumerate(SIZES.items()):
        for size in sizes:
            place = Place.below(patched, tmp_path / f"{name}-{size}")
            commands: Sequence[Sequence[str]] = (place.fetch, place.apply, place.build)
            assert go(*commands[:step]).status == 0
            ended = go(commands[step], before=limited(size))
            assert ended.is_message, (name, size, ended)
            require_whole(place, undisturbed)
            require_same(place, undisturbed)
            cases += 1
    assert cases == sum(map(len, SIZES.values())) == 15


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk of its own for a folder."""
    folder.mkdir(parents=True)
    command = ("mount", "-t", "tmpfs", "-o", options, "overlay-fault-test", str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
@pytest.mark.parametrize("name", DISKS)
def test_small_disks(patched: Upstream, undisturbed: Truth, tmp_path: Path, name: str) -> None:
    cases = 0
    for number, options in enumerate(DISKS[name]):
        place = Place.below(patched, tmp_path / str(number))
        where = {"cache": place.cache, "work": place.work.parent / "disk", "dist": place.dist}[name]
        if name == "work":  # the folder itself gets its name last, so its parent is what is full
            place = Place(patched, place.cache, where / "tree", place.dist)
        with disk(where, options):
            last = {"cache": place.all, "work": (place.apply,), "dist": (place.build,)}[name]
            ended = go(*last)
            assert ended.is_message, (options, ended)
            require_whole(place, undisturbed)
            larger = f"remount,{options.split(',')[0].split('=')[0]}=16m,nr_inodes=10000"
            subprocess.run(("mount", "-o", larger, str(where)), check=True)
            require_same(place, undisturbed)
        cases += 1
    assert cases == len(DISKS[name])


@pytest.mark.parametrize("words", [("fetch", "1.0"), ("validate", "--all"), ("--help",)])
def test_full_standard_output(patched: Upstream, tmp_path: Path, words: tuple[str, ...]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    place = Place.below(patched, tmp_path)
    command = [sys.executable, "-m", "overlay", *place.command(*words)]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 6, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Make room" in last, done.stderr
    assert "Traceback" not in done.stderr
