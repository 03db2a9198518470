"""The cache of upstream's files, and how they get there.

A file has its name in the cache only once its size and sha256 are those of VERSIONS.toml.
Until then it is `<name>.part`, which a later run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from overlay.base.console import Progress
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.base.locking import file_lock
from overlay.releases.versions import PinnedFile, Release

if TYPE_CHECKING:
    from unearth import Link

    from overlay.releases.download import Downloader
    from overlay.releases.index import IndexSettings

Kind = Literal["sdist", "wheel"]


@dataclass(frozen=True)
class Cache:
    """Upstream's files on this machine, one folder for all runs at once."""

    folder: Path

    def path(self, pinned: PinnedFile) -> Path:
        """Where the file lies, or will lie, once it is complete."""
        return self.folder / "files" / pinned.file

    def has(self, pinned: PinnedFile) -> bool:
        """Whether it is there with the right size."""
        path = self.path(pinned)
        return path.is_file() and path.stat().st_size == pinned.size


@dataclass(frozen=True)
class Fetcher:
    """Gets files into a cache."""

    cache: Cache
    project: str
    """Name on the package index."""
    settings: Callable[[], IndexSettings] | None = None
    """Asked once, and only when something has to be fetched; else pip's are."""
    offline: bool = False
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def _downloader(self) -> Downloader:
        # Most commands fetch nothing, and an HTTP client takes long to import.
        from overlay.releases.download import Downloader

        return Downloader(self.project, self.settings, self.progress)

    def fetch(self, release: Release, kind: Kind, *, check: bool = False) -> Path:
        """The release's file in the cache, fetched if it is not there.

        `check` reads it again to compare its sha256, even if it was there.

        Raises:
            OverlayError: it is unavailable, or is not the file that is pinned.
        """
        pinned: PinnedFile = getattr(release, kind)
        if self.offline and not self.cache.has(pinned):
            raise OverlayError(
                f"{release.name}: {pinned.file} is not in the cache",
                f"{self.cache.path(pinned).parent} does not hold it and --offline forbids fetching",
                f"Run 'vllm-overlay fetch {release.asked} --{kind}' with a network",
                Exit.UNAVAILABLE,
            )
        return self.fetch_file(release.name, pinned, check=check)

    def fetch_file(self, name: str, pinned: PinnedFile, *, check: bool = False) -> Path:
        """Like `fetch`, for a file of release `name` that VERSIONS.toml need not know.

        Raises:
            OverlayError: it is unavailable, or is not the file that is pinned.
        """
        path = self.cache.path(pinned)
        if path.is_dir():
            raise OverlayError(
                f"{name}: {path} is in the way",
                "it is a folder, and the file belongs there",
                "Delete it, or name another cache with VLLM_OVERLAY_CACHE",
                Exit.ENVIRONMENT,
            )
        if self.cache.has(pinned):
            if check and sha256(path) != pinned.sha256:
                raise damaged(name, path)
            return path
        with self._lock(path):
            if not self.cache.has(pinned):  # another run may have fetched it meanwhile
                self._downloader.fetch(name, pinned, path)
        return path

    def listed(self) -> list[Link]:
        """Every file of the project that the index or a folder of the settings lists.

        Raises:
            OverlayError: one of them does not answer, none knows it, or --offline forbids asking.
        """
        if self.offline:
            raise OverlayError(
                f"cannot list the releases of {self.project}",
                "the index has to be asked, which --offline forbids",
                "Run it without --offline",
                Exit.USAGE,
            )
        return self._downloader.listed()

    def pin(self, link: Link) -> PinnedFile:
        """The file's pin: the sha256 that the index states, and its size.

        A local file is read where nothing states its sha256.

        Raises:
            OverlayError: the index states none, or the file's server does not answer.
        """
        return self._downloader.pin(link)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(path.with_name(path.name + ".lock")):
                yield
        except OSError as error:
            raise OverlayError(
                f"cannot write the cache {path.parent}",
                error.strerror or str(error),
                "Free some room or make it writable, or name another folder with "
                "VLLM_OVERLAY_CACHE",
                Exit.ENVIRONMENT,
            ) from error


def damaged(name: str, path: Path) -> OverlayError:
    """The error for a cached file that is not, or no longer, the one pinned."""
    return OverlayError(
        f"{name}: {path} is damaged",
        "its sha256 is not the one pinned",
        "Delete it and run the command again",
        Exit.INTEGRITY,
    )
