"""Measurements of the tool itself, as ratios within one run, kept in docs/benchmarks.md.

Every figure is of a whole command in a process of its own: start-up, hashing and all.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases import archive
from overlay.releases.uv import find_uv
from overlay.releases.versions import Release

#: The release that the repacking figures are of.
RELEASE = "0.8.5.post1"
#: Where what was written by hand begins, which stays.
BY_HAND = "\n## Before and after\n"
_READ_TARBALLS = """
import sys, tarfile
for path in sys.argv[1:]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                tar.extractfile(member).read()
"""
_COPY = """
import hashlib, sys
read, written = hashlib.sha256(), hashlib.sha256()
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    while data := source.read(1 << 20):
        read.update(data)
        target.write(data)
        written.update(data)
"""


@dataclass(frozen=True)
class Run:
    """One command, measured."""

    seconds: float
    """Wall clock."""
    peak_mib: float
    """Largest resident set of the process, MiB."""


def measure(command: Sequence[str], cwd: Path) -> Run:
    """Run `command` in `cwd`, quietly, and measure it.

    Raises:
        OverlayError: it exits non-zero.
    """
    # Bytecode is kept where the tool is installed, unless this says otherwise.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OverlayError(
            f"cannot measure {' '.join(command[:4])}",
            f"it exited {process.returncode}",
            "Run it by hand",
            Exit.ENVIRONMENT,
        )
    return Run(time.perf_counter() - start, usage.ru_maxrss / 1024)


def bench(workspace: Workspace, repeat: int) -> str:
    """Measure everything and return docs/benchmarks.md."""
    parts = [
        _head(repeat),
        _start(workspace, repeat),
        _repack(workspace, repeat),
        _memory(workspace),
        _in_place(workspace, repeat),
        _validate(workspace, repeat),
    ]
    return "\n".join(parts)


def kept(target: Path) -> str:
    """What was written by hand at the end of an earlier file."""
    text = target.read_text("utf-8") if target.is_file() else ""
    _, heading, rest = text.partition(BY_HAND)
    return heading + rest


def _head(repeat: int) -> str:
    return f"""# Benchmarks

Written by `nox -s bench`. Whole commands, each in a process of its own; the best of {repeat}
runs, all in one session on one machine: read the ratios, not the seconds.

Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}.
"""


def _overlay(workspace: Workspace, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "overlay", "--root", str(workspace.project.root), "--cache",
        str(workspace.fetcher.cache.folder), "--offline", *arguments,
    ]  # fmt: skip


def _best(command: Sequence[str], cwd: Path, repeat: int) -> Run:
    return min((measure(command, cwd) for _ in range(repeat)), key=lambda run: run.seconds)


def _start(workspace: Workspace, repeat: int) -> str:
    here = workspace.project.root
    rows = [
        ("`python -c pass`", [sys.executable, "-c", "pass"]),
        ("`vllm-overlay --help`", _overlay(workspace, "--help")),
        (
            "`vllm-overlay explain --release 0.8.3 --gpu T4`",
            _overlay(workspace, "explain", "--release", "0.8.3", "--gpu", "T4"),
        ),
    ]
    times = [(name, _best(command, here, 3 * repeat).seconds) for name, command in rows]
    table = "\n".join(f"| {name} | {seconds:.2f} |" for name, seconds in times)
    return f"""## Start-up

| Command | Seconds |
|---|---|
{table}
"""


def _repack(workspace: Workspace, repeat: int) -> str:
    release = workspace.versions.get_patched(RELEASE)
    official = workspace.fetcher.fetch(release, "wheel", check=True)
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-bench-") as name:
        folder = Path(name)
        ours = _best(
            _overlay(workspace, "build", RELEASE, "--out", str(folder / "dist")), folder, repeat
        )
        copy = [sys.executable, "-c", _COPY, str(official), str(folder / "copy.whl")]
        floor = _best(copy, folder, repeat)
        wheel = [sys.executable, "-m", "wheel"]
        unpack = measure([*wheel, "unpack", str(official), "-d", str(folder / "un")], folder)
        (unpacked,) = (folder / "un").iterdir()
        (folder / "re").mkdir()
        pack = measure([*wheel, "pack", str(unpacked), "-d", str(folder / "re")], folder)
    theirs = Run(unpack.seconds + pack.seconds, max(unpack.peak_mib, pack.peak_mib))
    return f"""## Repacking {RELEASE} ({release.wheel.size / 1e6:.0f} MB)

| Command | Seconds | Peak memory, MiB |
|---|---|---|
| `wheel unpack`, then `wheel pack` (once) | {theirs.seconds:.1f} | {theirs.peak_mib:.0f} |
| `vllm-overlay build {RELEASE}` | {ours.seconds:.1f} | {ours.peak_mib:.0f} |
| **Ratio** | **{theirs.seconds / ours.seconds:.1f}** | |
| Floor: the wheel copied in Python, hashed on both sides | {floor.seconds:.1f} | |
| **`build`, of the floor** | **{ours.seconds / floor.seconds:.1f}** | |

