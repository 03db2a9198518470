"""The real quilt, on the real releases: the same trees as the overlay's own applier."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from overlay.base.git import Git
from overlay.base.project import cache_folder, find_project
from overlay.patches import normalize
from overlay.patches.workspace import Workspace
from overlay.releases import archive
from overlay.releases.versions import Release

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
    archive.unpack(WORKSPACE.fetcher.fetch(release, "sdist"), tmp_path)
    source = tmp_path / f"vllm-{release.name}"
    applied = len(WORKSPACE.series(release))
    quilt_push_all(source, str(release.series))
    listed = source / ".pc/applied-patches"
    assert len(listed.read_text().splitlines() if listed.exists() else []) == applied
    shutil.rmtree(source / ".pc", ignore_errors=True)
    assert tree_id(source) == release.tree


def quilt(source: Path, patches: Path, series: str, *arguments: str) -> str:
    """Quilt in `source` with its own format of a refreshed patch; returns what it printed."""
    env = {
        "PATH": os.environ["PATH"],
        "QUILT_PATCHES": str(patches),
        "QUILT_SERIES": series,
        "LC_ALL": "C",
    }
    command = ["quilt", "--quiltrc=-", *arguments]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_quilt_refreshes_is_canonical_after_normalize(tmp_path: Path) -> None:
    """Unchanged: to the byte. With a line changed by hand: that line and blob ids alone."""
    release = RELEASES[0]
    patches = tmp_path / "overlay/patches"
    shutil.copytree(WORKSPACE.project.patches, patches)
    shutil.copy(WORKSPACE.project.versions_file, tmp_path / "overlay")
    workspace = Workspace.open(find_project(tmp_path / "overlay"), cache_folder())
    archive.unpack(workspace.fetcher.fetch(release, "sdist"), tmp_path)
    source = tmp_path / f"vllm-{release.name}"
    series = str(release.series)
    path = workspace.series(release)[-1]
    file = path.under(patches)
    canonical = file.read_bytes()
    quilt(source, patches, series, "push", "-a", "--fuzz=0")
    quilt(source, patches, series, "refresh", "-f")
    assert b"Index: " in file.read_bytes()
    assert b"diff --git" not in file.read_bytes()
    (made,) = normalize.normalize(workspace, [path])
    assert (made.new, made.problems) == (canonical, ())

    # In a file that the patch makes, a line more brings no context with it.
    made_files = re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)$", canonical.decode(), re.MULTILINE)
    assert made_files[-1] in quilt(source, patches, series, "files").split()
    changed = source / made_files[-1]
    changed.write_text(changed.read_text() + "# By hand.\n")
    quilt(source, patches, series, "refresh", "-p", "ab", "--no-timestamps", "--no-index")
    (made,) = normalize.normalize(workspace, [path])
    old, new = (
        [line for line in text.decode().split("\n") if not line.startswith(("index ", "@@ "))]
        for text in (canonical, made.new)
    )
    assert [line for line in new if line not in old] == ["+# By hand."]
