"""The commands that check the series and lock what they make: options and printing."""

from __future__ import annotations

import sys

import click
from rich.table import Table

from overlay.base.console import counted, err, out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import EPILOG, all_option, json_option, pass_workspace, require_names
from overlay.patches import lock, validate
from overlay.patches.workspace import Workspace
from overlay.wheels.build import sum_of
from overlay.wheels.official import record_digests


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@json_option
@pass_workspace
def validate_command(
    workspace: Workspace, releases: tuple[str, ...], everything: bool, as_json: bool
) -> None:
    """Check that every series applies, is complete, canonical and as locked.

    \b
    Example:
      vllm-overlay validate --all
    """
    require_names(releases, everything)
    chosen = workspace.versions.select(releases, patched=False)
    with workspace.progress.steps("validating", len(chosen)) as done:
        report = validate.validate(workspace, chosen, done)
    if as_json:
        print_json(
            {
                "releases": {
                    row.release.name: {
                        "patches": row.cells, "tree": row.tree, "problems": row.problems
                    }
                    for row in report.rows
                },
                "problems": report.problems,
            }
        )  # fmt: skip
    else:
        _print_validation(report)
    if report.all_problems:
        sys.exit(Exit.PROBLEMS)


#: Colours of the table's cells; the words alone say the same.
_STYLES = {"as locked": "green", "offset": "yellow", "—": "dim"}


def _styled(text: str) -> str:
    style = _STYLES.get(text.split(" ")[0] if text.startswith("offset") else text, "bold red")
    return f"[{style}]{text}[/{style}]"


def _print_validation(report: validate.Report) -> None:
    # The topics that just apply are counted: only the others fit a terminal, and matter.
    table = Table("release", "clean", "tree", "others", box=None, pad_edge=False)
    for row in report.rows:
        others = [
            f"{topic} {_styled(cell)}" for topic, cell in row.cells.items() if cell != "clean"
        ]
        clean = len(row.cells) - len(others)
        table.add_row(row.release.name, str(clean), _styled(row.tree), "\n".join(others))
    out.print(table, soft_wrap=False)
    for problem in report.all_problems:
        err.print(problem, style="red", markup=False)
    count = len(report.all_problems)
    out.print(f"{counted(len(report.rows), 'release')}, {counted(count, 'problem')}")


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--dry-run", is_flag=True, help="Show old and new, write nothing.")
@pass_workspace
def lock_command(
    workspace: Workspace, releases: tuple[str, ...], everything: bool, dry_run: bool
) -> None:
    """Write the tree ids and digests of the series as they are now into VERSIONS.toml.

    Each patched wheel is built for its sha256; official wheels are fetched if need be.

    \b
    Example:
      vllm-overlay lock 0.8.3
    """
    require_names(releases, everything)
    chosen = workspace.versions.select(releases, patched=False)
    with workspace.progress.steps("locking", len(chosen)) as done:
        changes = lock.compute(workspace, chosen, record_digests, sum_of, done)
    real = [change for change in changes if change.is_change]
    for change in real:
        out.print(f"{change.release} {change.key}: {change.old} -> {change.new}")
    if not dry_run and real:
        lock.write(workspace.project.versions_file, real)
    verb = "would change" if dry_run else "changed"
    out.print(f"{len(real)} of {len(changes)} fields {verb}")
