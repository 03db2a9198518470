"""Builds at once with one cache: all succeed, with the bytes of a build alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from made_upstream import Upstream

from .tool import Place, go, start


@pytest.fixture(scope="module")
def alone(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of each release's wheel, built by itself."""
    place = Place.below(patched, tmp_path_factory.mktemp("alone"))
    found = {}
    for name in ("1.0", "1.1"):
        ended = go(place.command("build", name, "--json", "--out", str(place.dist)))
        assert ended.status == 0, ended.err
        found[name] = json.loads(ended.out)["sha256"]
    return found


@pytest.mark.parametrize("releases", [("1.0",), ("1.0", "1.1")], ids=["same", "different"])
@pytest.mark.parametrize("count", [2, 8])
def test_builds_at_once(
    patched: Upstream,
    alone: dict[str, str],
    tmp_path: Path,
    count: int,
    releases: tuple[str, ...],
) -> None:
    """Into one dist folder and out of one cache that is empty at first."""
    place = Place.below(patched, tmp_path)
    names = [releases[number % len(releases)] for number in range(count)]
    runs = [start(place.command("build", n, "--json", "--out", str(place.dist))) for n in names]
    ended = [run.wait() for run in runs]
    assert [one.status for one in ended] == [0] * count, [one.err for one in ended]
    assert [json.loads(one.out)["sha256"] for one in ended] == [alone[name] for name in names]
    assert len(list(place.dist.iterdir())) == len(releases)  # and no temporary is left
    for lock in place.cache.rglob("*.lock"):
        with FileLock(lock, timeout=0):
            """Nobody holds it."""
    assert not list(place.cache.rglob("*.part"))
    assert len(ended) == count
