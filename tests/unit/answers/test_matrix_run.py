"""The programs of tests/ in a release's environment: made-up ones, in this Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from made_upstream import Upstream
from overlay.answers import matrix_run
from overlay.base.errors import OverlayError
from overlay.base.project import Project
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

from .test_compiled import run_of as triton_run
from .test_matrix import run_of as matrix_run_of

PROGRAM = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text({text!r})
print(json.dumps(sys.argv[2:]))
"""


@dataclass
class FakeEnvironment:
    """An environment that installs nothing and runs this Python."""

    folder: Path
    release: Release
    installed: list[str] = field(default_factory=list)
    cache: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(forget=lambda _project: None)
    )

    def install(self, *requirements: str) -> None:
        self.installed += requirements

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env={**os.environ, **env}, cwd=cwd, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> list[FakeEnvironment]:
    """Those that were made."""
    made: list[FakeEnvironment] = []

    def create(folder: Path, release: Release, _allowed: str, _cache: Path) -> FakeEnvironment:
        made.append(FakeEnvironment(folder, release))
        return made[-1]

    monkeypatch.setattr(matrix_run, "Environment", SimpleNamespace(create=create))
    monkeypatch.setattr(
        matrix_run,
        "wheel_of",
        lambda _, __, stock, folder: folder / ("official" if stock else "ours"),
    )
    return made


@pytest.fixture
def workspace(upstream: Upstream, tmp_path: Path) -> Workspace:
    return Workspace.open(Project(upstream.root), tmp_path / "cache", offline=True)


def write_program(root: Path, name: str, text: str) -> None:
    package = root / "tests" / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(text)


def test_triton(workspace: Workspace, environments: list[FakeEnvironment], tmp_path: Path) -> None:
    """On the official wheel, with the results of other releases if there are any."""
    text = json.dumps(triton_run())
    write_program(workspace.project.root, "compiled", PROGRAM.format(text=text))
    release = workspace.versions.get("1.0")
    made = matrix_run.run_triton(workspace, release, tmp_path / "work", 3)
    assert (made.release, len(made.rows)) == ("1.0", 3)
    assert Path(environments[0].installed[0]).name == "official"
    log = tmp_path / "work" / "triton.log"
    assert json.loads(log.read_text()) == ["--jobs", "3"]
    matrix_run.run_triton(workspace, release, tmp_path / "work", 3, tmp_path / "known.json")
    assert json.loads(log.read_text()) == ["--jobs", "3", "--known", f"{tmp_path}/known.json"]


def test_matrix(workspace: Workspace, environments: list[FakeEnvironment], tmp_path: Path) -> None:
    """Both wheels take turns in one environment."""
    text = json.dumps(matrix_run_of([0] * 6))
    write_program(workspace.project.root, "matrix", PROGRAM.format(text=text))
    release = workspace.versions.get("1.0")
    found = matrix_run.run(workspace, release, tmp_path / "work", ("stock", "patched"), 1)
    assert [one.variant for one in found] == ["stock", "patched"]
    (environment,) = environments
    wheels = [Path(one).name for one in environment.installed if one not in matrix_run.NEEDS]
    assert wheels == ["official", "ours"]
    assert (tmp_path / "work" / "patched.json").is_file()


def test_what_breaks_is_told(
    workspace: Workspace, environments: list[FakeEnvironment], tmp_path: Path
) -> None:
    write_program(workspace.project.root, "compiled", "raise SystemExit('no such kernel')")
    release = workspace.versions.get("1.0")
    with pytest.raises(OverlayError, match="tests/compiled broke on the stock wheel") as raised:
        matrix_run.run_triton(workspace, release, tmp_path / "work", 1)
    assert "no such kernel" in str(raised.value)
    assert environments


def test_not_from_an_installed_overlay(workspace: Workspace, tmp_path: Path) -> None:
    """It has no tests."""
    with pytest.raises(OverlayError, match="Run it in a checkout"):
        matrix_run.run_triton(workspace, workspace.versions.get("1.0"), tmp_path, 1)
