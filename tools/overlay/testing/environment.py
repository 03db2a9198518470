"""Environments with a vLLM release installed, made with uv as a user would."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.releases.uv import UvCache, choose_python, find_uv
from overlay.releases.versions import Release

#: Seconds; importing torch and vLLM for the first time compiles thousands of files.
IMPORT_TIMEOUT = 300.0


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path
    release: Release
    cache: UvCache

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @classmethod
    def create(cls, folder: Path, release: Release, allowed: str, cache: Path) -> Environment:
        """Make an empty one in `folder`, in place of any that is there.

        `allowed` are the Python versions to choose from, `cache` is the overlay's cache.

        Raises:
            OverlayError: no such Python, or the folder can't be written.
        """
        environment = cls(folder, release, UvCache.open(cache, release))
        python = choose_python(allowed)
        environment._uv("venv", "--quiet", "--clear", "--python", python, str(folder))
        return environment

    def install(self, *requirements: str) -> None:
        """``uv pip install`` of `requirements`, with the release's constraints and overrides.

        Raises:
            OverlayError: uv refuses; its last words are in the error.
        """
        self.cache.touch()
        overrides = self.folder / "overrides.txt"
        overrides.write_text("\n".join(self.release.overrides), "utf-8")
        self._uv(
            "pip", "install", "--quiet", "--python", str(self.python),
            "--overrides", str(overrides), *self.release.constraints, *requirements,
        )  # fmt: skip

    def build(self, package: Path, folder: Path) -> None:
        """Build the source tree `package` with what is installed, and put it into `folder`.

        A process has it that has `folder` on its PYTHONPATH.

        Raises:
            OverlayError: it does not build; uv's last words are in the error.
        """
        self._uv(
            "pip", "install", "--quiet", "--python", str(self.python), "--no-deps",
            "--no-build-isolation", "--target", str(folder), str(package),
        )  # fmt: skip

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

    def version(self) -> str:
        """Its Python's version, as venv writes it down."""
        for line in (self.folder / "pyvenv.cfg").read_text("utf-8").splitlines():
            key, _, value = line.partition("=")
            if key.strip() in ("version", "version_info"):
                return value.strip()
        return ""

    def _uv(self, *arguments: str) -> None:
        log_for(self.release.name).debug("uv %s", " ".join(arguments))
        done = subprocess.run(
            [find_uv(), *arguments],
            env=self.cache.env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise OverlayError(
                f"{self.release.name}: uv {' '.join(arguments[:2])} failed",
                " ".join(words[-3:]) or f"it exited {done.returncode}",
                "Check the network, the disk and uv's index settings (UV_INDEX_URL)",
                Exit.ENVIRONMENT,
            )


def import_check(cache: Path, release: Release, allowed: str, wheel: Path, project: str) -> str:
    """Install `wheel` into a throwaway environment and import it. Returns the version it says.

    torch is named beside it, since a wheel built for no device asks for none.

    Raises:
        OverlayError: it can't be installed or imported.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        environment = Environment.create(Path(folder, "venv"), release, allowed, cache)
        environment.install(str(wheel), f"torch=={release.torch}")
        script = f"import {project}; print({project}.__version__)"
        done = environment.run(["-c", script], {}, Path(folder), IMPORT_TIMEOUT)
        environment.cache.forget(project)
    if done.returncode:
        raise OverlayError(
            f"{release.name}: {wheel.name} does not import",
            (done.stderr.strip().splitlines() or ["it said nothing"])[-1],
            "Report it with the output of --verbose",
            Exit.PROBLEMS,
        )
    return done.stdout.strip().splitlines()[-1]
