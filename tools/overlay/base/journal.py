"""Changes to several files of a folder: all of them, or none.

Everything new is first written to a stage, a folder of its own, with a second name of everything
old and a plan of what goes where. Until the plan has its name nothing has changed; then there are
renames and removals alone. What fails is undone. Who is killed leaves the plan behind, and whoever
comes next brings it to its end with `finish`, or takes it back with `undo`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from overlay.base import atomic
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.base.paths import is_safe_path

PLAN = "journal.json"
IN_SITE = ".vllm-overlay"
"""The stage of a site-packages folder, in it; the name of no package and of no distribution."""
_UNDO = "undo.json"
"""The same plan once it is being taken back: a name is changed where the disk is full, too."""


class ChangedMeanwhileError(Exception):
    """A file is neither what it was nor what it was to be."""

    def __init__(self, path: str, staged: str) -> None:
        """Remember its path, and the name in the stage of what was meant for it."""
        super().__init__(path)
        self.path, self.staged = path, staged


@dataclass(frozen=True)
class File:
    """A file that is written or removed."""

    path: str
    """Relative to the folder that is changed."""
    old: str | None
    """Hexadecimal sha256 before; None: there is no such file."""
    new: str | None
    """Hexadecimal sha256 after; None: it is removed."""


@dataclass(frozen=True)
class _Plan:
    label: str
    files: tuple[File, ...]
    is_undone: bool = False
    """Whether it is being taken back."""


def _ignore(_path: Path) -> None:
    pass


@dataclass(frozen=True)
class Journal:
    """What is under way in one folder. Callers keep others from it meanwhile."""

    root: Path
    """The folder whose files change."""
    stage: Path
    """Where bytes and plan are kept; on the same file system, for a rename to be enough."""
    after_each: Callable[[Path], None] = _ignore
    """Called with the path of each file that has been written or removed."""

    def write(
        self,
        files: Mapping[str, bytes | None],
        label: str = "",
        models: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write `files` (paths below `root`; None: it goes), in that order; folders come and go
        with their files.

        No folder is renamed: in a container, one from the image can't be (overlayfs, EXDEV). A
        file keeps its mode and owner; a new one has its model's, which `models` has the path of,
        or mode 0644. `label` says what for, to who finds it unfinished.

        Raises:
            OSError: it can't be done; nothing has changed.
        """
        self.stage.mkdir(mode=0o700, parents=True)
        try:
            plan = self._prepare(files, label, models)
        except BaseException:
            shutil.rmtree(self.stage, ignore_errors=True)
            raise
        try:
            self._finish(plan)
        except BaseException:
            self._undo(plan)
            raise

    def is_left(self) -> bool:
        """Whether an earlier write has not come to its end, planned or not."""
        return self.stage.is_dir()

    def label(self) -> str:
        """What for the write was that was interrupted after its plan; empty if none was."""
        plan = self._read()
        if plan is None:
            return ""
        return f"undoing of a {plan.label}" if plan.is_undone else plan.label

    def is_planned(self) -> bool:
        """Whether a write was interrupted after its plan was made."""
        return self._read() is not None

    def paths(self) -> tuple[str, ...]:
        """What the write is about that was interrupted after its plan."""
        plan = self._read()
        return tuple(file.path for file in plan.files) if plan else ()

    def finish(self, *, whatever: bool = False) -> tuple[str, ...]:
        """Do what is left of a write, or of its undoing. Returns the paths it was about.

        They are none if nothing had been changed; what had been prepared is cleared away. With
        `whatever`, it is done even if somebody else has changed a file since, which may stay so.

        Raises:
            ChangedMeanwhileError: somebody else has changed a file since.
            OSError: it can't be done.
            OverlayError: the plan of it is damaged.
        """
        return self._settle_left(False, whatever)

    def undo(self, *, whatever: bool = False) -> tuple[str, ...]:
        """Take back what there is of a write. Returns and raises as `finish`."""
        return self._settle_left(True, whatever)

    def drop(self) -> None:
        """Forget what is left of a write: each of its files stays as it is, old or new."""
        shutil.rmtree(self.stage)

    def _settle_left(self, is_undone: bool, whatever: bool) -> tuple[str, ...]:
        plan = self._read()
        if plan is None:
            shutil.rmtree(self.stage, ignore_errors=True)
            return ()
        is_undone |= plan.is_undone
        number = self._first_changed(plan, is_undone)
        if number is not None and not whatever:
            side = "old" if is_undone else "new"
            raise ChangedMeanwhileError(plan.files[number].path, f"{number}.{side}")
        (self._undo if is_undone else self._finish)(plan)
        return tuple(file.path for file in plan.files)

    def changed(self) -> str | None:
        """The first file that somebody has changed since the write was interrupted."""
        plan = self._read()
        number = self._first_changed(plan, plan.is_undone) if plan else None
        return plan.files[number].path if plan and number is not None else None

    def _first_changed(self, plan: _Plan, is_undone: bool) -> int | None:
        for number, file in enumerate(plan.files):
            # What has its place already is the new one; an undone file may be either.
            is_done = (
                not is_undone and file.new is not None and not self._at(number, "new").exists()
            )
            expected = {file.new} if is_done else {file.old, file.new}
            if _digest(self.root / file.path) not in expected:
                return number
        return None

    def _at(self, number: int, side: str) -> Path:
        return self.stage / f"{number}.{side}"

    def _read(self) -> _Plan | None:
        for name in (PLAN, _UNDO):
            with suppress(FileNotFoundError):
                data = (self.stage / name).read_bytes()
                try:
                    raw = json.loads(data)
                    files = tuple(File(**file) for file in raw["files"])
                    if not all(is_safe_path(file.path) for file in files):
                        raise ValueError("a path in it leads elsewhere")
                    return _Plan(raw.get("label", ""), files, name == _UNDO)
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    raise _damaged(self.stage / name) from error
        return None

    def _prepare(
        self, files: Mapping[str, bytes | None], label: str, models: Mapping[str, str]
    ) -> _Plan:
        planned = []
        for number, (path, data) in enumerate(files.items()):
            old, new = _digest(self.root / path), None
            if old is not None:
                _keep(self.root / path, self._at(number, "old"))
            if data is not None:
                staged = self._at(number, "new")
                _write(staged, data)
                _make_like(staged, self.root, path if old else models.get(path))
                new = hashlib.sha256(data).hexdigest()
            planned.append(File(path, old, new))
        _sync(self.stage)
        plan = _Plan(label, tuple(planned))
        raw = {"label": label, "files": list(map(asdict, plan.files))}
        _write(self.stage / "journal.part", json.dumps(raw, indent=2).encode())
        (self.stage / "journal.part").replace(self.stage / PLAN)
        _sync(self.stage)
        _sync(self.stage.parent)
        return plan

    def _finish(self, plan: _Plan) -> None:
        """Do what has not been done yet."""
        for number, file in enumerate(plan.files):
            staged, path = self._at(number, "new"), self.root / file.path
            if file.new is None:
                path.unlink(missing_ok=True)
            elif staged.exists():
                _move(staged, path)
            self.after_each(path)
        self._clear(plan)

    def _undo(self, plan: _Plan) -> None:
        """Take back what has been done of it."""
        with suppress(FileNotFoundError):
            (self.stage / PLAN).replace(self.stage / _UNDO)
        for number, file in enumerate(plan.files):
            staged, kept = self._at(number, "new"), self._at(number, "old")
            path = self.root / file.path
            if staged.exists() if file.new else path.exists():
                continue  # nothing has become of this one
            if file.old is None:
                path.unlink(missing_ok=True)
            elif kept.exists():
                _move(kept, path)
            self.after_each(path)
        self._clear(plan)

    def _clear(self, plan: _Plan) -> None:
        """Make sure of what was done, and clear the stage away, the plan first."""
        for folder in sorted({(self.root / file.path).parent for file in plan.files}):
            if folder.is_dir():
                _sync(folder)
                self._remove_if_empty(folder)
        _sync(self.root)
        for name in (PLAN, _UNDO):
            (self.stage / name).unlink(missing_ok=True)
        shutil.rmtree(self.stage)

    def _remove_if_empty(self, folder: Path) -> None:
        """Remove the folders that nothing is left in, up to `root`."""
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _damaged(plan: Path) -> OverlayError:
    return OverlayError(
        f"cannot read {plan}", "it is no plan of an interrupted write",
        "Compare the files beside it with those that it was about, and delete its folder",
        Exit.PROBLEMS,
    )  # fmt: skip


def _digest(path: Path) -> str | None:
    try:
        return sha256(path)
    except FileNotFoundError:
        return None


def _keep(path: Path, copy: Path) -> None:
    """A second name of the file, or a copy where the file system has no second names."""
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)


def _move(source: Path, target: Path) -> None:
    """Give a file of the stage its name, or its bytes where the stage is on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        atomic.put(target, source.read_bytes())
        shutil.copymode(source, target)
        source.unlink()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _make_like(path: Path, root: Path, model: str | None) -> None:
    """Give a file the mode and, if need be and this user may, the owner of another one."""
    if model is None:
        path.chmod(0o644)
        return
    wanted, found = (root / model).stat(), path.stat()
    if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        with suppress(PermissionError):
            os.chown(path, wanted.st_uid, wanted.st_gid)
    path.chmod(wanted.st_mode & 0o777)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
