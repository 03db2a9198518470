"""Files from a package index: listed, pinned, and downloaded with resumption."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import httpx2
from unearth import Link
from unearth.fetchers import PyPIClient

from overlay.base.console import Progress
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.releases import index
from overlay.releases.versions import PinnedFile

HTTP_PARTIAL_CONTENT, HTTP_RANGE_NOT_SATISFIABLE = 206, 416


class Downloader:
    """Gets files of the project `project` from where `settings` say; pip's if there are none."""

    def __init__(
        self,
        project: str,
        settings: Callable[[], index.IndexSettings] | None,
        progress: Progress,
    ) -> None:
        self._project = project
        self._ask_settings = settings or index.pip_settings
        self._progress = progress

    @cached_property
    def _settings(self) -> index.IndexSettings:
        return self._ask_settings()

    @cached_property
    def _http(self) -> PyPIClient:
        return index.client(self._settings)

    def listed(self) -> list[Link]:
        """Every file of the project that the index or a folder of the settings lists.

        Raises:
            OverlayError: one of them does not answer, or none knows it.
        """
        return index.list_files(self._http, self._settings, self._project)

    def pin(self, link: Link) -> PinnedFile:
        """The file's pin: the sha256 that the index states, and its size.

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

    def fetch(self, name: str, pinned: PinnedFile, path: Path) -> None:
        """Make `path` the file pinned, of release `name`, from the first place that serves it.

        Raises:
            OverlayError: none does.
        """
        links = index.find_file(self._http, self._settings, self._project, pinned.file)
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
                self._progress.bytes(f"{name} {pinned.file}", pinned.size, have) as advance,
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
