"""The `vllm-overlay` command: options and printing; the work is in the other modules."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar, get_args

import click
from rich.table import Table
from rich.text import Text

from overlay import bench as bench_module
from overlay import commands_maintain, environment, gpus, junit, probe, sdist, wheel
from overlay import doctor as doctor_module
from overlay import explain as explain_module
from overlay import lock as lock_module
from overlay import matrix as matrix_module
from overlay import regress as regress_module
from overlay import report as report_module
from overlay import upstream as upstream_module
from overlay import validate as validate_module
from overlay import verify as verify_module
from overlay.commands_port import port
from overlay.commands_stage import stage
from overlay.commands_watch import watch
from overlay.console import err, log_for, out, print_json, set_up_logging
from overlay.errors import Exit, OverlayError
from overlay.index import pip_settings
from overlay.options import CONTEXT, EPILOG, all_option, demand_names, json_option, pass_workspace
from overlay.project import cache_folder, find_project
from overlay.results import Verdict
from overlay.sources import Cache, Fetcher, Kind
from overlay.tree import check_out
from overlay.versions import load
from overlay.workspace import Workspace


@click.group(context_settings=CONTEXT, epilog=EPILOG)
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
    """Patched vLLM wheels in which Llama 4 works, for the releases 0.8.3 to 0.10.2.

    \b
    Example:
      vllm-overlay build 0.8.5.post1
    """
    set_up_logging(verbose)
    project = find_project(root)
    fetcher = Fetcher(
        Cache((cache or cache_folder()).absolute()),
        load(project.versions_file).upstream.project,
        lambda: pip_settings().with_flags(index_url, find_links),
        offline,
    )
    context.obj = Workspace(project, fetcher)


@cli.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--sdist", "kind", flag_value="sdist", help="The source distribution only.")
@click.option("--wheel", "kind", flag_value="wheel", help="The official wheel only.")
@json_option
@pass_workspace
def fetch(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    kind: Kind | None,
    as_json: bool,
) -> None:
    """Fetch upstream's files into the cache, checked against VERSIONS.toml.

    \b
    Example:
      vllm-overlay fetch 0.8.5.post1 --wheel
      vllm-overlay fetch --all --sdist
    """
    demand_names(releases, everything)
    kinds: tuple[Kind, ...] = (kind,) if kind else ("sdist", "wheel")
    paths = {}
    for release in workspace.versions.select(releases, patched=False):
        for one in kinds:
            paths[f"{release.name} {one}"] = str(workspace.fetcher.fetch(release, one, check=True))
    if as_json:
        print_json(paths)
    else:
        for path in paths.values():
            out.print(path)


@cli.command(epilog=EPILOG)
@click.argument("release")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--until", metavar="TOPIC", help="Stop before this topic's patch.")
@pass_workspace
def apply(workspace: Workspace, release: str, folder: Path | None, until: str | None) -> None:
    """Make a git work tree: the release's sdist as a tagged commit, one commit per patch.

    FOLDER is work/RELEASE if not given; it must be new or empty.

    \b
    Example:
      vllm-overlay apply 0.8.3 /tmp/vllm-0.8.3
    """
    one = workspace.versions.get_patched(release)
    topics = [p.topic for p in workspace.series(one)]
    if until is not None and until not in topics:
        raise OverlayError(
            f"no topic {until!r} in the series of {one.name}",
            f"it has {', '.join(topics) or 'no patch'}",
            "Name one of them",
            Exit.USAGE,
        )
    target = (folder or Path("work", one.name)).absolute()
    result = workspace.apply(one, until).demand()
    check_out(workspace.store, result, target, one.tag)
    for applied in result.applied:
        moved = (
            f" (offset {', '.join(map('{:+d}'.format, applied.offsets))})"
            if applied.offsets
            else ""
        )
        out.print(f"{applied.path}: {applied.status.value}{moved}")
    out.print(f"{target}: {one.tag} and {len(result.applied)} patches, tree {result.tree}")


@cli.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@json_option
@pass_workspace
def validate(
    workspace: Workspace, releases: tuple[str, ...], everything: bool, as_json: bool
) -> None:
    """Check that every series applies, is complete, canonical and as locked.

    \b
    Example:
      vllm-overlay validate --all
    """
    demand_names(releases, everything)
    chosen = workspace.versions.select(releases, patched=False)
    with workspace.progress.steps("validating", len(chosen)) as done:
        report = validate_module.validate(workspace, chosen, done)
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


def _print_validation(report: validate_module.Report) -> None:
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
    out.print(f"{len(report.rows)} releases, {count} problem{'' if count == 1 else 's'}")


@cli.command(epilog=EPILOG)
@click.argument("release")
@click.option("--out", "folder", default="dist", type=click.Path(path_type=Path), show_default=True)
@click.option("--sdist", "as_sdist", is_flag=True, help="Write the patched sdist, no wheel.")
@click.option("--source", is_flag=True, help="Compile the patched sdist instead of repacking.")
@click.option(
    "--target", type=click.Choice(get_args(sdist.Target)), help="With --source: the device."
)
@click.option("--check-import", is_flag=True, help="Import the wheel in a throwaway environment.")
@json_option
@pass_workspace
def build(
    workspace: Workspace,
    release: str,
    folder: Path,
    as_sdist: bool,
    source: bool,
    target: sdist.Target | None,
    check_import: bool,
    as_json: bool,
) -> None:
    """Build the patched wheel by repacking the official one: no compiler, no GPU.

    \b
    Example:
      vllm-overlay build 0.8.5.post1
      vllm-overlay build 0.8.5.post1 --source --target empty
    """
    if source is not (target is not None) or (source and as_sdist):
        raise click.UsageError("--source goes with --target, and neither with --sdist")
    one = workspace.versions.get_patched(release)
    absolute = folder.absolute()
    if as_sdist:
        built = sdist.build_sdist(workspace, one, absolute)
    elif target:
        built = sdist.build_wheel(workspace, one, target, absolute)
    else:
        built = wheel.build(workspace, one, absolute)
    if check_import and not as_sdist:
        said = environment.import_check(
            workspace.fetcher.cache.folder,
            one,
            workspace.versions.python,
            built.path,
            workspace.versions.upstream.project,
        )
        log_for(one.name).info("imported: it says it is %s", said)
    if as_json:
        print_json({"file": str(built.path), "sha256": built.sha256, "size": built.size})
        return
    out.print(f"{built.path}\nsha256 {built.sha256}  {built.size / 1e6:.1f} MB")
    out.print(f"pip install '{built.path}'", style="bold")


@cli.command(epilog=EPILOG)
@click.argument("path", metavar="WHEEL", type=click.Path(path_type=Path))
@json_option
@pass_workspace
def verify(workspace: Workspace, path: Path, as_json: bool) -> None:
    """Prove that a patched wheel is the official one with this checkout's patches.

    \b
    Example:
      vllm-overlay verify dist/vllm-0.8.5.post1+llama4.1-cp38-abi3-manylinux1_x86_64.whl
    """
    checks = verify_module.verify(workspace, path)
    if as_json:
        print_json({c.name: {"detail": c.detail, "problems": c.problems} for c in checks})
    else:
        for check in checks:
            verdict = "[red]wrong[/red]" if check.problems else "[green]ok[/green]"
            out.print(f"{check.name + ':':<15} {verdict} ({check.detail})")
            for problem in check.problems:
                err.print(f"  {problem}", style="red", markup=False)
    if any(check.problems for check in checks):
        sys.exit(Exit.PROBLEMS)


@cli.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--dry-run", is_flag=True, help="Show old and new, write nothing.")
@pass_workspace
def lock(workspace: Workspace, releases: tuple[str, ...], everything: bool, dry_run: bool) -> None:
    """Write the tree ids of the series as they are now into VERSIONS.toml.

    \b
    Example:
      vllm-overlay lock 0.8.3
    """
    demand_names(releases, everything)
    changes = lock_module.compute(workspace, workspace.versions.select(releases, patched=False))
    real = [change for change in changes if change.is_change]
    for change in real:
        out.print(f"{change.release} {change.key}: {change.old} -> {change.new}")
    if not dry_run and real:
        lock_module.write(workspace.project.versions_file, real)
    verb = "would change" if dry_run else "changed"
    out.print(f"{len(real)} of {len(changes)} tree ids {verb}")


@cli.command(epilog=EPILOG)
@click.argument("release")
@click.option("--keep", is_flag=True, help="Keep the environment, for a look into it.")
@click.option(
    "--work",
    "folder",
    default="work/regress",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Where the environment, junit XML and logs go, in a folder of the release's name.",
)
@click.option(
    "--suite",
    type=click.Choice(list(regress_module.SUITES)),
    default="regress",
    show_default=True,
    help="regress needs no GPU; gpu runs whole engines on an NVIDIA GPU.",
)
@json_option
@pass_workspace
def regress(
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
    verdict = regress_module.run(workspace, one, (folder / one.name).absolute(), keep, suite)
    _report(verdict, as_json)


@cli.command(epilog=EPILOG)
@click.argument("release")
@click.option("--anew", is_flag=True, help="Run the stock wheel again, even if its result is kept.")
@click.option("--keep", is_flag=True, help="Keep the environment and the tests, for a look.")
@click.option(
    "--work",
    "folder",
    default="work/upstream",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Where environment, tests, junit XML and logs go, in a folder of the release's name.",
)
@json_option
@pass_workspace
def upstream(
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
    verdict = upstream_module.run(workspace, one, (folder / one.name).absolute(), keep, anew)
    _report(verdict, as_json)


def _report(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(verdict))
    else:
        _print_verdict(verdict)
    if verdict.problems:
        sys.exit(Exit.PROBLEMS)


@cli.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--stock", is_flag=True, help="Run the stock wheel too, before the patched one.")
@click.option("--check", is_flag=True, help="Run, but demand what matrix/ has; write nothing.")
@click.option("--compare", is_flag=True, help="Run nothing; compare what matrix/ has.")
@click.option("--jobs", default=os.cpu_count(), show_default="all cores", help="Processes.")
@click.option(
    "--work",
    "folder",
    default="work/matrix",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Where the environment and logs go, in a folder of the release's name.",
)
@json_option
@pass_workspace
def matrix(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    stock: bool,
    check: bool,
    compare: bool,
    jobs: int,
    folder: Path,
    as_json: bool,
) -> None:
    """Find out what becomes of Llama 4 in every configuration, on a machine without a GPU.

    Runs the release's own selection for each GPU, KV cache, backend name, engine and dtype,
    constructs the layers and computes them where that is possible. Results are kept in matrix/;
    the patched release must not fail, refuse without a remedy, or be worse than stock anywhere.

    \b
    Example:
      vllm-overlay matrix 0.8.5.post1 --stock
    """
    demand_names(releases, everything)
    if compare and (check or stock):
        raise click.UsageError("--compare runs nothing: pass neither --check nor --stock")
    root, problems, tables = workspace.project.root, list[str](), {}
    variants: tuple[matrix_module.Variant, ...] = ("stock", "patched") if stock else ("patched",)
    for one in workspace.versions.select(releases, patched=True):
        if not compare:
            place = (folder / one.name).absolute()
            for made in matrix_module.run(workspace, one, place, variants, jobs):
                problems += matrix_module.settle(root, made, check)
        found, worse = matrix_module.judge(root, one.name)
        problems += worse
        tables.update({f"{m.release} {m.variant}": matrix_module.counts(m) for m in found})
        if not as_json:
            for kept in found:
                out.print(matrix_module.summary(kept), markup=False)
    if as_json:
        print_json({"cells": tables, "problems": problems})
    else:
        for problem in problems:
            err.print(problem, style="red", markup=False)
    if problems:
        sys.exit(Exit.PROBLEMS)


Command = TypeVar("Command", bound=Callable[..., None])


def _configuration(command: Command) -> Command:
    """Options that `explain` and `doctor` share: what no environment tells."""
    options = (
        click.option("--gpu", metavar="NAME", help="T4, or as nvidia-smi says: 'Tesla T4'."),
        click.option("--capability", metavar="X.Y", help="Compute capability, in place of --gpu."),
        click.option(
            "--kv-cache-dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "fp8", "fp8_e4m3", "fp8_e5m2"]),
        ),
        click.option(
            "--max-model-len", type=click.IntRange(1), metavar="N",
            help="Tokens; past the chunk if not given.",
        ),
        click.option(
            "--chunk", type=click.IntRange(1), default=explain_module.CHUNK, show_default=True,
            metavar="N", help="attention_chunk_size of the model.",
        ),
        click.option(
            "--dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "half", "float16", "bfloat16", "float", "float32"]),
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _named_gpu(gpu: str | None, capability: str | None) -> tuple[str, str] | None:
    """Name and capability of the GPU that the options name."""
    if gpu and capability:
        raise click.UsageError("name the GPU with --gpu or --capability, not both")
    if gpu:
        found = gpus.find(gpu)
        return found.name, found.capability
    return ("", explain_module.capability_of(capability)) if capability else None


@cli.command(epilog=EPILOG)
@click.option("--release", metavar="RELEASE", help="This one in detail; all in a table without it.")
@_configuration
@click.option("--backend", metavar="NAME", help="VLLM_ATTENTION_BACKEND, if it is set.")
@click.option("--v1", type=click.Choice(["0", "1"]), help="VLLM_USE_V1, if it is set.")
@click.option("--flashinfer/--no-flashinfer", help="Whether FlashInfer is installed.")
@json_option
@pass_workspace
def explain(
    workspace: Workspace,
    release: str | None,
    gpu: str | None,
    capability: str | None,
    kv_cache_dtype: str,
    max_model_len: int | None,
    chunk: int,
    dtype: str,
    backend: str | None,
    v1: str | None,
    flashinfer: bool,
    as_json: bool,
) -> None:
    """Tell which engine and backend Llama 4 gets, whether it is right, and what to set instead.

    Nothing is run: it is looked up in matrix/.

    \b
    Example:
      vllm-overlay explain --release 0.8.5 --gpu T4
      vllm-overlay explain --capability 8.6 --kv-cache-dtype fp8 --max-model-len 32768
    """
    named = _named_gpu(gpu, capability)
    if named is None:
        raise click.UsageError("name the GPU: --gpu T4, or --capability 7.5")
    unset = matrix_module.UNSET
    settings = explain_module.Settings(
        kv_cache_dtype, dtype, backend or unset, v1 or unset, flashinfer, max_model_len, chunk
    )
    versions = workspace.versions
    chosen = (versions.get(release),) if release else versions.patched
    target, answers = explain_module.ask(workspace, chosen, named, settings)
    if as_json:
        print_json(explain_module.as_json(target, settings, answers))
        return
    _wrapped(f"{target}, {settings}")
    if target.note:
        _wrapped(f"Note: {target.note}.")
    if release:
        _print_lines(explain_module.lines(answers[0], target.name) if answers else [])
    elif answers:
        _print_answers(answers)


@cli.command(epilog=EPILOG)
@click.option(
    "--python", metavar="PYTHON", help="Look into its environment; a venv's folder will do."
)
@_configuration
@json_option
@pass_workspace
def doctor(
    workspace: Workspace,
    python: str | None,
    gpu: str | None,
    capability: str | None,
    kv_cache_dtype: str,
    max_model_len: int | None,
    chunk: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Tell what Llama 4 will do in this environment, and what to change: its vLLM, GPUs, settings.

    Exit status 1 if something has to be changed. Without --python it looks at the environment
    that it runs in if vLLM is there, else at $VIRTUAL_ENV, else at the first python3.

    \b
    Example:
      vllm-overlay doctor --kv-cache-dtype fp8 --max-model-len 32768
    """
    settings = explain_module.Settings(
        kv_cache_dtype, dtype, max_model_len=max_model_len, chunk=chunk
    )
    named = _named_gpu(gpu, capability)
    interpreter = probe.choose_python(python, os.environ)
    report = doctor_module.examine(workspace, interpreter, os.environ, named, settings)
    if as_json:
        print_json(doctor_module.as_json(report))
    else:
        _print_lines(doctor_module.lines(report))
        for change in report.to_change:
            _wrapped(f"To change: {change}")
        if not report.to_change:
            _wrapped("Nothing to change.")
    if report.to_change:
        sys.exit(Exit.PROBLEMS)


