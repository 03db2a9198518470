"""Package indexes: the user's own settings, and where a file is found through them.

Files are pinned by name and hash in VERSIONS.toml, so any mirror will do. Which ones to
ask is read from pip itself (its config files and PIP_* variables).
"""

from __future__ import annotations

import ast
import ssl
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import cast

import httpx2
import stamina
from unearth import Link, PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.collector import (
    IndexPage,
    LinkCollectError,
    collect_links_from_location,
    fetch_page,
    parse_html_page,
    parse_json_response,
)
from unearth.fetchers import Fetcher, PyPIClient, Response

from overlay.base.errors import Exit, OverlayError

#: Seconds without a byte before a connection counts as stalled.
TIMEOUT = 30.0
#: Tries of one request, and the longest wait in seconds between two (exponential, jittered).
ATTEMPTS = 5
WAIT_MAX = 20.0
#: The longest Retry-After in seconds that is waited for; a busier server is an error.
RETRY_AFTER_MAX = 60.0
HTTP_NOT_FOUND = 404
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class IndexSettings:
    """Where to look for files, in order."""

    index_urls: tuple[str, ...] = ()
    """PEP 503 or 691 roots. Empty: the public index."""
    find_links: tuple[str, ...] = ()
    """Folders or pages with links."""
    trusted_hosts: tuple[str, ...] = ()
    """Hosts whose certificate is not checked."""
    cert: str | None = None
    """A CA bundle."""
    timeout: float = TIMEOUT
    """Seconds."""

    def with_flags(self, index_url: str | None, find_links: tuple[str, ...]) -> IndexSettings:
        """These settings with the command line's on top.

        --index-url replaces the indexes of the settings; --find-links is asked first.
        """
        return IndexSettings(
            (index_url,) if index_url else self.index_urls,
            (*find_links, *self.find_links),
            self.trusted_hosts,
            self.cert,
            self.timeout,
        )


def pip_settings() -> IndexSettings:
    """What pip is configured with for `pip install`, in this environment.

    Raises:
        OverlayError: pip refuses its own configuration.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip gave no reason"]
        raise OverlayError(
            "cannot read pip's settings",
            lines[-1],
            "Fix what 'pip config debug' shows, or pass --index-url",
            Exit.ENVIRONMENT,
        )
    return from_pip_config(done.stdout)


def from_pip_config(listing: str) -> IndexSettings:
    """Settings from the output of ``pip config list``.

    Like pip, [install] stands over [global] and the environment over both.
    """
    values: dict[str, str] = {}
    rank = {"global": 0, "install": 1, ":env:": 2}
    ranked: dict[str, int] = {}
    for line in listing.splitlines():
        name, equals, quoted = line.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot or section not in rank:
            continue
        if rank[section] >= ranked.get(key, 0):
            values[key], ranked[key] = str(ast.literal_eval(quoted.strip())), rank[section]
    indexes = values["index-url"].split() if "index-url" in values else list(_public_index())
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    else:
        indexes += values.get("extra-index-url", "").split()
    return IndexSettings(
        tuple(indexes),
        tuple(values.get("find-links", "").split()),
        tuple(values.get("trusted-host", "").split()),
        values.get("cert"),
        _seconds(values),
    )


def _public_index() -> tuple[str, ...]:
    # The library's own default, so that no host is named here.
    return tuple(source["url"] for source in PackageFinder().sources)


def _seconds(values: Mapping[str, str]) -> float:
    text = values.get("timeout", values.get("default-timeout", ""))
    try:
        return float(text)
    except ValueError:
        return TIMEOUT


def client(settings: IndexSettings) -> PyPIClient:
    """An HTTP client with the user's proxies, credentials and certificates.

    Raises:
        OverlayError: the CA bundle of the user's settings can't be read.
    """
    verify: ssl.SSLContext | bool = True
    if settings.cert:
        try:
            verify = ssl.create_default_context(cafile=settings.cert)
        except OSError as error:
            raise OverlayError(
                f"cannot read the CA bundle {settings.cert}",
                str(error),
                "Fix pip's cert setting",
                Exit.ENVIRONMENT,
            ) from error
    http = PyPIClient(
        verify=verify,
        timeout=settings.timeout,
        trusted_hosts=settings.trusted_hosts,
        follow_redirects=True,
    )
    http.auth = MultiDomainBasicAuth(prompting=False, index_urls=list(settings.index_urls))
    return http


def find_file(http: PyPIClient, settings: IndexSettings, project: str, file: str) -> list[Link]:
    """Every place that serves a file of this very name, folders first, then indexes in order.

    Yanked files count: VERSIONS.toml pins them by hash.

    Raises:
        OverlayError: no index answers, or none of them has it.
    """
    listed, failures = _ask(http, settings, project)
    links = [link for link in listed if link.filename == file]
    if not links:
        raise _not_found(file, failures)
    return links


def list_files(http: PyPIClient, settings: IndexSettings, project: str) -> list[Link]:
    """Every file of the project, folders first, then indexes in order.

    Raises:
        OverlayError: a place does not answer (the list would have holes), or none knows it.
    """
    links, failures = _ask(http, settings, project)
    if failures or not links:
        raise _not_found(f"the releases of {project}", failures)
    return links


def stated_sha256(link: Link) -> str | None:
    """The sha256 that the index states of a file, in its JSON or in the link's fragment."""
    values = (link.hash_option or {}).get("sha256", [])
    return next((value.lower() for value in values), None)


