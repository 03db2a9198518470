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
from dataclasses import dataclass
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
from unearth.fetchers import Fetcher, PyPIClient

from overlay.errors import Exit, OverlayError

#: Seconds without a byte before a connection counts as stalled.
TIMEOUT = 30.0
#: Tries of one request, and the longest wait in seconds between two (exponential, jittered).
ATTEMPTS = 5
WAIT_MAX = 20.0
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
            "Mend what 'pip config debug' shows, or pass --index-url",
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
    """An HTTP client with the user's proxies, credentials and certificates."""
    verify: ssl.SSLContext | bool = True
    if settings.cert:
        try:
            verify = ssl.create_default_context(cafile=settings.cert)
        except OSError as error:
            raise OverlayError(
                f"cannot read the CA bundle {settings.cert}",
                str(error),
                "Mend pip's cert setting",
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
        for attempt in stamina.retry_context(on=is_transient, attempts=ATTEMPTS, wait_max=WAIT_MAX):
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
            links += _links(fetcher, place, expand)
        except (LinkCollectError, httpx2.HTTPError, OSError, ValueError) as error:
            failures.append(f"{place.redacted}: {reason(error)}")
    return links, failures


def _location(text: str) -> Link:
    if "://" in text:
        return Link(text)
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


def _page(http: Fetcher, place: Link) -> IndexPage | None:
    """The page, or None where the index does not know the project."""
    for attempt in stamina.retry_context(on=is_transient, attempts=ATTEMPTS, wait_max=WAIT_MAX):
        with attempt:
            try:
                return fetch_page(http, place)
            except LinkCollectError as error:
                if "(404)" in str(error):
                    return None
                if any(f"({status})" in str(error) for status in RETRY_STATUS):
                    raise httpx2.TransportError(str(error)) from error
                raise
    raise AssertionError("unreachable: stamina raises the last error")


def is_transient(error: Exception) -> bool:
    """Whether asking again may help: the connection failed, or the server is busy."""
    if isinstance(error, httpx2.HTTPStatusError):
        return error.response.status_code in RETRY_STATUS
    return isinstance(error, httpx2.TransportError)


def reason(error: Exception) -> str:
    """What an HTTP error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


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
