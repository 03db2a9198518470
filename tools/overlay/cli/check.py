"""The commands that check the series and lock what they make: options and printing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.table import Table

from overlay.base.console import counted, err, out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import (
    EPILOG,
    all_option,
    json_option,
    pass_workspace,
    require_names,
    work_option,
)
from overlay.patches import lock, prefixes, validate
from overlay.patches.imports import Sources
from overlay.patches.workspace import Workspace
from overlay.probes import contrast
from overlay.releases.versions import Release
from overlay.testing import prefixes_run
from overlay.wheels.build import sum_of
from overlay.wheels.official import record_digests


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--each", is_flag=True, help="Also check that each prefix of a series stands.")
@click.option("--run", "to_run", is_flag=True,
              help="With --each: import and test what has no result yet.")  # fmt: skip
@click.option("--keep", is_flag=True, help="With --run: keep the environment, for a look into it.")
@work_option("each", "with --run the environment, junit XML and logs")
@json_option
@pass_workspace
def validate_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    each: bool,
    to_run: bool,
    keep: bool,
    folder: Path,
    as_json: bool,
) -> None:
    """Check that every series applies, is complete, canonical and as locked.

    With --each also that each prefix of a series can be bisected or shipped: after every patch the
    files that it changed compile and import what is there; and that the probe of every topic fails
    on the stock release and passes on the patched one. With --run it imports them besides, in
    an environment of the release (10 GB for a while), and no test of tests/regress that passed
    may fail from there on; results are kept in the cache by git tree id.

    \b
    Example:
      vllm-overlay validate --all
      vllm-overlay validate --each 0.10.2
      vllm-overlay validate --each --run 0.10.2
    """
    require_names(releases, everything)
    if (to_run or keep) and not each:
        raise click.UsageError("--run goes with --each")
    if keep and not to_run:
        raise click.UsageError("--keep goes with --run")
    chosen = workspace.versions.select(releases, patched=False)
    with workspace.progress.steps("validating", len(chosen)) as done:
        report = validate.validate(workspace, chosen, done)
    patched = [one for one in chosen if one.is_patched] if each else []
    stands = list(_stands(workspace, patched, folder, to_run, keep))
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
                **({"each": {one.release: one.as_json() for one in stands}} if each else {}),
            }
        )  # fmt: skip
    else:
        _print_validation(report)
        _print_stands(stands)
    if report.all_problems or any(one.problems for one in stands):
        sys.exit(Exit.PROBLEMS)


@dataclass(frozen=True)
class _Stands:
    """Whether each prefix of a release's series stands."""

    release: str
    listed: int
    """Patches of the series."""
    checked: int
    """Prefixes that could be looked at: those before a patch that does not apply."""
    problems: tuple[str, ...]
    probed: int
    """Topics whose probe was run on stock and on patched."""
    tested: prefixes_run.Outcome

    def as_json(self) -> dict[str, object]:
        """For scripts."""
        one = self.tested
        return {
            "patches": self.listed, "compiled": self.checked, "problems": self.problems,
            "probed": self.probed,
            "trees_tested": one.ran, "trees_kept": one.kept, "trees_not_run": one.missing,
            "seconds": one.seconds,
        }  # fmt: skip


def _stands(
    workspace: Workspace, releases: Sequence[Release], folder: Path, to_run: bool, keep: bool
) -> Iterator[_Stands]:
    sources = Sources(workspace.store)
    with workspace.progress.steps("prefixes", sum(len(workspace.series(r)) for r in releases)) as d:
        for release in releases:
            result = workspace.apply(release)
            found = prefixes.of_result(workspace, result)
            problems = tuple(prefixes.check(workspace, result, found, sources))
            trees = prefixes_run.Trees(workspace, result, found)
            place = (folder / release.name).absolute()
            tested = prefixes_run.check(trees, place, to_run=to_run, keep=keep, done=d)
            probed = contrast.check(workspace, result)
            yield _Stands(release.name, len(result.applied), len(found),
                          (*problems, *probed.problems, *tested.problems), probed.probed,
                          tested)  # fmt: skip


def _print_stands(stands: Sequence[_Stands]) -> None:
    for one in stands:
        for problem in one.problems:
            err.print(problem, style="red", markup=False)
        tested, told = one.tested, list[str]()
        if one.probed:
            told.append(f"{counted(one.probed, 'topic')} probed on stock and patched")
        if tested.ran or tested.kept:
            trees = counted(tested.ran + tested.kept, "tree")
            told.append(f"{trees} imported and tested ({tested.ran} now, {tested.seconds:.0f} s)")
        if tested.missing:
            told.append(f"not run: imports and tests of {counted(tested.missing, 'tree')} (--run)")
        out.print(
            f"{one.release}: {one.checked} of {one.listed} prefixes compiled; {'; '.join(told)}; "
            f"{counted(len(one.problems), 'problem')}",
            markup=False,
        )


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
