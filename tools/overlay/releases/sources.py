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
from typing import Literal

import httpx2
from filelock import FileLock
from unearth import Link
from unearth.fetchers import PyPIClient

from overlay.base.console import Progress
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.releases import index
from overlay.releases.versions import PinnedFile, Release

Kind = Literal["sdist", "wheel"]
HTTP_PARTIAL_CONTENT, HTTP_RANGE_NOT_SATISFIABLE = 206, 416


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
    settings: Callable[[], index.IndexSettings] = index.pip_settings
    """Asked once, and only when something has to be fetched."""
    offline: bool = False
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def _settings(self) -> index.IndexSettings:
        return self.settings()

    @cached_property
    def _http(self) -> PyPIClient:
        return index.client(self._settings)

    def fetch(self, release: Release, kind: Kind, *, check: bool = False) -> Path:
        """The release's file in the cache, fetched if it is not there.

        `check` reads it again to compare its sha256, even if it was there.

        Raises:
            OverlayError: it can't be had, or is not the file that is pinned.
        """
        pinned: PinnedFile = getattr(release, kind)
        if self.offline and not self.cache.has(pinned):
            raise OverlayError(
                f"{release.name}: {pinned.file} is not in the cache",
                f"{self.cache.path(pinned).parent} does not hold it and --offline forbids fetching",
                f"Run 'vllm-overlay fetch {release.name} --{kind}' with a network",
                Exit.UNAVAILABLE,
            )
        return self.fetch_file(release.name, pinned, check=check)

    def fetch_file(self, name: str, pinned: PinnedFile, *, check: bool = False) -> Path:
        """Like `fetch`, for a file of release `name` that VERSIONS.toml need not know.

        Raises:
            OverlayError: it can't be had, or is not the file that is pinned.
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
                self._fetch(name, pinned, path)
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
        return index.list_files(self._http, self._settings, self.project)

    def pin(self, link: Link) -> PinnedFile:
        """The file's pin: the sha256 that the index states, and its size.

        A local file is read where nothing states its sha256.

        Raises:
            OverlayError: the index states none, or the file's server does not answer.
        """
        stated = index.stated_sha256(link)
        if stated is None and link.is_file:
            stated = sha256(link.file_path)
        if stated is None:
            raise OverlayError(
                f"cannot pin {link.filename}",
                f"{link.redacted} is listed without a sha256",
                "Pass --index-url with an index that states hashes",
                Exit.INTEGRITY,
            )
        size = index.size_of(self._http, link)
        return PinnedFile(file=link.filename, sha256=stated, size=size)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(path.name + ".lock")):
                yield
        except OSError as error:
            raise OverlayError(
                f"cannot write the cache {path.parent}",
                error.strerror or str(error),
                "Free some room or make it writable, or name another folder with "
                "VLLM_OVERLAY_CACHE",
                Exit.ENVIRONMENT,
            ) from error

    def _fetch(self, name: str, pinned: PinnedFile, path: Path) -> None:
        links = index.find_file(self._http, self._settings, self.project, pinned.file)
        part = path.with_name(path.name + ".part")
        failures: list[OverlayError] = []
        for link in links:
            try:
                self._try(name, pinned, link, part)
            except OverlayError as error:
                failures.append(error)
                continue
            part.replace(path)
            return
        raise failures[0]

    def _try(self, name: str, pinned: PinnedFile, link: Link, part: Path) -> None:
        """Make `part` the file pinned, from one place.

        Raises:
            OverlayError: it does not serve that file.
        """
        resumed = _is_begun(part)
        try:
            self._download(name, pinned, link, part)
            _require(name, pinned, part, link)
        except OverlayError as error:
            if not resumed or error.status is not Exit.INTEGRITY:
                raise
            # What an earlier run left may be what is wrong. It is gone now.
            self._download(name, pinned, link, part)
            _require(name, pinned, part, link)

    def _download(self, name: str, pinned: PinnedFile, link: Link, part: Path) -> None:
        """Bring `part` to its full size, from where an earlier try left it.

        Raises:
            OverlayError: the server keeps failing.
        """
        try:
            for attempt in index.retries():
                with attempt:
                    self._stream(name, pinned, link, part)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:  # a redirect to no URL
            raise OverlayError(
                f"{name}: cannot fetch {pinned.file}",
                f"{link.redacted}: {index.reason(error)}",
                "Check the network and run it again: it resumes where it stopped",
                Exit.UNAVAILABLE,
            ) from error

    def _stream(self, name: str, pinned: PinnedFile, link: Link, part: Path) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have == pinned.size:
            return
        if have > pinned.size:
            part.unlink()
            have = 0
        # identity: a transfer encoding would make Range and size speak of other bytes.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._http.get_stream(link.normalized, headers=headers) as response:
            if response.status_code == HTTP_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
                raise httpx2.TransportError("the server cannot resume; starting over")
            response.raise_for_status()
            if response.status_code != HTTP_PARTIAL_CONTENT:
                have = 0
            with (
                self.progress.bytes(f"{name} {pinned.file}", pinned.size, have) as advance,
                part.open("r+b" if have else "wb") as out,
            ):
                out.seek(have)
                for chunk in response.iter_bytes():
                    have += len(chunk)
                    if have > pinned.size:
                        break
                    out.write(chunk)
                    advance(len(chunk))
                out.truncate()
        if have < pinned.size:
            raise httpx2.TransportError(f"the transfer ended after {have} of {pinned.size} bytes")
        if have > pinned.size:
            part.unlink()
            raise _mismatch(name, pinned, link, f"it is larger than {pinned.size} bytes")


def _is_begun(part: Path) -> bool:
    """Whether an earlier run left bytes to go on from; anything but a plain file is removed."""
    if part.is_symlink():  # writing through it would change a file elsewhere
        part.unlink()
    return part.exists() and part.stat().st_size > 0


def _require(name: str, pinned: PinnedFile, part: Path, link: Link) -> None:
    """Raise, and discard the bytes, unless `part` is the file pinned."""
    found = sha256(part)
    if found != pinned.sha256:
        part.unlink()
        raise _mismatch(name, pinned, link, f"its sha256 is {found}")


def _mismatch(name: str, pinned: PinnedFile, link: Link, why: str) -> OverlayError:
    return OverlayError(
        f"{name}: {link.redacted} is not the {pinned.file} that is pinned",
        f"{why}, pinned is {pinned.sha256} ({pinned.size} bytes)",
        "Nothing was kept; use an index you trust",
        Exit.INTEGRITY,
    )


def damaged(name: str, path: Path) -> OverlayError:
    """The error for a cached file that is not, or no longer, the one pinned."""
    return OverlayError(
        f"{name}: {path} is damaged",
        "its sha256 is not the one pinned",
        "Delete it and run the command again",
        Exit.INTEGRITY,
    )
