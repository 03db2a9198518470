"""A lock that can't be had is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import Timeout

from overlay.base.locking import file_lock


def test_one_holds_it(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(Timeout), file_lock(tmp_path / "lock", 0):
        pytest.fail("two hold it")


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_lock(tmp_path / "gone/lock")
