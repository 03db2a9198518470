"""The `watch` command: options and printing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from overlay.base.console import out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import EPILOG, json_option, pass_workspace
from overlay.patches.workspace import Workspace
from overlay.porting import watch
from overlay.porting.watch import Found
from overlay.releases.versions import Versions


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@click.option("--newer", is_flag=True, help="Also releases newer than all of VERSIONS.toml.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if there is a new release.")
@click.option("--no-probe", is_flag=True, help="Do not run the topics' probes on its files.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the body of an issue.")
@json_option
@pass_workspace
def watch_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    newer: bool,
    exit_code: bool,
    no_probe: bool,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Report releases on the package index that VERSIONS.toml does not list, and try the topics.

    Final and post releases in the range of VERSIONS.toml, or those named. Each one's sdist is
    fetched and the series of the nearest older release tried on it, topic by topic: clean, at
    an offset, already upstream, or a conflict. Each topic's probe, one assertion of behaviour, is
    run on the release's own files, without a GPU: needed, no longer needed, or unknown, and why.

    \b
    Example:
      vllm-overlay watch
      vllm-overlay watch 0.11.1 0.11.2
      vllm-overlay watch --newer --json
    """
    if as_json and as_markdown:
        raise click.UsageError("pass --json or --markdown, not both")
    if releases and newer:
        raise click.UsageError("name releases or pass --newer, not both")
    found = watch.watch(workspace, releases, newer=newer, probe=not no_probe)
    if as_json:
        print_json(watch.as_json(workspace.versions, found))
    elif as_markdown:
        sys.stdout.write(watch.markdown(workspace.versions, found))
    else:
        _print(workspace.versions, found)
    if found and exit_code:
        sys.exit(Exit.PROBLEMS)


def _print(versions: Versions, found: Sequence[Found]) -> None:
    if not found:
        out.print(watch.nothing(versions), markup=False)
    for one in found:
        out.print(one.name, style="bold", markup=False)
        facts = Table.grid(padding=(0, 2))
        for label, text in watch.facts(one):
            facts.add_row(Text(f"  {label}"), Text(text))
        out.print(facts, soft_wrap=False)
        width = max((len(str(a.path)) for a in one.attempts), default=0)
        for attempt in one.attempts:
            line = f"    {attempt.path!s:<{width}}  {attempt.applied.summary}"
            out.print(line, markup=False, soft_wrap=False)
            for more in watch.details_of(one, attempt):
                told = Padding(Text(more, style="dim"), (0, 0, 0, 8))
                out.print(told, soft_wrap=False)
