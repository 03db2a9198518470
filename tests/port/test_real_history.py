"""Ports of upstream's real history, done again, end with what VERSIONS.toml has of them.

A release is taken out, with all that only it used (and, where files of it are shared by later
ones, with those: as it was at the time). Then it is ported as a maintainer would: what stops is
left out if the release's series has no such topic, and solved with the text that it has if so.
What no tool can know (a table that differs, a new topic) is edited after it. Needs the sdists
and the wheels, which are fetched into the cache, and the package index for the hashes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from overlay.base.project import find_project
from overlay.patches import entry
from overlay.patches.series import PatchPath, patch_files, read_series
from overlay.releases import versions
from overlay.releases.versions import Release

PROJECT = find_project(Path(__file__).parents[2])
VERSIONS = versions.load(PROJECT.versions_file)
#: What VERSIONS.toml has of a release for its patches.
OF_PATCHES = ("series", "tree", "revision", "files", "record", "record_python", "record_source",
              "patched_sha256", "patched_size")  # fmt: skip
WHO = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.org")
STOPPED = 5


def test_0_9_2_from_0_9_1(tmp_path: Path) -> None:
    port = History.without(tmp_path, "0.9.2")
    assert port.done_again("0.9.1") == {"chunked-local-support"}
    # Upstream has declared it itself.
    assert set(port.stops) == {"moe-input-mutation"}


def test_0_10_1_from_0_10_0(tmp_path: Path) -> None:
    port = History.without(tmp_path, *since("0.10.1"))
    edited = port.done_again("0.10.0")
    # The last one fits, and its Remove-When says that it is not needed any more.
    stops = {"llama4-text-only", "v1-hybrid-off-local", "v1-full-graph-local"}
    assert set(port.stops) == {*stops, "v1-cpu-virtual-batches"}
    # New topics, and a table that differs.
    new = {"chunked-local-wiring", "llama4-images-off", "v1-flashinfer-buffers"}
    assert edited == {*new, "chunked-local-support"}


def test_0_11_0_from_0_10_2(tmp_path: Path) -> None:
    """It was a control, out of the range, until it was ported."""
    port = History.controlled(tmp_path, "0.11.0")
    control = port.versions.get("0.11.0")
    assert not control.is_patched
    assert not port.versions.in_range(control.version)
    # A table of V1 alone, and what only 0.11.0 needs.
    buffers = {"v1-flashinfer-buffers", "v1-flash-attn-buffers"}
    assert port.done_again("0.10.2") == {"chunked-local-support", *buffers}
    assert port.versions.upstream.range == VERSIONS.upstream.range
    v0 = {f"chunked-local-{name}" for name in ("metadata", "xformers", "flash-attn", "wiring")}
    fixed = {"v1-split-virtual-batches", "v1-full-graph-local"}
    assert set(port.stops) == {*v0, *fixed, "chunked-local-support", "engine-selection"}


def test_0_8_4_from_0_8_3(tmp_path: Path) -> None:
    """Upstream's #16212 is a part of the signature topic, and is told as such."""
    port = History.without(tmp_path, *since("0.8.4"))
    port.done_again("0.8.3")
    topic = "attention-signatures"
    said, printed = port.stops[topic]
    assert said["topics"][topic]["removal_met"].startswith("Applied-Upstream: v0.8.4, ")
    assert said["topics"][topic]["removal_met"].endswith("/pull/16212")
    parts = {part["path"]: part for part in said["topics"][topic]["upstream_already"]}
    backend = "vllm/attention/backends/{}.py"
    for name in ("xformers", "torch_sdpa", "flashinfer", "ipex_attn", "pallas"):
        assert parts[backend.format(name)]["hunks"] == [1, 2], name
    for name in ("flash_attn", "hpu_attn"):
        assert parts[backend.format(name)]["hunks"] == [1], name
    lines = [line.strip() for line in parts[backend.format("rocm_flash_attn")]["lines"]]
    assert "use_irope: bool = False," in lines
    assert "already upstream in 0.8.4, in part:" in printed


def since(name: str) -> list[str]:
    """The patched releases from `name` on."""
    first = VERSIONS.get(name).version
    return [release.name for release in VERSIONS.patched if release.version >= first]


def listed(release: Release, patches: Path = PROJECT.patches) -> dict[str, PatchPath]:
    """The files of a release's series, by topic."""
    return {path.topic: path for path in read_series(patches, str(release.series))}


def undated(file: Path) -> str:
    """A patch's text without what tells when it was written."""
    return re.sub(r"^Last-Update: .*$", "", file.read_text(), flags=re.MULTILINE)


