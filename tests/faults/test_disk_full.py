"""A full disk in cache, work and dist: one line, nothing half-done, and a rerun succeeds."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
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


#: What reads alone, or writes elsewhere, and needs room for temporary files all the same.
READERS: tuple[tuple[str, ...], ...] = (
    ("verify", "WHEEL"),
    ("verify", "--official", "WHEEL"),
    ("validate", "--all"),
    ("status",),
    ("series", "1.1"),
    ("show", "attention-signatures"),
    ("build", "1.1", "--out", "OUT"),
    ("selfcheck", "1.1"),
    ("refresh", "--all", "--check"),
    ("normalize", "attention-signatures/1.0.patch"),
)


def readers(place: Place, wheel: Path) -> Iterator[tuple[str, ...]]:
    for words in READERS:
        named = {"WHEEL": str(wheel), "OUT": str(place.dist)}
        yield place.command(*(named.get(word, word) for word in words))


@pytest.fixture
def built(patched: Upstream, tmp_path: Path) -> tuple[Place, Path]:
    """A wheel, and a cache with all that is needed."""
    place = Place.below(patched, tmp_path)
    assert go(place.build, place.command("validate", "--all")).status == 0
    (wheel,) = place.dist.iterdir()
    return place, wheel


@pytest.mark.parametrize("size", [0, 100])
def test_temporary_files_that_may_not_grow(built: tuple[Place, Path], size: int) -> None:
    """Git, too, may write no more: what it leaves half-done is not taken for the patch's fault."""
    for command in readers(*built):
        ended = go(command, before=limited(size))
        assert ended.status in (0, 6), (command, ended)
        assert ended.is_message is bool(ended.status), (command, ended)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
@pytest.mark.parametrize("left", [0, 4096, 20480])
def test_no_room_for_temporary_files(built: tuple[Place, Path], tmp_path: Path, left: int) -> None:
    full = tmp_path / "full"
    with disk(full, "size=1m"):
        filler = full / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass
        os.truncate(filler, filler.stat().st_size - left)

        def before() -> None:
            os.environ["TMPDIR"] = tempfile.tempdir = str(full)

        for command in readers(*built):
            ended = go(command, before=before)
            assert ended.status in (0, 6), (command, ended)
            assert ended.is_message is bool(ended.status), (command, ended)


def test_no_folder_for_temporary_files(
    built: tuple[Place, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "gone")])

    def before() -> None:
        tempfile.tempdir = None

    for command in readers(*built):
        ended = go(command, before=before)
        assert (ended.status, ended.is_message) == (6, True), (command, ended)
        assert "TMPDIR" in ended.err


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
