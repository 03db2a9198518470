"""The command that writes the report."""

from __future__ import annotations

from pathlib import Path

import click

from overlay.answers import report
from overlay.base.console import out, print_json
from overlay.base.output import write
from overlay.cli.options import EPILOG, json_option, pass_workspace
from overlay.patches.workspace import Workspace


@click.command(epilog=EPILOG)
@click.option(
    "--output",
    metavar="FILE",
    default="dist/report.html",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default=True,
    help="Where the page goes.",
)
@json_option
@pass_workspace
def report_command(workspace: Workspace, output: Path, as_json: bool) -> None:
    """Write one HTML page of the matrix, the patches and the results; it loads nothing.

    Needs matrix/ of every patched release. The same files give the same bytes.

    \b
    Example:
      vllm-overlay report --output /tmp/report.html
    """
    write(output, report.render(workspace).encode(), "--output")
    size = output.stat().st_size
    if as_json:
        print_json({"file": str(output), "size": size})
    else:
        out.print(f"{output}  {size / 1e6:.1f} MB", markup=False)
