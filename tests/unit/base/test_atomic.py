"""Files that have their name once they are complete."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from overlay.base import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_mode_is_not_the_umask_s(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        atomic.put(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.put(target, b"old")

    def interrupted() -> None:
        with atomic.writing(target) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_what_was_left_is_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.part_of(target).write_bytes(b"longer than what comes now")
    atomic.put(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_second_name_of_another_file_is_not_written_through(tmp_path: Path) -> None:
    other, target = tmp_path / "other", tmp_path / "a"
    other.write_bytes(b"mine")
    atomic.part_of(target).hardlink_to(other)
    atomic.put(target, b"new")
    assert (other.read_bytes(), target.read_bytes()) == (b"mine", b"new")


def test_nor_is_a_link(tmp_path: Path) -> None:
    other, target = tmp_path / "other", tmp_path / "a"
    other.write_bytes(b"mine")
    atomic.part_of(target).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        atomic.put(target, b"new")
    assert other.read_bytes() == b"mine"


def test_two_at_once_write_one_after_the_other(tmp_path: Path) -> None:
    target = tmp_path / "a"
    data = [bytes([number]) * 100_000 for number in range(8)]

    def write(one: bytes) -> None:
        with atomic.writing(target) as stream:
            for start in range(0, len(one), 1000):
                stream.write(one[start : start + 1000])

    threads = [threading.Thread(target=write, args=(one,)) for one in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in data
    assert names(tmp_path) == ["a"]
