"""A device, a FIFO, a folder or gigabytes where a file of the checkout is read: refused at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Upstream

from .tool import Place, go, with_matrix


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def enormous(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo, "device": endless, "folder": Path.mkdir, "gigabytes": enormous,
}  # fmt: skip
#: Tried with all files, and the others with a patch.
ENDLESS = ("FIFO", "device")
PATCH, SERIES = "patches/attention-signatures/1.0.patch", "patches/series/1.0"
#: What reads a file, and its exit statuses.
COMMANDS: dict[str, dict[tuple[str, ...], set[int]]] = {
    PATCH: {
        ("build", "1.0"): {5},
        ("validate", "--all"): {1},
        ("status",): {0},
        ("series", "1.0"): {0},
        ("show", "attention-signatures"): {5},
        ("report",): {5},
        ("apply", "1.0"): {5},
        ("edit", "1.0"): {5},
        ("refresh", "1.0", "--check"): {0, 6},
        ("lock", "1.0"): {5},
        ("normalize", PATCH): {2, 6},
    },
    SERIES: {
        ("build", "1.0"): {5},
        ("validate", "--all"): {1},
        ("status",): {5},
        ("show", "attention-signatures"): {5},
        ("report",): {5},
        ("explain", "--gpu", "T4", "--release", "1.0"): {5},
        ("refresh", "1.0", "--check"): {5, 6},
    },
    "matrix/1.0.stock.json": {
        ("report",): {2},
        ("explain", "--gpu", "T4", "--release", "1.0"): {2},
        ("matrix", "1.0", "--compare"): {2},
    },
    "work/regress/1.0/verdict.json": {("status",): {2}},
    "docs/benchmarks.md": {("report",): {2}},
    "one.xml": {("judge", "1.0", "one.xml", "one.xml"): {2}},
    "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl": {
        ("verify", "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"): {1, 2, 4},
        ("index", "new", "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"): {2, 4},
    },
}


@pytest.fixture(scope="module")
def checkout(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """The upstream with a matrix, documents and a filled cache; tests work on copies."""
    folder = tmp_path_factory.mktemp("checkout")
    made = with_matrix(patched, folder)
    assert go(Place.below(made, folder).command("validate", "--all")).status == 0
    return made


CASES = [(name, kind) for name in COMMANDS for kind in KINDS if name == PATCH or kind in ENDLESS]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_refused(checkout: Upstream, tmp_path: Path, name: str, kind: str) -> None:
    for part in (checkout.root, checkout.cache):
        shutil.copytree(part, tmp_path / part.name)
    mine = Upstream(checkout.served, tmp_path / checkout.root.name, tmp_path)
    place = Place.below(mine, tmp_path)
    file = place.upstream.root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    KINDS[kind](file)
    for words, statuses in COMMANDS[name].items():
        ended = go(
            ("--offline", *place.command(*words)), before=lambda: os.chdir(place.upstream.root)
        )
        assert ended.status in statuses, (words, ended)
        assert ended.status < 2 or ended.is_message or "\nError: " in ended.err, (words, ended)
        assert "Traceback" not in ended.err
