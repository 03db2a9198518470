"""Several files of the checkout written together: all of them or none.

The new and the old bytes are first written to a journal, `work/refresh/`, with a plan of what
goes where. Until the plan is there, nothing has happened; from then on, `finish` can do the rest,
again and again, and `undo` can take it back. So after a crash the next command that writes
finishes the last one, before it looks at anything.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from overlay.base import atomic
from overlay.base.errors import Exit, OverlayError

JOURNAL = Path("work", "refresh")
_PLAN = "plan.json"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """No other refresh writes to the checkout at `root` meanwhile.

    Raises:
        OverlayError: another one is at it, or the checkout can't be written.
    """
    try:
        (root / JOURNAL).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / JOURNAL.with_suffix(".lock"), timeout=0):
            yield
    except Timeout as error:
        raise OverlayError(
            f"another command is writing to {root}", "it holds work/refresh.lock",
            "Wait until it has ended", Exit.ENVIRONMENT,
        ) from error  # fmt: skip
    except OSError as error:
        raise _unwritable(root, error) from error


def write(root: Path, files: Mapping[str, bytes | None], label: str = "refresh") -> None:
    """Write `files` (paths below `root`; None: it goes), all or none. Call it within `locked`.

    `label` says what for, to who finds it unfinished.

    Raises:
        OverlayError: the disk is full or the folder can't be written; nothing is, then.
    """
    journal = root / JOURNAL
    try:
        shutil.rmtree(journal, ignore_errors=True)
        journal.mkdir(parents=True)
        plan: dict[str, dict[str, str | None]] = {}
        for number, (path, data) in enumerate(files.items()):
            old = _bytes(root / path)
            for side, one in (("new", data), ("old", old)):
                if one is not None:
                    atomic.put(journal / f"{number}.{side}", one)
            plan[path] = {"old": _sha256(old), "new": _sha256(data)}
        atomic.put(journal / _PLAN, json.dumps({"label": label, "files": plan}, indent=2).encode())
    except OSError as error:
        shutil.rmtree(journal, ignore_errors=True)
        raise _unwritable(root, error) from error
    finish(root)


def is_unfinished(root: Path) -> bool:
    """Whether a write was interrupted after its plan was made."""
    return (root / JOURNAL / _PLAN).is_file()


def unfinished(root: Path) -> str:
    """The label of the write that was interrupted; empty if none was."""
    return str(_read(root)["label"]) if is_unfinished(root) else ""


def _read(root: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((root / JOURNAL / _PLAN).read_bytes())
    return plan


def finish(root: Path) -> tuple[str, ...]:
    """Do what is left of a write, if one was interrupted. Returns the paths it was about.

    Raises:
        OverlayError: a file was changed by somebody else in between, or can't be written.
    """
    return _bring(root, "new")


def undo(root: Path) -> tuple[str, ...]:
    """Take back what there is of a write, if one was interrupted. Returns as `finish`.

    Raises:
        OverlayError: as `finish`.
    """
    return _bring(root, "old")


def _bring(root: Path, side: str) -> tuple[str, ...]:
    journal = root / JOURNAL
    if not is_unfinished(root):
        return ()
    plan = _read(root)["files"]
    for path, digests in plan.items():
        if _digest(root / path) not in (digests["old"], digests["new"]):
            raise OverlayError(
                f"cannot finish the interrupted write of {path}",
                "the file was changed since; the text meant for it is in "
                f"{JOURNAL}/{list(plan).index(path)}.{side}",
                f"Settle that file by hand, delete {JOURNAL}/{_PLAN} and run it again",
                Exit.PROBLEMS,
            )
    try:
        for number, (path, digests) in enumerate(plan.items()):
            _settle(root / path, journal / f"{number}.{side}", digests[side])
        (journal / _PLAN).unlink()
    except OSError as error:
        raise _unwritable(root, error) from error
    shutil.rmtree(journal, ignore_errors=True)
    return tuple(plan)


def _settle(target: Path, source: Path, digest: str | None) -> None:
    """Bring one file to where the plan wants it; a second time changes nothing."""
    if digest is None:
        target.unlink(missing_ok=True)
        if target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()
    elif _digest(target) != digest:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.put(target, source.read_bytes())


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _digest(path: Path) -> str | None:
    return _sha256(_bytes(path))


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _unwritable(root: Path, error: OSError) -> OverlayError:
    return OverlayError(
        f"cannot write to {root}", str(error),
        "Make the checkout writable, and run it again", Exit.ENVIRONMENT,
    )  # fmt: skip