def size_of(http: PyPIClient, link: Link) -> int:
    """Bytes of a file, from its server or the disk.

    Raises:
        OverlayError: it does not say.
    """
    if link.is_file:
        return link.file_path.stat().st_size
    try:
        for attempt in retries():
            with attempt:
                # identity: the size of a transfer encoding is another one.
                answer = http.head(link.normalized, headers={"Accept-Encoding": "identity"})
                answer.raise_for_status()
        return int(answer.headers["Content-Length"])
    except (httpx2.HTTPError, httpx2.InvalidURL, KeyError, ValueError) as error:
        raise OverlayError(
            f"cannot tell the size of {link.filename}",
            f"{link.redacted}: {reason(error)}",
            "Check the network and run it again",
            Exit.UNAVAILABLE,
        ) from error


def _ask(http: PyPIClient, settings: IndexSettings, project: str) -> tuple[list[Link], list[str]]:
    """What all places list of the project, and those that did not answer, with the reason."""
    places = [
        *((_location(text), True) for text in settings.find_links),
        *((_location(f"{root.rstrip('/')}/{project}/"), False) for root in settings.index_urls),
    ]
    # The library's protocol names fewer arguments than its own client takes.
    fetcher = cast(Fetcher, http)
    links: list[Link] = []
    failures: list[str] = []
    for place, expand in places:
        try:
            links += [link for link in _links(fetcher, place, expand) if _is_spelled(link)]
        except (LinkCollectError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            failures.append(f"{place.redacted}: {reason(error)}")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # The library takes what an index answers at its word.
            failures.append(f"{place.redacted}: what it answers is no index page ({reason(error)})")
    return links, failures


def _is_spelled(link: Link) -> bool:
    """Whether the link is a URL at all; a page may hold any text."""
    try:
        return bool(link.redacted) and link.filename is not None
    except ValueError:
        return False


def _location(text: str) -> Link:
    if "://" in text:
        link = Link(text)
        if not _is_spelled(link):
            raise OverlayError(
                f"{text} is no URL", "it cannot be read as one", "Fix the setting or the flag",
                Exit.USAGE,
            )  # fmt: skip
        return link
    return Link.from_path(Path(text).expanduser().absolute())


def _links(http: Fetcher, place: Link, expand: bool) -> Iterable[Link]:
    if place.is_file:
        if not place.file_path.exists() or not (expand or _has_page(place)):
            return []
        return collect_links_from_location(http, place, expand=expand)
    if place.filename.endswith((".whl", ".tar.gz")):
        return [place]
    page = _page(http, place)
    if page is None:
        return []
    as_json = page.content_type.lower().startswith("application/vnd.pypi.simple.v1+json")
    return parse_json_response(page) if as_json else parse_html_page(page)


def _has_page(place: Link) -> bool:
    return (place.file_path / "index.html").is_file()


@dataclass(frozen=True)
class _Demanding:
    """A client that raises for a status which may be another one later.

    The library would raise an error that has not got what the server asks for.
    """

    http: Fetcher

    def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> Response:
        return self._checked(self.http.get(url, headers=headers))

    def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> Response:
        return self._checked(self.http.head(url, headers=headers))

    def get_stream(
        self, url: str, *, headers: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Response]:
        return self.http.get_stream(url, headers=headers)

    def iter_secure_origins(self) -> Iterable[tuple[str, str, str]]:
        return self.http.iter_secure_origins()

    def _checked(self, response: Response) -> Response:
        if response.status_code in RETRY_STATUS:
            response.raise_for_status()
        return response


def _page(http: Fetcher, place: Link) -> IndexPage | None:
    """The page, or None where the index does not know the project."""
    for attempt in retries():
        with attempt:
            try:
                return fetch_page(_Demanding(http), place)
            except LinkCollectError as error:
                if f"({HTTP_NOT_FOUND})" in str(error):
                    return None
                raise
    raise AssertionError("unreachable: stamina raises the last error")


def retries() -> Iterable[stamina.Attempt]:
    """The attempts of one request: again where that may help, and when the server says.

    Not limited in time as a whole, so that a large file may be resumed whenever it breaks off.
    """
    return stamina.retry_context(on=backoff, attempts=ATTEMPTS, timeout=None, wait_max=WAIT_MAX)


def backoff(error: Exception) -> bool | float:
    """Whether asking again may help (the connection failed, or the server is busy), or the
    seconds after which the server says it does."""
    if isinstance(error, httpx2.HTTPStatusError):
        wait = retry_after(error.response.headers)
        if error.response.status_code not in RETRY_STATUS or (wait or 0) > RETRY_AFTER_MAX:
            return False
        return True if wait is None else wait
    return isinstance(error, httpx2.TransportError)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait for (as a number or a date), if it does."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text)
    except ValueError:
        return None
    now = datetime.now(timezone.utc)
    return max((then.replace(tzinfo=then.tzinfo or timezone.utc) - now).total_seconds(), 0.0)


def reason(error: Exception) -> str:
    """What an HTTP error says, in one line."""
    said = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, httpx2.HTTPStatusError):
        wait = retry_after(error.response.headers)
        said += f" (it asks to wait {wait:.0f} s)" if wait else ""
    return said


def _not_found(file: str, failures: list[str]) -> OverlayError:
    if failures:
        return OverlayError(
            f"cannot find {file}",
            f"a package index did not answer ({'; '.join(failures)})",
            "Check the network and pip's index settings, or pass --index-url or --find-links",
            Exit.UNAVAILABLE,
        )
    return OverlayError(
        f"cannot find {file}",
        "no index or folder of pip's settings lists it",
        "Pass --index-url or --find-links with a place that has it",
        Exit.UNAVAILABLE,
    )
