"""The `vllm-overlay` command: what all commands share, and how any of them ends."""

from __future__ import annotations

import codecs
import contextlib
import errno
import importlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click

from overlay.base.console import err, set_up_logging
from overlay.base.errors import MACHINE_ERRORS, Exit, OverlayError
from overlay.base.git import GitError
from overlay.base.project import cache_folder, find_project
from overlay.cli.options import CONTEXT, EPILOG

if TYPE_CHECKING:
    from overlay.releases.index import IndexSettings


class Listed(NamedTuple):
    """A command as `--help` lists it, which imports none of them: together they take longer than
    most commands."""

    module: str
    """In this folder; it has the command as NAME_command."""
    summary: str
    """Short enough for a line of 80 columns."""


COMMANDS = {
    "apply": Listed("build", "a git work tree of a release, one commit a patch"),
    "bench": Listed("test", "measure what people wait for, as ratios in one run"),
    "build": Listed("build", "build the patched wheel from the official one"),
    "doctor": Listed("ask", "what Llama 4 does in this environment, what to change"),
    "edit": Listed("maintain", "a git work tree to change patches in"),
    "explain": Listed("ask", "which engine and backend Llama 4 gets, what to set"),
    "fetch": Listed("build", "fetch upstream's files into the cache, checked"),
    "index": Listed("install", "write a package index of built wheels"),
    "install": Listed("install", "patch a vLLM that is installed, or revert it"),
    "judge": Listed("test", "compare two runs of a suite that were made elsewhere"),
    "kernels": Listed("kernels", "for which GPUs a release's binaries have code"),
    "lock": Listed("check", "write tree ids and digests into VERSIONS.toml"),
    "matrix": Listed("test", "find how Llama 4 runs in every configuration"),
    "normalize": Listed("maintain", "make patches edited by hand or by quilt canonical"),
    "port": Listed("port", "add a release and port the patches to it"),
    "refresh": Listed("maintain", "write patches back from edited commits"),
    "regress": Listed("test", "run the regression tests, stock against patched"),
    "report": Listed("report", "one HTML page of the matrix, patches and results"),
    "selfcheck": Listed("build", "build wheels twice, compare and verify them"),
    "series": Listed("maintain", "a release's patches in order, and what they touch"),
    "show": Listed("maintain", "a topic's files, whom they are for, their headers"),
    "stage": Listed("stage", "prepare pull requests to upstream"),
    "status": Listed("maintain", "every patch on every release, with its age"),
    "upstream": Listed("test", "run upstream's own tests, stock against patched"),
    "validate": Listed("check", "check that every series applies and is as locked"),
    "verify": Listed("build", "prove what is in a wheel"),
    "watch": Listed("watch", "new releases on the index, and what patches do there"),
}


