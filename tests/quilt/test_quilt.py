"""The real quilt, on the real releases: the same trees as the overlay's own applier."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from overlay.git import Git
from overlay.project import cache_folder, find_project
from overlay.versions import Release
from overlay.workspace import Workspace

WORKSPACE = Workspace.open(find_project(Path(__file__).parents[2]), cache_folder())
RELEASES = WORKSPACE.versions.patched

pytestmark = pytest.mark.skipif(
    shutil.which("quilt") is None, reason="quilt is not installed (apt-get install quilt)"
)


def quilt_push_all(source: Path, series: str) -> None:
    """``quilt push -a --fuzz=0`` in `source`, with no configuration of the user's."""
    env = {
        "PATH": os.environ["PATH"],
        "QUILT_PATCHES": str(WORKSPACE.project.patches),
        "QUILT_SERIES": series,
        "LC_ALL": "C",
    }
    command = ["quilt", "--quiltrc=-", "push", "-a", "--fuzz=0"]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    # 2: there is nothing to push.
    assert done.returncode in (0, 2), done.stdout + done.stderr


def tree_id(source: Path) -> str:
    """Git tree id of a folder, whatever .gitignore says."""
    git = Git(source / ".git", source)
    git.run("init", "--quiet", str(source))
    git.run("add", "--all", "--force")
    return git.text("write-tree")


@pytest.mark.parametrize("release", RELEASES, ids=[r.name for r in RELEASES])
def test_quilt_makes_the_locked_tree(release: Release, tmp_path: Path) -> None:
    with tarfile.open(WORKSPACE.fetcher.fetch(release, "sdist")) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path / f"vllm-{release.name}"
    applied = len(WORKSPACE.series(release))
    quilt_push_all(source, str(release.series))
    listed = source / ".pc/applied-patches"
    assert len(listed.read_text().splitlines() if listed.exists() else []) == applied
    shutil.rmtree(source / ".pc", ignore_errors=True)
    assert tree_id(source) == release.tree
