"""Fetching: what a bad network may do, and that nothing wrong gets its name in the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina

from made_upstream import Upstream
from overlay.base.console import Progress
from overlay.base.errors import Exit, OverlayError
from overlay.releases.index import IndexSettings, from_pip_config
from overlay.releases.sources import Cache, Fetcher

from ..server import Faults, serve


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    stamina.set_testing(True, attempts=5)
    yield
    stamina.set_testing(False)


def fetcher(
    folder: Path, *, index_urls: tuple[str, ...] = (), find_links: tuple[str, ...] = ()
) -> Fetcher:
    chosen = IndexSettings(index_urls, find_links, timeout=5.0)
    return Fetcher(Cache(folder), "vllm", lambda: chosen, progress=Progress(enabled=False))


@pytest.fixture
def release_wheel(upstream: Upstream) -> bytes:
    return (upstream.served / "vllm-1.0-cp38-abi3-manylinux1_x86_64.whl").read_bytes()


def fetch(upstream: Upstream, folder: Path, url: str) -> Path:
    release = upstream.workspace().versions.get("1.0")
    return fetcher(folder, index_urls=(url,)).fetch(release, "wheel")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "files").iterdir() if not p.name.endswith(".lock"))


def test_fetch(upstream: Upstream, release_wheel: bytes, tmp_path: Path) -> None:
    with serve(upstream.served, Faults()) as url:
        path = fetch(upstream, tmp_path / "c", url)
    assert path.read_bytes() == release_wheel


def test_second_fetch_asks_nobody(upstream: Upstream, tmp_path: Path) -> None:
    with serve(upstream.served, Faults()) as url:
        first = fetch(upstream, tmp_path / "c", url)
    assert fetch(upstream, tmp_path / "c", "http://127.0.0.1:9/simple") == first


def test_a_cut_transfer_is_resumed(
    upstream: Upstream, release_wheel: bytes, tmp_path: Path
) -> None:
    faults = Faults(cut_after=[1000, 500])
    with serve(upstream.served, faults) as url:
        path = fetch(upstream, tmp_path / "c", url)
    assert path.read_bytes() == release_wheel
    name = path.name
    assert faults.requests[1:] == [name, f"{name} bytes=1000-", f"{name} bytes=1500-"]


def test_a_later_run_resumes(upstream: Upstream, release_wheel: bytes, tmp_path: Path) -> None:
    faults = Faults(cut_after=[300] * 5)
    with serve(upstream.served, faults) as url:
        with pytest.raises(OverlayError, match="it resumes where it stopped") as caught:
            fetch(upstream, tmp_path / "c", url)
        assert caught.value.status is Exit.UNAVAILABLE
        assert files(tmp_path / "c") == ["vllm-1.0-cp38-abi3-manylinux1_x86_64.whl.part"]
        assert fetch(upstream, tmp_path / "c", url).read_bytes() == release_wheel
    assert faults.requests[-1].endswith("bytes=1500-")


def test_a_server_without_ranges(upstream: Upstream, release_wheel: bytes, tmp_path: Path) -> None:
    with serve(upstream.served, Faults(cut_after=[1000], no_ranges=True)) as url:
        assert fetch(upstream, tmp_path / "c", url).read_bytes() == release_wheel


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(
    upstream: Upstream, release_wheel: bytes, tmp_path: Path, status: int
) -> None:
    with serve(upstream.served, Faults(statuses=[status] * 3)) as url:
        assert fetch(upstream, tmp_path / "c", url).read_bytes() == release_wheel


def test_a_missing_file_is_not_asked_for_again(upstream: Upstream, tmp_path: Path) -> None:
    faults = Faults(statuses=[404] * 5)
    with serve(upstream.served, faults) as url, pytest.raises(OverlayError, match="404"):
        fetch(upstream, tmp_path / "c", url)
    assert len(faults.statuses) == 4


@pytest.mark.parametrize("change", [lambda b: b[:-1] + b"?", lambda b: b + b"more"])
def test_wrong_bytes_are_not_kept(
    upstream: Upstream, release_wheel: bytes, tmp_path: Path, change: object
) -> None:
    assert callable(change)
    with (
        serve(upstream.served, Faults(body=change(release_wheel))) as url,
        pytest.raises(OverlayError, match=r"is not the vllm-1\.0-cp38-abi3") as caught,
    ):
        fetch(upstream, tmp_path / "c", url)
    assert caught.value.status is Exit.INTEGRITY
    assert files(tmp_path / "c") == []


def test_no_index_answers(upstream: Upstream, tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="a package index did not answer") as caught:
        fetch(upstream, tmp_path / "c", "http://127.0.0.1:9/simple")
    assert caught.value.status is Exit.UNAVAILABLE


def test_index_without_the_file(upstream: Upstream, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with serve(empty, Faults()) as url, pytest.raises(OverlayError, match="no index or folder"):
        fetch(upstream, tmp_path / "c", url)


def test_offline(upstream: Upstream, tmp_path: Path) -> None:
    release = upstream.workspace().versions.get("1.0")
    offline = Fetcher(Cache(tmp_path / "c"), "vllm", offline=True)
    with pytest.raises(OverlayError, match="--offline forbids fetching") as caught:
        offline.fetch(release, "wheel")
    assert caught.value.status is Exit.UNAVAILABLE


def test_a_file_damaged_in_the_cache_is_found(upstream: Upstream, tmp_path: Path) -> None:
    release = upstream.workspace().versions.get("1.0")
    fetcher_ = fetcher(tmp_path / "c", find_links=(str(upstream.served),))
    path = fetcher_.fetch(release, "wheel")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(OverlayError, match="is damaged") as caught:
        fetcher_.fetch(release, "wheel", check=True)
    assert caught.value.status is Exit.INTEGRITY


def test_concurrent_runs_fetch_once(
    upstream: Upstream, release_wheel: bytes, tmp_path: Path
) -> None:
    faults = Faults()
    found: list[bytes] = []
    with serve(upstream.served, faults) as url:
        threads = [
            threading.Thread(
                target=lambda: found.append(fetch(upstream, tmp_path / "c", url).read_bytes())
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [release_wheel] * 8
    assert sum(r.startswith("vllm-1.0") for r in faults.requests) == 1


def test_pip_settings_rank_as_pip_ranks_them() -> None:
    listing = """global.index-url='https://a.example/simple'
install.index-url='https://b.example/simple'
global.extra-index-url='https://c.example/simple https://d.example/simple'
:env:.find-links='/opt/wheels'
global.cert='/etc/ssl/ca.pem'
:env:.default-timeout='180'
download.index-url='https://other.example'
"""
    assert from_pip_config(listing) == IndexSettings(
        (
            "https://b.example/simple",
            "https://c.example/simple",
            "https://d.example/simple",
        ),
        ("/opt/wheels",),
        (),
        "/etc/ssl/ca.pem",
        180.0,
    )


def test_no_index_leaves_folders_alone() -> None:
    listing = ":env:.no-index='1'\n:env:.find-links='/opt/wheels'\n"
    settings = from_pip_config(listing)
    assert (settings.index_urls, settings.find_links) == ((), ("/opt/wheels",))
