"""Changes to several files of a site-packages folder: all of them, or none.

Everything new is first written into a folder beside the old, with a journal of what is to be
done; then there are renames and removals alone. Who is killed before the journal has its name
has changed nothing; after that, `recover` finishes the work. What fails is undone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from overlay.base.digest import sha256

#: Below the folder that is changed; the name of no package and of no distribution.
STAGE = ".vllm-overlay"
_JOURNAL = "journal.json"


class ChangedMeanwhileError(Exception):
    """A file is neither what it was nor what it was to be; the message is its path."""


@dataclass(frozen=True)
class File:
    """A file that is written or removed."""

    path: str
    """Relative to the folder that is changed."""
    old: str | None
    """Hexadecimal sha256 before; None: there is no such file."""
    new: str | None
    """Hexadecimal sha256 after; None: it is removed."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Wait until no other process changes `root`, and keep others from it.

    The folder itself is locked, so that nothing is left behind.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def change(
    root: Path, written: Mapping[str, bytes], removed: frozenset[str], models: Mapping[str, str]
) -> None:
    """Write and remove files below `root`; folders come and go with their files.

    No folder is renamed: in a container, one from the image can't be (overlayfs, EXDEV). A new
    file gets the mode and owner of its model, which `models` has the path of.

    Raises:
        OSError: it can't be done; nothing has changed.
    """
    stage = root / STAGE
    try:
        files = _prepare(root, written, removed, models)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        _finish(root, files)
    except BaseException:
        _undo(root, files)
        raise


def is_interrupted(root: Path) -> bool:
    """Whether a change of `root` has been begun and not ended."""
    return (root / STAGE).is_dir()


def recover(root: Path) -> bool:
    """Bring a change to its end that was interrupted; returns whether it has been done.

    If not, nothing had been changed yet, and what had been prepared is cleared away.

    Raises:
        ChangedMeanwhileError: somebody else has changed a file since.
        OSError: it can't be done.
    """
    stage = root / STAGE
    try:
        raw = json.loads((stage / _JOURNAL).read_bytes())
    except FileNotFoundError:
        shutil.rmtree(stage)
        return False
    files = tuple(File(**file) for file in raw["files"])
    for number, file in enumerate(files):
        is_done = file.new is not None and not (stage / "new" / str(number)).exists()
        expected = {file.new} if is_done else {file.old, file.new}
        if _digest(root / file.path) not in expected:
            raise ChangedMeanwhileError(file.path)
    _finish(root, files)
    return True


def _digest(path: Path) -> str | None:
    try:
        return sha256(path)
    except FileNotFoundError:
        return None


def _prepare(
    root: Path, written: Mapping[str, bytes], removed: frozenset[str], models: Mapping[str, str]
) -> tuple[File, ...]:
    stage = root / STAGE
    stage.mkdir(mode=0o700)
    (stage / "new").mkdir()
    (stage / "old").mkdir()
    files = []
    # What is new comes first: there is never less than one whole dist-info's METADATA.
    for number, path in enumerate([*sorted(written), *sorted(removed)]):
        old, new = _digest(root / path), None
        if old is not None:
            _keep(root / path, stage / "old" / str(number))
        if path in written:
            staged, data = stage / "new" / str(number), written[path]
            _write(staged, data)
            _make_like(staged, root / (path if old else models[path]))
            new = hashlib.sha256(data).hexdigest()
        files.append(File(path, old, new))
    for folder in ("new", "old"):
        _sync(stage / folder)
    _write(stage / "journal.part", json.dumps({"files": list(map(asdict, files))}).encode())
    (stage / "journal.part").rename(stage / _JOURNAL)
    _sync(stage)
    _sync(root)
    return tuple(files)


def _keep(path: Path, copy: Path) -> None:
    """A second name of the file, or a copy where the file system has no second names."""
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _make_like(path: Path, model: Path) -> None:
    """Give a file the mode and, if need be and this user may, the owner of another one."""
    wanted, found = model.stat(), path.stat()
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


def _finish(root: Path, files: Sequence[File]) -> None:
    """Do what has not been done yet."""
    for number, file in enumerate(files):
        staged, path = root / STAGE / "new" / str(number), root / file.path
        if file.new is None:
            path.unlink(missing_ok=True)
        elif staged.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(path)
        _forget_bytecode(path)
    _settle(root, files)


def _undo(root: Path, files: Sequence[File]) -> None:
    """Take back what has been done of it."""
    for number, file in enumerate(files):
        staged, path = root / STAGE / "new" / str(number), root / file.path
        if staged.exists() if file.new else path.exists():
            continue  # nothing has become of this one
        if file.old is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            (root / STAGE / "old" / str(number)).replace(path)
        _forget_bytecode(path)
    _settle(root, files)


def _settle(root: Path, files: Sequence[File]) -> None:
    """Make sure of what was done, and clear the stage away, the journal first."""
    for folder in sorted({(root / file.path).parent for file in files}):
        if folder.is_dir():
            _sync(folder)
            _remove_if_empty(root, folder)
    _sync(root)
    (root / STAGE / _JOURNAL).unlink()
    shutil.rmtree(root / STAGE)


def _remove_if_empty(root: Path, folder: Path) -> None:
    """Remove the folders that nothing is left in, up to `root`."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _forget_bytecode(path: Path) -> None:
    """Remove what Python has compiled of a module: nothing else says that it is out of date if it
    was compiled to be used unchecked."""
    if path.suffix == ".py":
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)
        with suppress(OSError):
            (path.parent / "__pycache__").rmdir()
