"""The commands that fetch, apply and build: options and printing."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from platform import machine
from typing import get_args

import click

from overlay.answers import explain
from overlay.base.console import counted, err, log_for, out, print_json
from overlay.base.errors import Exit, OverlayError
from overlay.base.output import write
from overlay.cli.options import (
    EPILOG,
    all_option,
    json_option,
    pass_workspace,
    platform_option,
    require_names,
)
from overlay.patches.tree import check_out
from overlay.patches.workspace import Workspace
from overlay.releases.platforms import PLATFORMS, Platform
from overlay.releases.sources import Kind
from overlay.releases.versions import Release
from overlay.testing import environment
from overlay.wheels import sdist, verify
from overlay.wheels.build import Built, build_from, build_wheel


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--sdist", "kind", flag_value="sdist", help="The source distribution only.")
@click.option("--wheel", "kind", flag_value="wheel", help="The official wheel only.")
@platform_option
@json_option
@pass_workspace
def fetch_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    kind: Kind | None,
    platform: Platform,
    as_json: bool,
) -> None:
    """Fetch upstream's files into the cache, checked against VERSIONS.toml.

    \b
    Example:
      vllm-overlay fetch 0.8.5.post1 --wheel
      vllm-overlay fetch --all --sdist
      vllm-overlay fetch 0.10.2 --wheel --platform aarch64
    """
    require_names(releases, everything)
    kinds: tuple[Kind, ...] = (kind,) if kind else ("sdist", "wheel")
    paths = {}
    for release in workspace.versions.select(releases, patched=False):
        builds = {build.platform: build for build in release.builds}
        if everything and platform not in builds:
            continue
        build = release.on(platform)
        for one in kinds:
            paths[f"{release.name} {one}"] = str(workspace.fetcher.fetch(build, one, check=True))
    if as_json:
        print_json(paths)
    else:
        for path in paths.values():
            out.print(path)


@click.command(epilog=EPILOG)
@click.argument("release")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--until", metavar="TOPIC", help="Stop before this topic's patch.")
@pass_workspace
def apply_command(
    workspace: Workspace, release: str, folder: Path | None, until: str | None
) -> None:
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
    result = workspace.apply(one, until).require()
    check_out(workspace.store, result, target, one.tag)
    for applied in result.applied:
        moved = (
            f" (offset {', '.join(map('{:+d}'.format, applied.offsets))})"
            if applied.offsets
            else ""
        )
        out.print(f"{applied.path}: {applied.status.value}{moved}")
    out.print(
        f"{target}: {one.tag} and {counted(len(result.applied), 'patch')}, tree {result.tree}"
    )


@click.command(epilog=EPILOG)
@click.argument("release", required=False)
@click.option(
    "--wheel",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Repack this wheel in place of the official one: another build of a release.",
)
@platform_option
@click.option("--out", "folder", default="dist", type=click.Path(path_type=Path), show_default=True)
@click.option("--sdist", "as_sdist", is_flag=True, help="Write the patched sdist, no wheel.")
@click.option("--source", is_flag=True, help="Compile the patched sdist instead of repacking.")
@click.option(
    "--target", type=click.Choice(get_args(sdist.Target)), help="With --source: the device."
)
@click.option("--check-import", is_flag=True, help="Import the wheel in a throwaway environment.")
@json_option
@pass_workspace
def build_command(
    workspace: Workspace,
    release: str | None,
    wheel: Path | None,
    platform: Platform,
    folder: Path,
    as_sdist: bool,
    source: bool,
    target: sdist.Target | None,
    check_import: bool,
    as_json: bool,
) -> None:
    """Build the patched wheel by repacking the official one: no compiler, no GPU.

    With --wheel, by repacking that one, for another CUDA, say. Its Python files must be upstream's.
    The patched wheel keeps its tags and its local version: 0.8.5.post1+cu118.llama4.1.

    \b
    Example:
      vllm-overlay build 0.8.5.post1
      vllm-overlay build 0.10.2 --platform aarch64
      vllm-overlay build --wheel vllm-0.8.5.post1+cu118-cp38-abi3-manylinux1_x86_64.whl
      vllm-overlay build 0.8.5.post1 --source --target empty
    """
    if source is not (target is not None) or (source and as_sdist):
        raise click.UsageError("--source goes with --target, and neither with --sdist")
    if (wheel is None) is (release is None):
        raise click.UsageError("name a release, or a wheel of one with --wheel")
    if platform != PLATFORMS[0] and (source or as_sdist or wheel is not None):
        raise click.UsageError("--platform says which official wheel: it goes with a release alone")
    if check_import and platform != PLATFORMS[0] and platform != machine():
        raise click.UsageError(f"a wheel for {platform} can't be imported on {machine()}")
    absolute = folder.absolute()
    if wheel is not None:
        if source or as_sdist:
            raise click.UsageError("--wheel goes with neither --sdist nor --source")
        built = build_from(workspace, wheel.absolute(), absolute)
        one = verify.release_of(workspace, built.path)
    else:
        assert release is not None
        one = workspace.versions.get_patched(release).on(platform)
        built = _build(workspace, one, absolute, as_sdist, target)
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
    if wheel is None and not source:
        _print_gpus(workspace, one)
    out.print(f"pip install '{built.path}'", style="bold")


def _print_gpus(workspace: Workspace, one: Release) -> None:
    """On which GPUs the official kernels run Llama 4; nothing if the matrix lacks the release."""
    found = explain.capabilities(workspace.project.root, one)
    if found:
        told = [
            name + (f" with {' and '.join(changes)}" if changes else "")
            for name, changes in found.items()
        ]
        out.print(f"right on compute capability {', '.join(told)} (vllm-overlay explain)")


def _build(
    workspace: Workspace, one: Release, folder: Path, as_sdist: bool, target: sdist.Target | None
) -> Built:
    if as_sdist:
        return sdist.build_sdist(workspace, one, folder)
    if target:
        return sdist.build_from_source(workspace, one, target, folder)
    return build_wheel(workspace, one, folder)


@click.command(epilog=EPILOG)
@click.argument("path", metavar="WHEEL", type=click.Path(path_type=Path))
@click.option(
    "--wheel",
    "made_of",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The wheel that it was made of, as for 'build --wheel': compare with that.",
)
@click.option("--official", is_flag=True, help="Fetch the official wheel, and compare with it too.")
@json_option
@pass_workspace
def verify_command(
    workspace: Workspace, path: Path, made_of: Path | None, official: bool, as_json: bool
) -> None:
    """Prove that a patched wheel is the official one with this checkout's patches.

    This checkout is all that it needs: VERSIONS.toml locks what upstream's RECORD and the patched
    files are. If the official wheel is in the cache, the wheel is compared byte for byte with what
    is made of it, too.

    Of a wheel that 'build --wheel FILE' made, VERSIONS.toml proves the Python files alone. It is
    verified if it is, byte for byte, what is made of FILE: name that with --wheel.

    \b
    Example:
      vllm-overlay verify dist/vllm-0.8.5.post1+llama4.1-cp38-abi3-manylinux1_x86_64.whl
    """
    if official and made_of:
        raise click.UsageError("--official and --wheel both name what it was made of")
    checks = verify.verify(workspace, path, official=official, source=made_of)
    count = sum(len(check.problems) for check in checks)
    if as_json:
        print_json({check.name: _check_as_json(check) for check in checks})
    else:
        for check in checks:
            out.print(f"{check.name + ':':<15} {_told(check)} ({check.detail})")
            for problem in check.problems:
                err.print(f"  {problem}", style="red", markup=False)
        verdict = f"not verified, {counted(count, 'problem')}" if count else "verified"
        against = f" against {made_of.name}" if made_of and not count else ""
        out.print(f"{path.name}: {verdict}{against}", markup=False)
    if count:
        sys.exit(Exit.PROBLEMS)


def _told(check: verify.Check) -> str:
    if not check.is_compared:
        return "[yellow]not compared[/yellow]"
    return "[red]wrong[/red]" if check.problems else "[green]ok[/green]"


def _check_as_json(check: verify.Check) -> dict[str, object]:
    return {"detail": check.detail, "compared": check.is_compared, "problems": check.problems}


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option(
    "--sums",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the wheels' sha256 there, to compare with another machine's.",
)
@pass_workspace
def selfcheck_command(
    workspace: Workspace, releases: tuple[str, ...], everything: bool, sums: Path | None
) -> None:
    """Build each wheel twice, compare the bytes and verify them; the wheels are not kept.

    Of a release with official wheels for two platforms, both.

    \b
    Example:
      vllm-overlay selfcheck 0.8.3 0.10.2
      vllm-overlay selfcheck --all --sums SHA256SUMS
    """
    require_names(releases, everything)
    found: dict[str, str] = {}
    wrong = 0
    chosen = workspace.versions.select(releases, patched=True)
    for one in (build for release in chosen for build in release.builds):
        first, problems = _twice(workspace, one)
        for problem in problems:
            err.print(f"{one.name}: {problem}", style="red", markup=False)
        verdict = "wrong" if problems else "verified, twice the same"
        out.print(f"{first.sha256}  {first.path.name}  {verdict}")
        found[first.path.name] = first.sha256
        wrong += len(problems)
    if sums:
        lines = "".join(f"{hash_}  {name}\n" for name, hash_ in found.items())
        write(sums, lines.encode(), "--sums")
    if wrong:
        sys.exit(Exit.PROBLEMS)


def _twice(workspace: Workspace, release: Release) -> tuple[Built, list[str]]:
    """A wheel that is built twice and then gone, and what is wrong with it."""
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        first = build_wheel(workspace, release, Path(folder, "first"))
        second = build_wheel(workspace, release, Path(folder, "second"))
        checks = verify.verify(workspace, first.path)
    problems = [problem for check in checks for problem in check.problems]
    if first.sha256 != second.sha256:
        problems.append("a second build has other bytes")
    return first, problems
