"""What is no plain file is refused at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from overlay.base import plain_file


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def enormous(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "no plain file"),
        (endless, "no plain file"),
        (Path.mkdir, "Is a directory"),
        (enormous, "1099511627776 bytes"),
        (lambda path: None, "No such file"),
    ],
    ids=["FIFO", "device", "folder", "gigabytes", "nothing"],
)
def test_refused(tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(OSError, match=re.escape(why)) as caught:
        plain_file.read(path)
    assert caught.value.filename in (path, str(path))


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a\r\nb")
    (tmp_path / "link").symlink_to("file")
    assert plain_file.read(tmp_path / "link") == b"a\r\nb"
    assert plain_file.read_text(tmp_path / "link") == (tmp_path / "file").read_text() == "a\nb"


def test_a_folder_of_plain_files_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below/file").write_text("x")
    plain_file.copy_tree(source, tmp_path / "copy")
    assert (tmp_path / "copy/below/file").read_text() == "x"
    os.mkfifo(source / "below/fifo")
    with pytest.raises(OSError, match="no plain file"):
        plain_file.copy_tree(source, tmp_path / "other")
