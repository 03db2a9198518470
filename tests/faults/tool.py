"""Runs of the tool that may be killed, starved or watched.

Each is a fork of the test's process, in a process group of its own: a real process, without
the second that importing the tool takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import pwd
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import overlay.cli.main
import overlay.releases.index
from made_upstream import Upstream, at, git
from overlay.base.digest import sha256
from overlay.releases.index import IndexSettings
from unit.made_matrix import keep

#: What a killed run leaves running becomes a child of this process, which can wait for it.
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
#: Seconds after which a run counts as hanging, on a machine however busy.
HANGING = 300
RELEASE = "1.0"
WRITES = frozenset(
    (
        "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
        "os.truncate", "subprocess.Popen", "fcntl.flock",
    )
)  # fmt: skip


def with_matrix(patched: Upstream, folder: Path) -> Upstream:
    """A copy of the upstream in `folder`, with a matrix and the documents of its report."""
    for part in (patched.root, patched.served):
        shutil.copytree(part, folder / part.name)
    made = at(folder)
    keep(made.root, "1.0", "1.1")
    (made.root / "docs").mkdir()
    for name in ("gpu-results.md", "benchmarks.md"):
        (made.root / "docs" / name).write_text("# Of it\n")
    return made


@dataclass(frozen=True)
class Place:
    """Folders for the cache, the work tree and the wheel of one run or several."""

    upstream: Upstream
    cache: Path
    work: Path
    dist: Path

    @classmethod
    def below(cls, upstream: Upstream, folder: Path) -> Place:
        return cls(upstream, folder / "cache", folder / "work", folder / "dist")

    def command(self, *words: str) -> tuple[str, ...]:
        """A command line on this cache and the made-up upstream."""
        flags = ("--root", self.upstream.root, "--cache", self.cache,
                 "--find-links", self.upstream.served)  # fmt: skip
        return (*map(str, flags), *words)

    @property
    def fetch(self) -> tuple[str, ...]:
        return self.command("fetch", RELEASE)

    @property
    def apply(self) -> tuple[str, ...]:
        return self.command("apply", RELEASE, str(self.work))

    @property
    def build(self) -> tuple[str, ...]:
        return self.command("build", RELEASE, "--out", str(self.dist))

    @property
    def all(self) -> tuple[tuple[str, ...], ...]:
        """What is to be done; a work tree that is there is not made again."""
        return (self.fetch, self.build) if self.work.exists() else (
            self.fetch, self.apply, self.build,
        )  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    status: int
    """Exit status, or minus the signal that ended it."""
    out: str
    err: str

    @property
    def is_message(self) -> bool:
        """Whether it failed as a user should see it: one line, an honest status, no traceback."""
        said = self.err.strip().splitlines()
        return (
            self.status in (1, 2, 3, 4, 5, 6)
            and bool(said)
            and said[-1].startswith("error: ")
            and "Traceback" not in self.err
            and "internal error" not in self.err
        )


@dataclass(frozen=True)
class Running:
    """A run under way."""

    pid: int
    out: int
    err: int
    scratch: str
    """Its folder for temporary files; goes with it."""

    def wait(self) -> Ended:
        """Wait for its end, and for that of what it started.

        Raises:
            AssertionError: it hangs.
        """
        status = self._reap(self.pid)
        with contextlib.suppress(ChildProcessError):  # nothing it started outlived it
            while True:
                self._reap(-self.pid)
        shutil.rmtree(self.scratch)
        out, err = self._read()
        return Ended(os.waitstatus_to_exitcode(status), out, err)

    def _reap(self, which: int) -> int:
        until = time.monotonic() + HANGING
        while True:
            done, status = os.waitpid(which, os.WNOHANG)
            if done:
                return status
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"it hangs: {self._read()}")
            time.sleep(0.005)

    def _read(self) -> tuple[str, str]:
        texts = []
        for handle in (self.out, self.err):
            with os.fdopen(handle, encoding="utf-8", errors="replace") as stream:
                texts.append(stream.read())
        return texts[0], texts[1]


def start(*commands: Sequence[str], before: Callable[[], object] = lambda: None) -> Running:
    """Start the commands, one after the other while they succeed; `before` runs in the fork."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    scratch = tempfile.mkdtemp(prefix="vllm-overlay-")
    Path(scratch).chmod(0o1777)  # `before` may become another user
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(out_end)
        os.close(err_end)
        return Running(pid, out, err, scratch)
    status = 99
    try:
        os.setsid()
        os.dup2(out_end, 1)
        os.dup2(err_end, 2)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        logging.root.handlers.clear()  # those of pytest
        os.environ["TMPDIR"] = tempfile.tempdir = scratch
        setattr(overlay.releases.index, "pip_settings", IndexSettings)  # noqa: B010 - the machine's are not tested
        before()
        status = main(*commands)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(*commands: Sequence[str]) -> int:
    """The tool itself, command by command while they succeed, in this process."""
    for command in commands:
        sys.argv = ["vllm-overlay", *command]
        try:
            overlay.cli.main.main()
        except SystemExit as ended:
            if ended.code:
                return int(ended.code)
    return 0