def _wrapped(text: str) -> None:
    out.print(text, soft_wrap=False, markup=False)


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for label, text in lines:
        table.add_row(Text(label), Text(text))
    out.print(table, soft_wrap=False)


def _print_answers(answers: Iterable[explain_module.Answer]) -> None:
    table = Table("release", "stock", "overlay", "to change here", box=None, pad_edge=False)
    for one in answers:
        row = (
            one.release.name,
            explain_module.brief(one.stock.outcome),
            explain_module.brief(one.patched.outcome),
            explain_module.change(one.patched),
        )
        table.add_row(*map(Text, row))
    out.print(table, soft_wrap=False)
    for one in answers:
        for fault in one.besides:
            _wrapped(f"{one.release.name} stock besides: {fault}.")
    _wrapped("One of them in detail: --release RELEASE")


@cli.command(epilog=EPILOG)
@click.argument("release")
@click.argument("stock", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("patched", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--markdown", is_flag=True, help="Print what the tests measured, as a table.")
@json_option
def judge(release: str, stock: Path, patched: Path, markdown: bool, as_json: bool) -> None:
    """Compare two runs of a suite that were made elsewhere, from their junit XML.

    For a machine that has a GPU but no index: run pytest there on either wheel, judge here.

    \b
    Example:
      vllm-overlay judge 0.8.3 stock.xml patched.xml
    """
    before, after = map(junit.read, (stock, patched))
    if markdown:
        out.print(regress_module.markdown(before, after), markup=False, soft_wrap=True)
    _report(regress_module.judge(release, before, after), as_json)


def _print_verdict(verdict: Verdict) -> None:
    for name in verdict.fail_to_pass:
        out.print(f"FAIL_TO_PASS {name}", markup=False)
    for name, why in verdict.skipped.items():
        out.print(f"SKIPPED {name}: {why}", markup=False)
    for problem in verdict.problems:
        err.print(problem, style="red", markup=False)
    out.print(f"{verdict.release}: {verdict.counts}")


@cli.command(epilog=EPILOG)
@click.option("--repeat", default=3, show_default=True, help="Runs of each; the best counts.")
@click.option("--write", "target", type=click.Path(path_type=Path), help="Write it to a file too.")
@pass_workspace
def bench(workspace: Workspace, repeat: int, target: Path | None) -> None:
    """Measure repacking and validation; prints Markdown.

    \b
    Example:
      vllm-overlay bench --write docs/benchmarks.md
    """
    text = bench_module.bench(workspace, repeat)
    sys.stdout.write(text)
    if target:
        target.write_text(text, "utf-8")


@cli.command(epilog=EPILOG)
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
def report(workspace: Workspace, output: Path, as_json: bool) -> None:
    """Write one HTML page of the matrix, the patches and the results; it loads nothing.

    Needs matrix/ of every patched release. The same files give the same bytes.

    \b
    Example:
      vllm-overlay report --output /tmp/report.html
    """
    report_module.write(output, report_module.render(workspace))
    size = output.stat().st_size
    if as_json:
        print_json({"file": str(output), "size": size})
    else:
        out.print(f"{output}  {size / 1e6:.1f} MB", markup=False)


@cli.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@pass_workspace
def selfcheck(workspace: Workspace, releases: tuple[str, ...], everything: bool) -> None:
    """Build each wheel twice, compare the bytes and verify them; nothing is kept.

    \b
    Example:
      vllm-overlay selfcheck 0.8.3 0.10.2
    """
    demand_names(releases, everything)
    wrong = 0
    for one in workspace.versions.select(releases, patched=True):
        with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
            first = wheel.build(workspace, one, Path(folder, "first"))
            second = wheel.build(workspace, one, Path(folder, "second"))
            checks = verify_module.verify(workspace, first.path)
        problems = [problem for check in checks for problem in check.problems]
        if first.sha256 != second.sha256:
            problems.append("a second build has other bytes")
        for problem in problems:
            err.print(f"{one.name}: {problem}", style="red", markup=False)
        verdict = "wrong" if problems else "verified, twice the same"
        out.print(f"{first.sha256}  {first.path.name}  {verdict}")
        wrong += len(problems)
    if wrong:
        sys.exit(Exit.PROBLEMS)


cli.add_command(port)
cli.add_command(stage)
cli.add_command(watch)
for _command in commands_maintain.COMMANDS:
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command; a user's mistake gets one line and an exit status, no traceback."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else Exit.OK)
    except OverlayError as error:
        logging.getLogger("overlay").debug("traceback", exc_info=error)
        err.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(error.status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:  # a fault of ours: the traceback is for the bug report
        if verbose:
            raise
        err.print(
            f"internal error: {type(error).__name__}: {error}. "
            "Run it again with --verbose and report the traceback.",
            style="bold red",
            markup=False,
        )
        sys.exit(70)
