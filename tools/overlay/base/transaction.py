"""Several files of the checkout written together: all of them or none.

The journal is `work/refresh/`. After a crash the next command that writes settles the last one,
before it looks at anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from overlay.base.errors import Exit, OverlayError, said
from overlay.base.journal import ChangedMeanwhileError, Journal
from overlay.base.locking import file_lock

JOURNAL = Path("work", "refresh")


@contextmanager
def locked(root: Path, *, to_write: bool = True) -> Iterator[None]:
    """No other command writes to the checkout at `root` meanwhile.

    Without `to_write` a checkout that can't be written is left unlocked.

    Raises:
        OverlayError: another one is at it, or the checkout can't be written.
    """
    held = ExitStack()
    try:
        (root / JOURNAL).parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(file_lock(root / JOURNAL.with_suffix(".lock"), timeout=0))
    except Timeout as error:
        raise OverlayError(
            f"another command is writing to {root}", "it holds work/refresh.lock",
            "Wait until it has ended", Exit.ENVIRONMENT,
        ) from error  # fmt: skip
    except OSError as error:
        if to_write:
            raise _unwritable(root, error) from error
    with held:
        yield


def write(root: Path, files: Mapping[str, bytes | None], label: str = "refresh") -> None:
    """Write `files` (paths below `root`; None: it goes), all or none. Call it within `locked`.

    `label` says what for, to who finds it unfinished.

    Raises:
        OverlayError: the disk is full or the folder can't be written; nothing is, then.
    """
    with _explained(root):
        journal = _journal(root)
        if not journal.is_planned():
            journal.finish()
        journal.write(files, label)


def unfinished(root: Path) -> str:
    """The label of the write that was interrupted after its plan; empty if none was."""
    return _journal(root).label()


def finish(root: Path) -> tuple[str, ...]:
    """Do what is left of a write, if one was interrupted. Returns the paths it was about.

    Raises:
        OverlayError: a file was changed by somebody else in between, or can't be written.
    """
    with _explained(root):
        return _journal(root).finish()


def undo(root: Path) -> tuple[str, ...]:
    """Take back what there is of a write, if one was interrupted. Returns as `finish`.

    Raises:
        OverlayError: as `finish`.
    """
    with _explained(root):
        return _journal(root).undo()


def _journal(root: Path) -> Journal:
    return Journal(root, root / JOURNAL)


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except ChangedMeanwhileError as error:
        raise OverlayError(
            f"cannot finish the interrupted write of {error.path}",
            f"the file was changed since; the text meant for it is in {JOURNAL}/{error.staged}",
            f"Settle that file by hand, delete {JOURNAL} and run it again",
            Exit.PROBLEMS,
        ) from error
    except OSError as error:
        raise _unwritable(root, error) from error


def _unwritable(root: Path, error: OSError) -> OverlayError:
    return OverlayError(
        f"cannot write to {root}", said(error),
        "Make the checkout writable, and run it again", Exit.ENVIRONMENT,
    )  # fmt: skip