def go(*commands: Sequence[str], before: Callable[[], object] = lambda: None) -> Ended:
    """`start`, and wait."""
    return start(*commands, before=before).wait()


def as_nobody(*warm: Sequence[str]) -> Callable[[], None]:
    """For `start`, where this is root: the run is nobody's.

    Python itself may lie where only root may look: the commands `warm` run first, on places of
    root's own, for all that is needed to be imported.
    """

    def before() -> None:
        nobody = pwd.getpwnam("nobody")
        assert main(*warm) == 0
        sys.stdout.flush()
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
        os.environ.update(HOME="/nonexistent", USER="nobody")

    return before


class Counter:
    """A number that forks share with their parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int.from_bytes(self._memory[:], "little")

    def increase(self) -> int:
        value = self.value + 1
        self._memory[:] = value.to_bytes(8, "little")
        return value


def is_write(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an audit event changes a file or starts a process."""
    if event != "open":
        return event in WRITES
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def kill_at(number: int, counter: Counter) -> Callable[[], None]:
    """For `start`: kill the run at its `number`th write (0: never, only count them)."""

    def before() -> None:
        # Folders of git's objects are named after hashes, and hashes hang on the date: without
        # this, a run may make a folder fewer than the one whose writes were counted.
        os.environ["GIT_COMMITTER_DATE"] = "2027-01-02T00:00:00+00:00"

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if is_write(event, arguments) and counter.increase() == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return before


def spread(count: int, total: int) -> list[int]:
    """`count` different numbers from 1 to `total`, evenly spread."""
    assert total >= count, total
    return [1 + (total - 1) * n // (count - 1) for n in range(count)]


@dataclass(frozen=True)
class Truth:
    """What an undisturbed run leaves."""

    files: dict[str, str]
    """sha256 of upstream's files by name."""
    wheel: str
    """Its sha256."""
    tree: dict[str, str]
    """sha256 of the work tree's files by path."""
    head: str
    """The work tree's commit."""


def truth(place: Place) -> Truth:
    """What an undisturbed run leaves in `place`, made by one."""
    ended = go(*place.all)
    assert ended.status == 0, ended.err
    (wheel,) = place.dist.iterdir()
    return Truth(
        dict(finals(place.cache / "files")), sha256(wheel), snapshot(place.work), head(place)
    )


def finals(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of what has its final name in a folder."""
    for file in sorted(folder.iterdir()) if folder.exists() else ():
        if not file.name.startswith(".") and file.suffix not in (".part", ".lock"):
            yield file.name, sha256(file)


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of the files of a work tree by path, git's own left out."""
    found = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: sha256(file) for name, file in found.items() if not name.startswith(".git/")}


def head(place: Place) -> str:
    """The commit of the work tree."""
    return git(place.work, "rev-parse", "HEAD").decode().strip()


def require_whole(place: Place, expected: Truth) -> None:
    """No file under a final name is anything but complete and right."""
    for name, digest in finals(place.cache / "files"):
        assert expected.files[name] == digest, f"{name} in the cache"
    for name, digest in finals(place.dist):
        assert expected.wheel == digest, f"{name} in dist"
    if place.work.exists():
        assert snapshot(place.work) == expected.tree
        assert head(place) == expected.head


def require_same(place: Place, expected: Truth) -> None:
    """Everything is there, as an undisturbed run leaves it."""
    ended = go(*place.all)
    assert ended.status == 0, ended.err
    require_whole(place, expected)
    assert dict(finals(place.cache / "files")) == expected.files
    assert [sha256(file) for file in place.dist.iterdir()] == [expected.wheel]  # nothing is left
    assert place.work.exists()
