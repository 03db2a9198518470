"""uv, which makes environments and builds: where it is, and its caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from overlay.base.errors import Exit, OverlayError
from overlay.base.locking import file_lock
from overlay.releases.versions import Release

#: uv caches kept, one a torch version.
KEEP = 2
#: Seconds after its last use until a cache counts as idle: another run may be installing.
IDLE = 300.0


def find_uv() -> str:
    """uv's executable: beside this Python (it is a dependency), else on the PATH.

    Raises:
        OverlayError: there is none.
    """
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if not found:
        raise OverlayError(
            "uv is missing",
            "environments and source builds are made with it",
            "Install it: pip install uv",
            Exit.ENVIRONMENT,
        )
    return found


def choose_python(allowed: str) -> str:
    """What to pass to uv's --python: this interpreter if `allowed` admits it, else the range,
    for uv to find or fetch one."""
    mine = ".".join(map(str, sys.version_info[:3]))
    return sys.executable if SpecifierSet(allowed).contains(mine) else allowed


@dataclass(frozen=True)
class UvCache:
    """uv's cache for the releases that pin one torch, under the overlay's own cache.

    Environments are hard links into it, so releases with the same torch share its 6 to 8 GB.
    At most `KEEP` such caches stay, so that the whole matrix fits a small disk; uv's cache of
    the user is left alone.
    """

    folder: Path

    @classmethod
    def open(cls, cache: Path, release: Release) -> UvCache:
        """The cache for `release`'s torch; those used longest ago are deleted."""
        found = cls.of(cache, release)
        root = found.folder.parent
        found.folder.mkdir(parents=True, exist_ok=True)
        found.touch()
        with file_lock(cache / "uv.lock"):  # two runs must not prune at once
            by_age = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in by_age[KEEP:]:
                if time.time() - old.stat().st_mtime > IDLE:
                    shutil.rmtree(old, ignore_errors=True)
        return found

    @classmethod
    def of(cls, cache: Path, release: Release) -> UvCache:
        """The same, as it is: there may be none."""
        return cls(cache / "uv" / f"torch-{release.torch}")

    def unpacked(self, project: str, version: str) -> Path | None:
        """Where uv has unpacked a wheel of `project`; None if it has not, or has it elsewhere in
        its cache than its versions to 0.13 do."""
        found = self.folder.glob(f"archive-v*/*/{project}-{version}.dist-info")
        return next((info.parent for info in found), None)

    def touch(self) -> None:
        """Mark it as in use."""
        os.utime(self.folder)

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, with uv told to use it."""
        return {**os.environ, "UV_CACHE_DIR": str(self.folder)}

    def forget(self, project: str) -> None:
        """Drop what is unpacked of `project`: each of its wheels is used once."""
        subprocess.run([find_uv(), "cache", "clean", "--quiet", project], env=self.env, check=False)
