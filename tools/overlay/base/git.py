"""Git, run so that nothing of the caller's leaks in.

`git apply` inside a folder nested in another repository can exit 0 and change
nothing; a user's global config changes what `git format-patch` writes; an exported
GIT_DIR sends commands elsewhere. Every call here names its repository and carries an
environment of its own.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from overlay.base.errors import MACHINE_ERRORS, Exit, OverlayError

#: Git variables that would redirect a command, blanked.
_BLANK = ("GIT_NAMESPACE", "GIT_CONFIG_PARAMETERS", "GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS")
_NO_USER_CONFIG = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "0",
    "GIT_ATTR_NOSYSTEM": "1",
}
_ISOLATION = {
    "GIT_ALTERNATE_OBJECT_DIRECTORIES": "",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
    "TZ": "UTC",
    **dict.fromkeys(_BLANK, ""),
}


#: What git prints of a machine that refuses: strerror's words, under LC_ALL=C, or its own.
_MACHINE = (*(os.strerror(number) for number in MACHINE_ERRORS), "Out of diskspace")


class GitError(Exception):
    """A git command exited non-zero; `stderr` and `stdout` are what it said."""

    def __init__(self, command: str, status: int, stderr: str, stdout: bytes = b"") -> None:
        said = "; ".join(line.strip() for line in stderr.strip().splitlines())
        if status < 0:
            said = f"{said} (ended by {signal.Signals(-status).name})".strip()
        super().__init__(f"git {command} exited {status}: {said}")
        self.status = status
        self.stderr = stderr
        self.stdout = stdout
        self.said = said
        """What it said on stderr, in one line, and which signal ended it."""
        self.is_machine = status < 0 or any(text in said for text in _MACHINE)
        """Whether the machine refused (a full disk, say), whatever git was asked."""


class Git:
    """One repository (or none, for commands like mailinfo) and how to call git on it.

    With `user_config` the user's own settings count: a remote needs their credentials.
    """

    def __init__(
        self, git_dir: Path, work_tree: Path | None = None, *, user_config: bool = False
    ) -> None:
        self.git_dir = git_dir.absolute()
        self.work_tree = work_tree.absolute() if work_tree else None
        self.user_config = user_config

    def run(
        self,
        *arguments: str,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
    ) -> bytes:
        """Run ``git *arguments`` and return its stdout, byte for byte.

        Raises:
            GitError: it exited non-zero.
            OverlayError: there is no git on this machine.
        """
        with tempfile.TemporaryFile() as source:
            source.write(stdin)
            source.seek(0)
            status, out, err = self._execute(["git", *arguments], source, env or {})
        if status:
            raise GitError(arguments[0], status, err, out)
        return out

    def text(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Like `run`, decoded and stripped: for ids and the like."""
        return self.run(*arguments, env=env).decode("utf-8", "surrogateescape").strip()

    def send(self, other: Git, commit: str, since: str = "") -> None:
        """Copy to another repository what `commit` has, less what `since` has.

        Raises:
            GitError: there is no such commit, or the other one can't be written.
        """
        wanted = f"{commit}\n^{since}\n" if since else f"{commit}\n"
        pack = self.run("pack-objects", "--quiet", "--revs", "--stdout", stdin=wanted.encode())
        # A whole source tree stays a pack; what a few commits add does not make one more.
        receive = ("unpack-objects", "-q") if since else ("index-pack", "--stdin")
        other.run(*receive, stdin=pack)

    def _execute(
        self, command: list[str], source: IO[bytes], env: Mapping[str, str]
    ) -> tuple[int, bytes, str]:
        # GitPython looks for git when it is imported: by what needs it, and not to be told of it.
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import git
        from git.exc import GitCommandError, GitCommandNotFound

        try:
            # env= and not custom_environment(): that one is shared by all threads.
            # The overloads leave this combination out.
            execute: Any = git.Git(str(self.work_tree or self.git_dir.parent)).execute
            status, out, err = execute(
                command,
                istream=source,
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
                env={**self._environment, **env},
            )
        except GitCommandNotFound as error:
            raise no_git() from error
        except GitCommandError as error:
            return error.status if isinstance(error.status, int) else 1, b"", str(error.stderr)
        return int(status), _as_bytes(out), str(err)

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **_ISOLATION,
            **({} if self.user_config else _NO_USER_CONFIG),
            "GIT_DIR": str(self.git_dir),
            "GIT_OBJECT_DIRECTORY": str(self.git_dir / "objects"),
            "GIT_INDEX_FILE": str(self.git_dir / "index"),
            "GIT_CEILING_DIRECTORIES": str(self.git_dir.parent),
            **({"GIT_WORK_TREE": str(self.work_tree)} if self.work_tree else {}),
        }


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def no_git() -> OverlayError:
    """The error for a machine without git."""
    return OverlayError(
        "git is missing",
        "patches are applied with git, and no git command is on the PATH",
        "Install it, e.g. apt-get install git",
        Exit.ENVIRONMENT,
    )
