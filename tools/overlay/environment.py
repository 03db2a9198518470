"""Environments with a vLLM release installed, made with uv as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from overlay.console import log_for
from overlay.errors import Exit, OverlayError
from overlay.versions import Release


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
class Environment:
    """A virtual environment."""

    folder: Path
    release: Release

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @classmethod
    def create(cls, folder: Path, release: Release, python: str) -> Environment:
        """Make an empty one in `folder`, in place of any that is there.

        Raises:
            OverlayError: no such Python, or the folder can't be written.
        """
        environment = cls(folder, release)
        environment._uv("venv", "--quiet", "--clear", "--python", python, str(folder))
        return environment

    def install(self, *arguments: str) -> None:
        """``uv pip install`` into it.

        Raises:
            OverlayError: uv refuses; its last words are in the error.
        """
        self._uv("pip", "install", "--quiet", "--python", str(self.python), *arguments)

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python with `arguments`; `env` is added to a clean environment."""
        keep = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")
        clean = {key: os.environ[key] for key in keep if key in os.environ}
        return subprocess.run(
            [str(self.python), *arguments], env={**clean, **env}, cwd=cwd, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def _uv(self, *arguments: str) -> None:
        log_for(self.release.name).debug("uv %s", " ".join(arguments))
        done = subprocess.run([find_uv(), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise OverlayError(
                f"{self.release.name}: uv {' '.join(arguments[:2])} failed",
                " ".join(words[-3:]) or f"it exited {done.returncode}",
                "Check the network, the disk and uv's index settings (UV_INDEX_URL)",
                Exit.ENVIRONMENT,
            )