Both sha256 sums, of what is read and of what is written, are in the build's time.
"""


def _memory(workspace: Workspace) -> str:
    by_size = sorted(workspace.versions.patched, key=lambda release: release.wheel.size)
    rows = "\n".join(_memory_row(workspace, release) for release in (by_size[0], by_size[-1]))
    return f"""## Memory against the wheel's size

| Release | Wheel, MB | Peak memory of the build, MiB |
|---|---|---|
{rows}
"""


def _memory_row(workspace: Workspace, release: Release) -> str:
    workspace.fetcher.fetch(release, "wheel")
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-bench-") as name:
        run = measure(_overlay(workspace, "build", release.name, "--out", name), Path(name))
    return f"| {release.name} | {release.wheel.size / 1e6:.0f} | {run.peak_mib:.0f} |"


def _in_place(workspace: Workspace, repeat: int) -> str:
    release = workspace.versions.get_patched(RELEASE)
    official = workspace.fetcher.fetch(release, "wheel", check=True)
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-bench-") as name:
        folder = Path(name)
        python = folder / "venv/bin/python"
        measure([find_uv(), "venv", "-q", "--python", sys.executable, "venv"], folder)
        measure(_overlay(workspace, "build", RELEASE), folder)
        (patched,) = (folder / "dist").iterdir()
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
               "--no-index", "--force-reinstall"]  # fmt: skip
        theirs = _best([*pip, str(patched)], folder, repeat)
        measure([*pip, str(official)], folder)
        place = ("install", "--python", str(python))
        rounds = [
            (measure(_overlay(workspace, *place), folder),
             measure(_overlay(workspace, *place, "--revert"), folder))
            for _ in range(repeat)
        ]  # fmt: skip
        start = _best(_overlay(workspace, "install", "--help"), folder, repeat)
    patching, reverting = (min(run.seconds for run in runs) for runs in zip(*rounds, strict=True))
    return f"""## Patching {RELEASE} in place

| Command | Seconds |
|---|---|
| `pip install --force-reinstall --no-deps` of the patched wheel | {theirs.seconds:.1f} |
| `vllm-overlay install` | {patching:.1f} |
| `vllm-overlay install --revert` | {reverting:.1f} |
| of which: starting Python and its libraries | {start.seconds:.1f} |
| **Ratio** | **{theirs.seconds / patching:.1f}** |

Every Python file is hashed before, and compiled libraries are compared by size.
"""


def _validate(workspace: Workspace, repeat: int) -> str:
    sdists = [str(workspace.fetcher.fetch(r, "sdist")) for r in workspace.versions.patched]
    here = workspace.project.root
    names = [release.name for release in workspace.versions.patched]
    whole = _best(_overlay(workspace, "validate", "--all"), here, repeat)
    twelve = _best(_overlay(workspace, "validate", *names), here, repeat)
    start = _best(_overlay(workspace, "validate", "--help"), here, repeat)
    floor = _best([sys.executable, "-c", _READ_TARBALLS, *sdists], here, repeat)
    quilt = _quilt(workspace)
    return f"""## `validate --all`, warm cache

| What | Seconds |
|---|---|
| `vllm-overlay validate --all` | {whole.seconds:.1f} |
| of which: the {len(names)} series | {twelve.seconds:.1f} |
| of which: starting Python and its libraries | {start.seconds:.1f} |
| `quilt push -a` over the same {len(names)} series, in trees that are there (once) | {quilt} |
| Floor: reading the {len(sdists)} tarballs once, in Python | {floor.seconds:.1f} |

The sources are unpacked once, into a git repository in the cache, whose tree ids VERSIONS.toml
pins; after that no tarball is read, so the floor is no bound. What is left is git: some
fifteen processes a series.
"""


def _quilt(workspace: Workspace) -> str:
    """Seconds of real quilt over every series; it neither checks nor commits anything."""
    if not shutil.which("quilt"):
        return "no quilt here"
    seconds = 0.0
    for release in workspace.versions.patched:
        with tempfile.TemporaryDirectory(prefix="vllm-overlay-bench-") as name:
            archive.unpack(workspace.fetcher.fetch(release, "sdist"), Path(name))
            (tree,) = Path(name).iterdir()
            command = ["env", f"QUILT_PATCHES={workspace.project.patches}",
                       f"QUILT_SERIES={release.series}", "quilt", "--quiltrc=-", "push", "-a",
                       "-q", "--fuzz=0"]  # fmt: skip
            seconds += measure(command, tree).seconds
    return f"{seconds:.1f}"
