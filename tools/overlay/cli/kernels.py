"""The `kernels` command: options and printing."""

from __future__ import annotations

import sys
from pathlib import Path
from platform import machine

import click
from rich.table import Table

from overlay.answers import binaries, binaries_run, gpus
from overlay.answers.binaries import Binaries
from overlay.base.console import err, out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import (
    EPILOG,
    all_option,
    json_option,
    pass_workspace,
    platform_option,
    require_names,
)
from overlay.kernels.needed import NEEDS, QUANTISED
from overlay.patches.workspace import Workspace
from overlay.releases.platforms import Platform
from overlay.releases.uv import UvCache
from overlay.releases.versions import Release


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@platform_option
@click.option("--torch", metavar="WHEEL", type=click.Path(path_type=Path),
              help="Read torch from it; else what is kept of that version counts.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep it in matrix/.")
@click.option("--check", is_flag=True, help="Demand what matrix/ has; write nothing.")
@json_option
@pass_workspace
def kernels_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    platform: Platform,
    torch: Path | None,
    keep: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Tell for which GPUs a release has code, from its binaries; no GPU, no torch installed.

    Reads the fat binaries in the official wheel, fetched if need be, and lists what there is for
    the kernels that Llama 4 launches: cubins, which run on their own major capability from that
    minor one up, and PTX, which runs on all from that capability up. Takes 1 GB of the cache's
    disk for a while. --check compares torch too, where uv has it unpacked for tests.

    \b
    Example:
      vllm-overlay kernels 0.8.5.post1
      vllm-overlay kernels 0.10.2 --keep --torch torch-2.8.0-cp312-cp312-manylinux_2_28_x86_64.whl
      vllm-overlay kernels 0.10.2 --platform aarch64 --check
    """
    require_names(releases, everything)
    if keep and check:
        raise click.UsageError("--check writes nothing: it does not go with --keep")
    root, made, problems = workspace.project.root, list[Binaries](), list[str]()
    chosen = workspace.versions.select(releases, patched=True)
    builds = [build for one in chosen for build in one.builds if build.platform == platform]
    for one in builds if everything else [one.on(platform) for one in chosen]:
        made.append(binaries_run.make(workspace, one, torch))
        if keep:
            path = binaries.write(root, made[-1])
            err.print(f"{path.relative_to(root)}: written", markup=False)
        elif check:
            kept = binaries.read(root, one.name, platform)
            problems += binaries.compare(made[-1], kept)
            if not torch and platform == machine():
                problems += _compare_unpacked(workspace, one, kept)
    if as_json:
        print_json(
            {"releases": [each.model_dump(by_alias=True) for each in made], "problems": problems}
        )
    else:
        for each in made:
            _print(each)
        for problem in problems:
            err.print(problem, style="red", markup=False)
    if problems:
        sys.exit(Exit.PROBLEMS)


def _compare_unpacked(workspace: Workspace, release: Release, kept: Binaries) -> list[str]:
    """Compare torch, if some environment was made with it."""
    cache = UvCache.of(workspace.fetcher.cache.folder, release)
    site = cache.unpacked("torch", release.torch)
    if site is None or not (site / binaries_run.TORCH).is_file():
        err.print(f"{release.name}: torch {release.torch} is not unpacked here, and not compared")
        return []
    return binaries.compare_torch(binaries_run.of_unpacked_torch(site), kept)


def _print(found: Binaries) -> None:
    table = Table(box=None, pad_edge=False)
    for name in (found.release, "in", "cubins", "PTX"):
        table.add_column(name)
    rows = [
        (need.name, need.library, code)
        for need in (*NEEDS, *QUANTISED)
        for code in found.code_of(need)
    ]
    rows += [
        (f"torch {found.torch.version}", binaries_run.TORCH, code) for code in found.torch.code
    ]
    for what, library, code in rows:
        name = library.rpartition("/")[2].partition(".")[0]
        table.add_row(what, name, " ".join(code.cubins), " ".join(code.ptx))
    out.print(table, soft_wrap=False)
    everywhere = [one for one in _CAPABILITIES if not found.lacking(one)]
    out.print(f"All that every backend needs has code for: {', '.join(everywhere) or 'none'}\n")


#: Of the GPUs that are known by name, but for Jetsons, to which cubins of others promise nothing.
_CAPABILITIES = tuple(dict.fromkeys(gpu.capability for gpu in gpus.GPUS if gpu.host != "jetson"))
