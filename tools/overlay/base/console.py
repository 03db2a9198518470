"""What a person sees: log lines that name the release, progress bars, tables.

Results go to stdout; everything else to stderr, so that `--json` and pipes stay clean.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would exit with status 1."""
        raise BrokenPipeError


err = _Console(stderr=True, highlight=False, soft_wrap=True)
out = _Console(highlight=False, soft_wrap=True)


def set_up_logging(verbose: bool) -> None:
    """Log lines on stderr: INFO and above, or everything with `verbose`."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, handlers=[_Handler()], format="%(message)s")
    for noisy in ("httpx2", "httpcore", "httpcore2", "unearth", "filelock", "git", "stamina"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if verbose else logging.ERROR)


class _Handler(logging.Handler):
    """Lines above a progress bar if there is one, and never wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False)


if TYPE_CHECKING:
    Log = logging.LoggerAdapter[logging.Logger]
else:  # Python 3.10 cannot subscript it
    Log = logging.LoggerAdapter


class _Prefix(Log):
    def process(self, msg: object, kwargs: object) -> tuple[str, object]:  # type: ignore[override]
        return f"{self.extra['release']}: {msg}" if self.extra else str(msg), kwargs


def log_for(release: str) -> Log:
    """A logger each of whose lines starts with the release it speaks of."""
    return _Prefix(logging.getLogger("overlay"), {"release": release})


def print_json(value: object) -> None:
    """One JSON document on stdout, keys in the order given."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@dataclass
class Progress:
    """Progress bars on a terminal; a line when done elsewhere."""

    enabled: bool = True

    @contextmanager
    def bytes(self, what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        """Progress of `total` bytes of which `done` are there; yields a function to advance it."""
        if not (self.enabled and err.is_terminal):
            yield lambda _count: None
            err.print(f"{what}: {total / 1e6:.1f} MB", style="dim")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=err, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda count: bar.update(task, advance=count)

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Progress of `total` steps; yields a function that ends one, told what it was."""
        if not (self.enabled and err.is_terminal):
            yield lambda _name: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[at]}"))
        with Bar(*columns, console=err, transient=True) as bar:
            task = bar.add_task(what, total=total, at="")
            yield lambda name: bar.update(task, advance=1, at=name)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> [counted(1, "release"), counted(0, "release"), counted(2, "patch")]
    ['1 release', '0 releases', '2 patches']
    """
    ending = "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"