class _Commands(click.Group):
    """The commands of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"overlay.cli.{COMMANDS[cmd_name].module}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.summary) for name, each in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None


@click.group(cls=_Commands, context_settings=CONTEXT, epilog=EPILOG)
@click.option("--root", type=click.Path(path_type=Path), help="The overlay's checkout.")
@click.option("--cache", type=click.Path(path_type=Path), help="Cache folder (VLLM_OVERLAY_CACHE).")
@click.option("--offline", is_flag=True, help="Use the cache alone; never touch the network.")
@click.option("--index-url", help="Package index to use in place of pip's settings.")
@click.option("--find-links", multiple=True, help="Folder or page with files; asked first.")
@click.option("-v", "--verbose", is_flag=True, help="Log everything, with tracebacks.")
@click.version_option(package_name="vllm-overlay")
@click.pass_context
def cli(
    context: click.Context,
    root: Path | None,
    cache: Path | None,
    offline: bool,
    index_url: str | None,
    find_links: tuple[str, ...],
    verbose: bool,
) -> None:
    """Patched vLLM wheels in which Llama 4 works, for the releases 0.8.3 to 0.11.0.

    \b
    Example:
      vllm-overlay build 0.8.5.post1
    """
    # What --help does not need.
    from overlay.patches.workspace import Workspace
    from overlay.releases.sources import Cache, Fetcher
    from overlay.releases.versions import load

    def settings() -> IndexSettings:
        from overlay.releases.index import pip_settings

        return pip_settings().with_flags(index_url, find_links)

    set_up_logging(verbose)
    project = find_project(root)
    fetcher = Fetcher(
        Cache((cache or cache_folder()).absolute()),
        load(project.versions_file).upstream.project,
        settings,
        offline,
    )
    context.obj = Workspace(project, fetcher)


def main() -> NoReturn:
    """Run the command; a user's mistake gets one line and an exit status, no traceback."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    _open_closed_streams()
    _let_streams_take_any_text()
    try:
        try:
            status = cli.main(standalone_mode=False)
        finally:
            sys.stdout.flush()  # here, where a full disk is an error of one line
        sys.exit(status if isinstance(status, int) else Exit.OK)
    except OverlayError as error:
        logging.getLogger("overlay").debug("traceback", exc_info=error)
        err.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(error.status)
    except GitError as error:
        logging.getLogger("overlay").debug("traceback", exc_info=error)
        err.print(
            f"error: {error}. If the disk is full, make room; if git/ in the cache is damaged, "
            "delete it: it is made anew.",
            style="bold red",
            markup=False,
        )
        sys.exit(Exit.ENVIRONMENT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(141)
    except OSError as error:
        fix = _remedy(error)
        if not fix:
            _internal_error(error, verbose)
        logging.getLogger("overlay").debug("traceback", exc_info=error)
        place = f"{error.filename}: " if error.filename else ""
        err.print(f"error: {place}{error.strerror}. {fix}.", style="bold red", markup=False)
        _drop_output()
        sys.exit(Exit.ENVIRONMENT)
    except Exception as error:  # a fault of ours: the traceback is for the bug report
        _internal_error(error, verbose)


#: What the operating system says of a path that was named, or that something else lies at.
_IN_THE_WAY = frozenset(
    (
        errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG,
        errno.ELOOP, errno.ENXIO,
    )
)  # fmt: skip


def _remedy(error: OSError) -> str:
    """What a person can do about it; empty if it is a fault of ours."""
    if error.errno in _IN_THE_WAY:
        return "Name another path, or move what lies there"
    is_nameless = error.filename is None
    if is_nameless and error.errno == errno.ENOENT and _is_nowhere():
        return "The working folder is gone: change to another one"
    # With no folder for temporary files, tempfile raises ENOENT of no file.
    if error.errno in MACHINE_ERRORS or (is_nameless and error.errno == errno.ENOENT):
        where = " (TMPDIR names the folder for temporary files)" if is_nameless else ""
        return f"Make room or make it writable{where}, and run it again"
    return ""


def _is_nowhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _internal_error(error: Exception, verbose: bool) -> NoReturn:
    if verbose:
        raise error
    err.print(
        f"internal error: {type(error).__name__}: {error}. "
        "Run it again with --verbose and report the traceback.",
        style="bold red",
        markup=False,
    )
    sys.exit(70)


def _open_closed_streams() -> None:
    """Let what is printed go nowhere if the caller has closed stdout or stderr (`>&-`): the exit
    status still tells."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # to the end
            setattr(sys, name, nowhere)


def _let_streams_take_any_text() -> None:
    """Print what an encoding has no sign for as an escape, and a path that is no UTF-8 as it is."""
    codecs.register_error("overlay", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="overlay")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    for name in ("surrogateescape", "backslashreplace"):
        with contextlib.suppress(UnicodeError):
            return codecs.lookup_error(name)(error)
    raise error


def _drop_output() -> None:
    """Keep the interpreter from trying once more, at its end, to write what cannot be."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
