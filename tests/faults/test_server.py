"""What a package index may do: a message, or success after a retry; never a bad file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import stamina

from made_upstream import WHEEL, Upstream
from overlay.base.console import Progress
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.releases.index import ATTEMPTS, IndexSettings
from overlay.releases.sources import Cache, Fetcher

from . import bad_server as bad
from .bad_server import PATIENCE, Act, Script, other, serve, stated, status
from .tool import finals

JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Case:
    """What the server does, and what is to come of it."""

    act: Act
    then: Exit
    """When it always does it."""
    once: Exit = Exit.OK
    """When it does it the first time only."""


UNAVAILABLE, INTEGRITY = Exit.UNAVAILABLE, Exit.INTEGRITY
FILES = {
    "truncates": Case(bad.cut, UNAVAILABLE),
    "truncates, and does not say": Case(bad.without_length, UNAVAILABLE),
    "stalls": Case(bad.stall, UNAVAILABLE),
    "is silent": Case(bad.silence, UNAVAILABLE),
    "resets": Case(bad.reset, UNAVAILABLE),
    "says too short": Case(stated(lambda n: n - 7), UNAVAILABLE),
    "says too long": Case(stated(lambda n: n + 7), Exit.OK),  # all came, and its hash is right
    "says a negative length": Case(stated(lambda n: -n), UNAVAILABLE),
    "says a length that is none": Case(stated(lambda n: "many"), UNAVAILABLE),
    "says gzip": Case(stated(lambda n: n, Content_Encoding="gzip"), UNAVAILABLE, UNAVAILABLE),
    "is no HTTP": Case(bad.raw(b"hello\r\n\r\n"), UNAVAILABLE),
    "closes at once": Case(bad.raw(b""), UNAVAILABLE),
    "has other bytes": Case(other(lambda d: d[:-1] + b"?"), INTEGRITY, INTEGRITY),
    "has more bytes": Case(other(lambda d: d + b"more"), INTEGRITY, INTEGRITY),
    "has fewer bytes": Case(other(lambda d: d[:-7]), UNAVAILABLE),
    "has nothing": Case(other(lambda d: b""), UNAVAILABLE),
    "has an error page": Case(other(lambda d: b"<p>" * 9999), INTEGRITY, INTEGRITY),
    "answers a part": Case(other(lambda d: d[3:] + b"abc", number=206), INTEGRITY, INTEGRITY),
    "206 of nothing": Case(status(206), UNAVAILABLE),
    "204": Case(status(204), UNAVAILABLE),
    "301 to itself": Case(status(301, Location=f"/files/{WHEEL}"), UNAVAILABLE),
    "301 to nowhere": Case(status(301, Location="http://[::1"), UNAVAILABLE),
    "301 to a file": Case(status(301, Location="file:///etc/hostname"), UNAVAILABLE, UNAVAILABLE),
    "401": Case(status(401), UNAVAILABLE, UNAVAILABLE),
    "404": Case(status(404), UNAVAILABLE, UNAVAILABLE),
    "416": Case(status(416), UNAVAILABLE),
    "429": Case(status(429), UNAVAILABLE),
    "429, wait 1 s": Case(status(429, Retry_After=1), UNAVAILABLE),
    "429, wait an hour": Case(status(429, Retry_After=3600), UNAVAILABLE, UNAVAILABLE),
    "429, wait nonsense": Case(status(429, Retry_After="soon"), UNAVAILABLE),
    "500": Case(status(500), UNAVAILABLE),
    "503": Case(status(503), UNAVAILABLE),
    "503, wait until 1999": Case(
        status(503, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"), UNAVAILABLE
    ),
}
PAGES = {
    "truncates": Case(bad.cut, UNAVAILABLE),
    "stalls": Case(bad.stall, UNAVAILABLE),
    "is silent": Case(bad.silence, UNAVAILABLE),
    "resets": Case(bad.reset, UNAVAILABLE),
    "is no HTTP": Case(bad.raw(b"\0\xff" * 99), UNAVAILABLE),
    "404": Case(status(404), UNAVAILABLE, UNAVAILABLE),
    "429, wait 1 s": Case(status(429, Retry_After=1), UNAVAILABLE),
    "503": Case(status(503), UNAVAILABLE),
    "an image": Case(other(lambda d: d, "image/png"), UNAVAILABLE, UNAVAILABLE),
    "not UTF-8": Case(other(lambda d: b"\xff\xfe" + d, "text/html; charset=utf-8"),
                      UNAVAILABLE, UNAVAILABLE),
    "no such charset": Case(other(lambda d: d, "text/html; charset=klingon"), Exit.OK),
    "a bad link": Case(other(lambda d: b'<a href="http://[::1/x">x</a>' + d),
                       UNAVAILABLE, UNAVAILABLE),
    "a link to nowhere": Case(other(lambda d: b"<a>x</a><a href=''>y</a>" + d), Exit.OK),
    **{
        f"JSON {text!r}": Case(other(lambda d, t=text: t, JSON), UNAVAILABLE, UNAVAILABLE)  # type: ignore[misc]
        for text in (
            b"", b"{", b"[]", b"{}", b"3", b"null", b'{"files": 3}', b'{"files": [3]}',
            b'{"files": [{"url": 3}]}', b'{"files": [{"url": "x", "upload-time": "noon"}]}',
            b"[" * 100_000,
        )
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    stamina.set_testing(True, attempts=ATTEMPTS)
    yield
    stamina.set_testing(False)


def patience(*scripts: Script) -> float:
    """Seconds to wait for a byte: few where none will come, else more than a busy machine needs."""
    silent = {bad.stall, bad.silence} & {act for script in scripts for act in script.acts}
    return PATIENCE if silent else 60.0


def outcome(upstream: Upstream, cache: Path, pages: Script, files: Script) -> Exit:
    """What fetching the wheel of 1.0 comes to; anything but an OverlayError is an error here."""
    with serve(upstream.served, pages, files) as url:
        settings = IndexSettings(index_urls=(url,), timeout=patience(pages, files))
        fetcher = Fetcher(Cache(cache), "vllm", lambda: settings, progress=Progress(enabled=False))
        refused: OverlayError | None = None
        try:
            path = fetcher.fetch(upstream.workspace().versions.get("1.0"), "wheel")
        except OverlayError as error:
            refused = error
    if refused:
        assert "\n" not in str(refused)
        assert list(finals(cache / "files")) == []
        return refused.status
    assert sha256(path) == hashlib.sha256((upstream.served / WHEEL).read_bytes()).hexdigest()
    return Exit.OK


def tried(cases: Mapping[str, Case]) -> Iterator[tuple[tuple[str, bool], Script, Exit]]:
    """Each case once and always, by name: what the server does, and what is to come of it."""
    for name, case in cases.items():
        yield (name, False), Script([case.act]), case.once
        yield (name, True), Script([case.act], always=True), case.then


def test_files(patched: Upstream, tmp_path: Path) -> None:
    found: dict[tuple[str, bool], Exit] = {}
    expected: dict[tuple[str, bool], Exit] = {}
    for case, files, then in tried(FILES):
        cache = tmp_path / f"{len(found)}"
        found[case] = outcome(patched, cache, Script([]), files)
        expected[case] = then
        assert len(files.times) <= 21 + ATTEMPTS  # 20 redirects
        # Whatever it was, it has not spoiled the cache for a server that behaves.
        assert outcome(patched, cache, Script([]), Script([])) is Exit.OK, case
    assert found == expected
    assert len(found) == 66


def test_pages(patched: Upstream, tmp_path: Path) -> None:
    found: dict[tuple[str, bool], Exit] = {}
    expected: dict[tuple[str, bool], Exit] = {}
    for case, pages, then in tried(PAGES):
        found[case] = outcome(patched, tmp_path / f"{len(found)}", pages, Script([]))
        expected[case] = then
        assert len(pages.times) <= ATTEMPTS
    assert found == expected
    assert len(found) == 48


def test_retry_after_is_waited_for(patched: Upstream, tmp_path: Path) -> None:
    stamina.set_testing(False)
    for number, kind in enumerate(("pages", "files")):
        busy, quiet = Script([status(429, Retry_After=1)]), Script([])
        scripts = (busy, quiet) if kind == "pages" else (quiet, busy)
        assert outcome(patched, tmp_path / str(number), *scripts) is Exit.OK
        first, second = busy.times
        assert second - first >= 1.0
    assert number == 1


@pytest.mark.parametrize("url", ["http://[::1", "http://a:b/c"])
def test_index_url_that_is_none(patched: Upstream, tmp_path: Path, url: str) -> None:
    settings = IndexSettings(index_urls=(url,), timeout=PATIENCE)
    fetcher = Fetcher(Cache(tmp_path), "vllm", lambda: settings, progress=Progress(enabled=False))
    with pytest.raises(OverlayError):
        fetcher.fetch(patched.workspace().versions.get("1.0"), "wheel")
