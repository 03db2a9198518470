"""Where the overlay's own files lie: VERSIONS.toml and patches/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from overlay.base.errors import Exit, OverlayError

ROOT_VARIABLE = "VLLM_OVERLAY_ROOT"
CACHE_VARIABLE = "VLLM_OVERLAY_CACHE"
_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "_data"


@dataclass(frozen=True)
class Project:
    """A checkout of the overlay, or the copy of its data inside the installed package."""

    root: Path

    @property
    def versions_file(self) -> Path:
        """VERSIONS.toml."""
        return self.root / "VERSIONS.toml"

    @property
    def patches(self) -> Path:
        """The folder that series and patch paths are relative to."""
        return self.root / "patches"

    def require_checkout(self) -> None:
        """Nothing, if patches can be edited here.

        Raises:
            OverlayError: it is the copy inside the installed package.
        """
        if self.root == _INSTALLED:
            raise OverlayError(
                "there is no checkout of the overlay here",
                "the patches inside the installed package are not for editing",
                f"Run inside a checkout, or pass --root or set {ROOT_VARIABLE}",
                Exit.USAGE,
            )


def find_project(root: Path | None = None) -> Project:
    """The project at `root`, at $VLLM_OVERLAY_ROOT, around the working folder, or as installed.

    Raises:
        OverlayError: none of them holds a VERSIONS.toml and a patches folder.
    """
    named = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    candidates = [named] if named else list(_implied_roots())
    for candidate in candidates:
        if (candidate / "VERSIONS.toml").is_file() and (candidate / "patches").is_dir():
            return Project(candidate.resolve())
    raise OverlayError(
        f"no overlay at {named or Path.cwd()}",
        "there is no VERSIONS.toml with a patches folder beside it",
        f"Run inside a checkout, or pass --root or set {ROOT_VARIABLE}",
        Exit.USAGE,
    )


def _implied_roots() -> Iterator[Path]:
    here = Path.cwd()
    yield from (here, *here.parents)
    yield _PACKAGE.parents[1]  # an editable install: tools/overlay/ in a checkout
    yield _INSTALLED


def cache_folder() -> Path:
    """$VLLM_OVERLAY_CACHE, or the user's cache folder (not created here)."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("vllm-overlay")
