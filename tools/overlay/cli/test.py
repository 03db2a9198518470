"""The commands that run tests on stock and patched wheels: options and printing."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from overlay.answers import compiled, evidence, flags, matrix, matrix_run, runnable, weights
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
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing import bench, junit, regress, upstream
from overlay.testing.results import Verdict


@click.command(epilog=EPILOG)
@click.argument("release")
@click.option("--keep", is_flag=True, help="Keep the environment, for a look into it.")
@work_option("regress", "the environment, junit XML and logs")
@click.option(
    "--suite",
    type=click.Choice(list(regress.SUITES)),
    default="regress",
    show_default=True,
    help="regress needs no GPU; gpu runs whole engines on an NVIDIA GPU.",
)
@json_option
@pass_workspace
def regress_command(
    workspace: Workspace, release: str, keep: bool, folder: Path, suite: str, as_json: bool
) -> None:
    """Run the regression tests on a release's stock wheel, then on the patched one.

    Tests marked FAIL_TO_PASS must fail on stock with the very error and pass on patched; all
    others must pass on both. Needs 10 GB of disk for a while.

    \b
    Example:
      vllm-overlay regress 0.8.3
    """
    one = workspace.versions.get(release)
    verdict = regress.run(workspace, one, (folder / one.name).absolute(), keep, suite)
    _report(verdict, as_json)


@click.command(epilog=EPILOG)
@click.argument("release")
@click.option("--anew", is_flag=True, help="Run the stock wheel again, even if its result is kept.")
@click.option("--keep", is_flag=True, help="Keep the environment and the tests, for a look.")
@work_option("upstream", "environment, tests, junit XML and logs")
@json_option
@pass_workspace
def upstream_command(
    workspace: Workspace, release: str, anew: bool, keep: bool, folder: Path, as_json: bool
) -> None:
    """Run upstream's own tests on a release's stock wheel and on the patched one; compare.

    What passes on stock must pass on patched, and so must the tests that the patches bring. What
    passes on neither is listed with the reason. No GPU, no network; needs 10 GB for a while.

    \b
    Example:
      vllm-overlay upstream 0.9.2
    """
    one = workspace.versions.get_patched(release)
    verdict = upstream.run(workspace, one, (folder / one.name).absolute(), keep, anew)
    _report(verdict, as_json)


@click.command(epilog=EPILOG)
@click.argument("release")
@click.argument("stock", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("patched", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--markdown", is_flag=True, help="Print what the tests measured, as a table.")
@click.option(
    "--keep", is_flag=True, help="Keep what engines measured, in matrix/RELEASE.gpu.json."
)
@json_option
@pass_workspace
def judge_command(
    workspace: Workspace,
    release: str,
    stock: Path,
    patched: Path,
    markdown: bool,
    keep: bool,
    as_json: bool,
) -> None:
    """Compare two runs of a suite that were made elsewhere, from their junit XML.

    For a machine that has a GPU but no index: run pytest there on either wheel, judge here.

    \b
    Example:
      vllm-overlay judge 0.8.3 stock.xml patched.xml
    """
    before, after = map(junit.read, (stock, patched))
    if keep:
        one = workspace.versions.get(release)
        runs = evidence.runs_of(before, "stock", one, junit.day_of(stock))
        runs += evidence.runs_of(after, "patched", one, junit.day_of(patched))
        _keep(workspace.project.root, one.name, runs)
    if markdown:
        out.print(regress.markdown(before, after), markup=False, soft_wrap=True)
    _report(regress.judge(release, before, after), as_json)


def _keep(root: Path, release: str, runs: Sequence[evidence.Run]) -> None:
    """Add engines to those that are kept."""
    kept = evidence.read(root, release).merged(runs)
    path = evidence.write(root, kept)
    err.print(f"{path.relative_to(root)}: {counted(len(kept.runs), 'run')}", markup=False)


def _report(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(verdict))
    else:
        _print_verdict(verdict)
    if verdict.problems:
        sys.exit(Exit.PROBLEMS)


def _print_verdict(verdict: Verdict) -> None:
    for name in verdict.fail_to_pass:
        out.print(f"FAIL_TO_PASS {name}", markup=False)
    for name, why in verdict.skipped.items():
        out.print(f"SKIPPED {name}: {why}", markup=False)
    for problem in verdict.problems:
        err.print(problem, style="red", markup=False)
    out.print(f"{verdict.release}: {verdict.counts}")


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--stock", is_flag=True, help="Run the stock wheel too, before the patched one.")
@click.option("--check", is_flag=True, help="Run, but demand what matrix/ has; write nothing.")
@click.option("--compare", is_flag=True, help="Run nothing; compare what matrix/ has.")
@click.option("--triton", is_flag=True, help="Compile Triton's kernels for every GPU instead.")
@click.option("--weights", "held", is_flag=True, help="Load quantised weights instead.")
@click.option("--settings", "flagged", is_flag=True, help="Ask other settings instead, each alone.")
@click.option("--jobs", default=os.cpu_count(), show_default="all cores", help="Processes.")
@work_option("matrix", "the environment and logs")
@json_option
@pass_workspace
def matrix_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    stock: bool,
    check: bool,
    compare: bool,
    triton: bool,
    held: bool,
    flagged: bool,
    jobs: int,
    folder: Path,
    as_json: bool,
) -> None:
    """Find out how Llama 4 runs in every configuration, on a machine without a GPU.

    Runs the release's own selection for each GPU, KV cache, backend name, engine and dtype,
    constructs the layers and computes them where that is possible. Results are kept in matrix/;
    the patched release must not fail, refuse without a remedy, or be worse than stock anywhere.

    With --triton, the kernels that Llama 4 launches are compiled for every GPU by the release's
    Triton, as they are launched; stock and patched have the same. It takes 5 to 8 minutes.

    With --weights, the release's layers are constructed for checkpoints of every quantisation on
    every GPU, and a step is run through them as far as the kernels. It takes 2 minutes.

    With --settings, it is asked where parallelism, LoRA, speculative decoding, a KV connector,
    block sizes and the like change the answer, stock and patched, over some of the cells. It takes
    3 minutes.

    \b
    Example:
      vllm-overlay matrix 0.8.5.post1 --stock
      vllm-overlay matrix 0.8.5.post1 --triton --check
      vllm-overlay matrix 0.8.5.post1 --weights
      vllm-overlay matrix 0.8.5.post1 --settings
    """
    require_names(releases, everything)
    if compare and (check or stock or triton or held or flagged):
        raise click.UsageError(
            "--compare runs nothing: pass no --check, --stock, --triton, --weights or --settings"
        )
    if (triton or held or flagged) and stock:
        raise click.UsageError(
            "--triton, --weights and --settings are of stock and patched alike: pass no --stock"
        )
    if triton + held + flagged > 1:
        raise click.UsageError("pass one of --triton, --weights and --settings")
    selected = workspace.versions.select(releases, patched=True)
    if flagged:
        found = [_settings(workspace, one, folder, check, jobs) for one in selected]
    elif held:
        found = [_weights(workspace, one, folder, check, jobs) for one in selected]
    elif triton:
        found = _compiled(workspace, selected, folder, check, jobs)
    else:
        ran: tuple[matrix.Variant, ...] = ("stock", "patched") if stock else ("patched",)
        variants = () if compare else ran
        found = [_matrix(workspace, one, folder, check, jobs, variants) for one in selected]
    problems = [problem for one in found for problem in one.problems]
    if as_json:
        tables = {name: table for one in found for name, table in one.tables.items()}
        print_json({"cells": tables, "problems": problems})
    else:
        for text in (text for one in found for text in one.summaries):
            out.print(text, markup=False)
        for problem in problems:
            err.print(problem, style="red", markup=False)
    if problems:
        sys.exit(Exit.PROBLEMS)


@dataclass(frozen=True)
class _Found:
    """What was found of a release: counts by name, a line each, and problems."""

    tables: Mapping[str, Mapping[Any, int]]
    summaries: Sequence[str]
    problems: Sequence[str]


def _matrix(
    workspace: Workspace,
    release: Release,
    folder: Path,
    check: bool,
    jobs: int,
    variants: Sequence[matrix.Variant],
) -> _Found:
    """Make the matrices of some variants, and judge what is kept of both."""
    root, problems = workspace.project.root, list[str]()
    place = (folder / release.name).absolute()
    for made in matrix_run.run(workspace, release, place, variants, jobs) if variants else ():
        problems += matrix.settle(root, made, check)
    kept, worse = runnable.judge(root, release.name)
    return _Found(
        {f"{one.release} {one.variant}": matrix.counts(one) for one in kept},
        [matrix.summary(one) for one in kept],
        [*problems, *worse],
    )


def _weights(
    workspace: Workspace, release: Release, folder: Path, check: bool, jobs: int
) -> _Found:
    """Have a release load weights of every format."""
    place = (folder / release.name).absolute()
    made = matrix_run.run_weights(workspace, release, place, jobs)
    tables = {f"{release.name} weights": weights.counts(made)}
    problems = weights.settle(workspace.project.root, made, check)
    return _Found(tables, [weights.summary(made)], problems)


def _settings(
    workspace: Workspace, release: Release, folder: Path, check: bool, jobs: int
) -> _Found:
    """Ask a release, stock and patched, what settings change, and judge it beside the matrix."""
    root, place = workspace.project.root, (folder / release.name).absolute()
    made = matrix_run.run_settings(workspace, release, place, jobs)
    problems = flags.settle(root, made, check)
    tables = {f"{release.name} settings": flags.counts(made)}
    return _Found(tables, [flags.summary(made)], [*problems, *runnable.judge_flags(root, made)])


def _compiled(
    workspace: Workspace, releases: Sequence[Release], folder: Path, check: bool, jobs: int
) -> list[_Found]:
    """Have Triton compile the kernels of releases; those that they share once, unless to check."""
    found = []
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as shared:
        known = None if check else Path(shared, "known.json")
        for release in releases:
            place = (folder / release.name).absolute()
            made = matrix_run.run_triton(workspace, release, place, jobs, known)
            tables = {f"{release.name} triton": compiled.counts(made)}
            problems = compiled.settle(workspace.project.root, made, check)
            found.append(_Found(tables, [compiled.summary(made)], problems))
    return found


@click.command(epilog=EPILOG)
@click.option("--repeat", default=3, show_default=True, help="Runs of each; the best counts.")
@click.option("--write", "target", type=click.Path(path_type=Path), help="Write it to a file too.")
@pass_workspace
def bench_command(workspace: Workspace, repeat: int, target: Path | None) -> None:
    """Measure repacking and validation; prints Markdown.

    \b
    Example:
      vllm-overlay bench --write docs/benchmarks.md
    """
    text = bench.bench(workspace, repeat)
    sys.stdout.write(text)
    if target:
        target.write_text(text + bench.kept(target), "utf-8")
