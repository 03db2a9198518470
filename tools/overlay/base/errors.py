"""The one error type that a user sees, and the exit statuses of every command."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses; README.md and every --help list them."""

    OK = 0
    #: A check ran and found problems (validate, verify, regress).
    PROBLEMS = 1
    #: The command line is wrong: unknown flag, release or topic.
    USAGE = 2
    #: A file could not be had: no network, not on the index, not in the cache with --offline.
    UNAVAILABLE = 3
    #: A file is not what VERSIONS.toml pins: hash, size, tree id, unsafe archive member.
    INTEGRITY = 4
    #: A patch or a series does not fit the release.
    PATCH = 5
    #: Environment error: unwritable folder, missing tool, failed build.
    ENVIRONMENT = 6


#: What the operating system says when the machine is at fault, and not the tool.
MACHINE_ERRORS = frozenset(
    (
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
        errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    )
)  # fmt: skip


class OverlayError(Exception):
    """A failure that a person can act on.

    `what` failed, `why` it did, and what to do (`fix`): each a phrase without a final
    full stop, the last one a sentence's start. `status` becomes the exit status of the command.
    """

    def __init__(self, what: str, why: str, fix: str, status: Exit) -> None:
        super().__init__(what, why, fix, status)
        self.what = what
        self.why = why
        self.fix = fix
        self.status = status

    def __str__(self) -> str:
        """The one line printed to a user."""
        return f"{self.what}: {self.why}. {self.fix}."


def said(error: Exception) -> str:
    """What an error says; of the system's, the file and why, without the number.

    >>> said(FileNotFoundError(2, "No such file or directory", "a.toml"))
    'a.toml: No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def some(paths: Sequence[str]) -> str:
    """The first paths, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more}"
