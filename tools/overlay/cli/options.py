"""What the modules with commands share: help texts, options, and the workspace they work in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from overlay.releases.platforms import PLATFORMS

_F = TypeVar("_F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

EPILOG = """\b
Exit status: 0 success, 1 problems found, 2 wrong usage, 3 file unavailable,
4 file not as pinned, 5 patch or series does not apply, 6 environment (disk,
permissions, a missing tool), 70 internal error, 130 interrupted.
"""

#: The command's first parameter is the `Workspace`.
pass_workspace = click.pass_obj
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
#: What changes the series shows it, and writes it down.
range_diff_option = click.option(
    "--range-diff",
    "with_diff",
    is_flag=True,
    help="Show what it does to each patch, by git's range-diff.",
)
review_option = click.option(
    "--markdown",
    "review",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the range-diff to FILE as Markdown, for a pull request.",
)
#: The parameter is a `versions.Platform`.
platform_option = click.option(
    "--platform",
    type=click.Choice(PLATFORMS),
    default=PLATFORMS[0],
    show_default=True,
    help="Which of the official wheels: there is one for 64-bit Arm of some releases.",
)
all_option = click.option("--all", "everything", is_flag=True, help="Every release.")


def tokens(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """A number of tokens, as vLLM's --max-model-len takes it: 32000 or 32k; 32768 or 32K.

    Raises:
        click.BadParameter: it is none.
    """
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)([kmKM]?)", value.strip())
    number = int(found[1]) * _UNITS[found[2]] if found else 0
    if number < 1:
        raise click.BadParameter(f"{value!r} is no number of tokens, such as 32768, 32k or 32K")
    return number


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


def work_option(suite: str, what: str) -> Callable[[_F], _F]:
    """--work of a command that leaves `what` in work/<suite>/RELEASE; its parameter is `folder`."""
    return click.option(
        "--work",
        "folder",
        default=f"work/{suite}",
        type=click.Path(path_type=Path),
        show_default=True,
        help=f"Where {what} go, in a folder of the release's name.",
    )


def require_names(names: tuple[str, ...], everything: bool) -> tuple[str, ...]:
    """The names as given: some, or none with --all.

    Raises:
        click.UsageError: both or neither.
    """
    if names and everything:
        raise click.UsageError("name releases or pass --all, not both")
    if not names and not everything:
        raise click.UsageError("name one or more releases, or pass --all")
    return names