@dataclass
class History:
    """A checkout in which a release is not listed yet."""

    root: Path
    release: Release
    """As the real one has it."""
    stops: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    """The topics that the port stopped at: what it said, as JSON and to people."""

    @classmethod
    def without(cls, folder: Path, *names: str) -> History:
        """A copy of the checkout without these releases; the first is the one to be ported."""
        root = folder / "overlay"
        shutil.copytree(PROJECT.patches, root / "patches")
        text = PROJECT.versions_file.read_text()
        for name in names:
            entry = rf'^\[releases\."{re.escape(name)}"\]\n.*?(?=^\[releases\."[^"]+"\]\n|\Z)'
            text, count = re.subn(entry, "", text, flags=re.MULTILINE | re.DOTALL)
            assert count == 1
            (root / "patches/series" / name).unlink()
        (root / "VERSIONS.toml").write_text(text)
        left = versions.load(root / "VERSIONS.toml").patched
        used = {str(path) for one in left for path in listed(one, root / "patches").values()}
        for path in list(patch_files(root / "patches")):
            if path.as_posix() not in used:
                (root / "patches" / path).unlink()
        return cls(root, VERSIONS.get(names[0]))

    @classmethod
    def controlled(cls, folder: Path, name: str) -> History:
        """A copy of the checkout in which the newest release is a control, out of the range."""
        port = cls.without(folder, name)
        release = VERSIONS.get(name)
        control = release.model_copy(update={"status": "control", **dict.fromkeys(OF_PATCHES)})
        file = port.root / "VERSIONS.toml"
        newest = port.versions.patched[-1]
        text = file.read_text().replace(VERSIONS.upstream.range, f">=0.8.3,<={newest.name}")
        file.write_text(entry.insert(text, control))
        return port

    @property
    def versions(self) -> versions.Versions:
        """Its VERSIONS.toml, as it is now."""
        return versions.load(self.root / "VERSIONS.toml")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "overlay", "--root", str(self.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def git(self, tree: Path, *arguments: str) -> str:
        env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
        done = subprocess.run(["git", *WHO, "-C", str(tree), *arguments], env=env,
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout

    def done_again(self, origin: str) -> set[str]:
        """Port the release. Returns the topics that had to be edited after it."""
        self._port(origin)
        edited = self._edit()
        name = self.release.name
        for command in (("lock", name), ("validate", "--all")):
            done = self.run(*command)
            assert done.returncode == 0, done.stdout + done.stderr
        ported = self.versions.get(name)
        # The tree, and every pin; what else an environment needs is found out by running it, and
        # revisions count from one. Each wheel's sum has the revision in it, and the patches' dates.
        own = ("constraints", "revision", "patched_sha256")
        same = {key: getattr(ported, key) for key in own}
        if ported.aarch64 and self.release.aarch64:
            sum_ = {"patched_sha256": ported.aarch64.patched_sha256}
            same["aarch64"] = self.release.aarch64.model_copy(update=sum_)
        assert ported == self.release.model_copy(update=same)
        for path in listed(self.release).values():
            if path.first_tag != name:
                continue
            assert undated(path.under(self.root / "patches")) == undated(
                path.under(PROJECT.patches)
            )
        return edited

    def _port(self, origin: str) -> None:
        command: Sequence[str] = ("--to", self.release.name, "--from", origin)
        while True:
            done = self.run("port", *command, "--json")
            assert done.returncode in (0, STOPPED), done.stderr
            said = json.loads(done.stdout)
            topic = said["stopped"]
            if not done.returncode:
                assert topic is None
                return
            assert topic not in self.stops
            self.stops[topic] = said, done.stderr
            path = listed(self.release).get(topic)
            command = ("--continue",) if path else ("--skip",)
            if path and said["work_tree"]:  # what conflicts has another text in the end
                assert path.first_tag == self.release.name
                tree = Path(said["work_tree"])
                # A conflict leaves a cherry-pick, a merge that upstream has in part a commit.
                is_merged = not self.git(tree, "status", "--porcelain")
                self.git(tree, "reset", "--quiet", "--hard", "HEAD~1" if is_merged else "HEAD")
                self._take(tree, path)

    def _take(self, tree: Path, path: PatchPath) -> None:
        self.git(tree, "am", "--quiet", "--keep-non-patch", str(path.under(PROJECT.patches)))

    def _edit(self) -> set[str]:
        """Bring the port to the real series, with `edit` and `refresh`, where it differs."""
        name, real = self.release.name, listed(self.release)
        mine = listed(self.release, self.root / "patches")
        if real == mine:
            return set()
        assert self.run("edit", name).returncode == 0
        tree = self.root / "work/edit" / name
        self.git(tree, "reset", "--quiet", "--hard", self.release.tag)
        words: list[str] = []
        for topic, path in real.items():
            self._take(tree, path)
            if path != mine.get(topic):  # its subject may be another one
                words += ["--topic", f"{self.git(tree, 'rev-parse', 'HEAD').strip()}={topic}"]
            if topic in mine and path != mine[topic]:
                words += ["--fork-at", f"{topic}={name}"]
        words += [word for topic in mine.keys() - real.keys() for word in ("--drop", topic)]
        done = self.run("refresh", name, *words)
        assert done.returncode == 0, done.stderr
        changed = {topic for topic in real.keys() & mine.keys() if real[topic] != mine[topic]}
        return changed | (real.keys() ^ mine.keys())


@pytest.fixture(autouse=True)
def _no_settings_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_OVERLAY_ROOT", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)
