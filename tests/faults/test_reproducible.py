"""The same wheel whatever the Python, umask, locale, time zone, home, user and folder are."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from made_upstream import Upstream, at
from overlay.base.digest import sha256
from overlay.releases.uv import find_uv

from .tool import Place, Truth, as_nobody, go

CHECKOUT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: Variables of the build, each with the others as they are.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "C": {"LC_ALL": "C"},
    "C, in ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Turkish": {"LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr"},
    "Kathmandu": {"TZ": "Asia/Kathmandu"},
    "no home": {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"},
    "hashes": {"PYTHONHASHSEED": "7"},
    "a time": {"SOURCE_DATE_EPOCH": "1"},
    "optimized": {"PYTHONOPTIMIZE": "2"},
}


@pytest.fixture
def expected(undisturbed: Truth) -> str:
    """sha256 of the wheel, as a run here builds it."""
    return undisturbed.wheel


def built(python: str, upstream: Upstream, folder: Path, extra: dict[str, str]) -> str:
    """sha256 of the wheel as another process builds it, in another folder, with a new cache."""
    place = Place.below(upstream, folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [python, "-m", "overlay", *place.build],
        env={**os.environ, "PIP_NO_INDEX": "1", **extra},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = place.dist.iterdir()
    return sha256(wheel)


def test_environments(patched: Upstream, tmp_path: Path, expected: str) -> None:
    found = {
        name: built(sys.executable, patched, tmp_path / name, extra)
        for name, extra in ENVIRONMENTS.items()
    }
    assert found == dict.fromkeys(ENVIRONMENTS, expected)
    assert len(found) == 8


def test_umasks(patched: Upstream, tmp_path: Path, expected: str) -> None:
    found = {}
    for mask in (0o000, 0o022, 0o027, 0o077):
        place = Place.below(patched, tmp_path / f"{mask:o}")

        def before(mask: int = mask) -> None:
            os.umask(mask)

        ended = go(place.build, before=before)
        assert ended.status == 0, ended.err
        (wheel,) = place.dist.iterdir()
        found[mask] = sha256(wheel), wheel.stat().st_mode & 0o777
    assert set(found.values()) == {(expected, 0o644)}
    assert len(found) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user(patched: Upstream, expected: str) -> None:
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(patched.root, folder / "overlay")
        shutil.copytree(patched.served, folder / "served")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        place = Place.below(at(folder), folder / "mine")
        warm = Place.below(at(folder), folder / "root's").build
        ended = go(place.build, before=as_nobody(warm))
        assert ended.status == 0, ended.err
        (wheel,) = place.dist.iterdir()
        assert wheel.stat().st_uid == nobody.pw_uid
        assert sha256(wheel) == expected


def interpreter(version: str, folder: Path) -> str:
    """A Python of this version that has the tool; skips where there is none."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    uv = find_uv()
    found = subprocess.run(
        (uv, "python", "find", "--no-python-downloads", "--no-project", version),
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    # uv does not look into pyenv.
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    pythons = [*found.stdout.split(), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    if not pythons:
        pytest.skip(f"there is no Python {version} here")
    commands = (
        (uv, "venv", "-q", "--python", pythons[0], str(folder / "venv")),
        (uv, "pip", "install", "-q", "--python", str(folder / "venv"), "-e", str(CHECKOUT)),
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return str(folder / "venv/bin/python")


@pytest.mark.parametrize("version", PYTHONS)
def test_pythons(patched: Upstream, tmp_path: Path, expected: str, version: str) -> None:
    python = interpreter(version, tmp_path)
    assert built(python, patched, tmp_path / "built", {}) == expected
