"""The commands that bring the overlay to where vLLM runs: options and printing."""

from __future__ import annotations

import os
from pathlib import Path

import click

from overlay.answers import probe
from overlay.base.console import counted, out, print_json
from overlay.cli.options import EPILOG, json_option, pass_workspace
from overlay.inplace import inplace, proof
from overlay.inplace.inplace import InPlaceResult
from overlay.inplace.repair import repair
from overlay.patches.workspace import Workspace
from overlay.probes.probing import Probing, Verdict
from overlay.wheels import simple_index


@click.command(epilog=EPILOG)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("wheels", nargs=-1, metavar="[WHEEL]...", type=click.Path(path_type=Path))
@json_option
@pass_workspace
def index_command(
    workspace: Workspace, folder: Path, wheels: tuple[Path, ...], as_json: bool
) -> None:
    """Write a package index of built wheels, for pip and uv, into DIR: plain files.

    Without WHEEL, of this overlay's wheels in dist/. Each is verified first. What an earlier run
    put into DIR stays in the index. Serve DIR with any web server, or name it as a file: URL.

    \b
    Example:
      vllm-overlay index /srv/vllm
      pip install --extra-index-url file:///srv/vllm 'vllm==0.8.5.post1+llama4.1'
    """
    made = simple_index.write(workspace, folder.absolute(), wheels)
    if as_json:
        print_json({"folder": str(made.folder), "url": made.url, "versions": made.versions})
        return
    for entry in made.entries:
        mark = "new" if entry.name in made.new else "kept"
        out.print(f"{entry.name}  {mark}", markup=False)
    for version in made.versions[-1:]:
        command = f"pip install --extra-index-url {made.url} '{made.project}=={version}'"
        out.print(command, style="bold", markup=False)


@click.command(epilog=EPILOG)
@click.option(
    "--python", metavar="PYTHON", help="Whose vLLM to patch; a virtual environment will do."
)
@click.option("--revert", is_flag=True, help="Restore the original files.")
@click.option(
    "--repair",
    "is_repair",
    is_flag=True,
    help="Make a vLLM that was patched in place whole again, from the originals that it keeps.",
)
@click.option(
    "--other-build",
    is_flag=True,
    help="Admit a build whose compiled files are not the official wheel's, as in the official "
    "image, or with a local version (+cu118).",
)
@click.option("--full", is_flag=True, help="Hash compiled libraries too, not only their size.")
@click.option("--dry-run", is_flag=True, help="Check and tell, change nothing.")
@click.option(
    "--no-probe", is_flag=True, help="Do not run the probe of each topic on what is patched."
)
@json_option
@pass_workspace
def install_command(
    workspace: Workspace,
    python: str | None,
    revert: bool,
    is_repair: bool,
    other_build: bool,
    full: bool,
    dry_run: bool,
    no_probe: bool,
    as_json: bool,
) -> None:
    """Patch a vLLM that is installed, in place: all of it or nothing.

    Its files must be as upstream released them. It then is what the patched wheel installs. A build
    with a local version keeps it: 0.8.5.post1+cu118.llama4.1.
    In the end each topic is probed there: one assertion of behaviour, in its Python with its torch.
    If one fails, all is taken back.
    Without --python it is the vLLM of the environment that this runs in if there is one, else of
    $VIRTUAL_ENV, else of the first python3. Restart what has imported it.

    \b
    Example:
      vllm-overlay install --python /usr/bin/python3
      vllm-overlay install --python /usr/bin/python3 --repair
      vllm-overlay install --python /usr/bin/python3 --revert
      vllm-overlay install --no-probe
    """
    if revert and (other_build or full):
        raise click.UsageError("--other-build and --full do not go with --revert")
    if is_repair and (revert or other_build):
        raise click.UsageError("--repair goes with neither --revert nor --other-build")
    interpreter = probe.choose_python(python, os.environ)
    if revert:
        done = inplace.revert(workspace, interpreter, dry_run=dry_run)
    elif is_repair:
        done = repair(workspace, interpreter, full=full, dry_run=dry_run)
    else:
        done = inplace.install(
            workspace, interpreter, other_build=other_build, full=full, dry_run=dry_run
        )
    probed = None
    if done.is_patched and not (dry_run or no_probe):
        probed = proof.require(workspace, interpreter, done)
    if as_json:
        told = {"probes": probed.as_json()} if probed else {}
        print_json({**_as_json(done, dry_run), **told})
    else:
        _print(done, dry_run)
        _print_probes(probed)


def _print_probes(probed: Probing | None) -> None:
    if probed is None:
        return
    if probed.problem:
        out.print(f"Not probed: {probed.problem}", markup=False)
        return
    out.print(f"{probed}, with torch {probed.torch or '—'}", markup=False)
    for one in probed.of(Verdict.UNKNOWN):
        out.print(f"  {one.topic} cannot be told: {one.why}", markup=False)


def _as_json(done: InPlaceResult, dry_run: bool) -> dict[str, object]:
    return {
        "action": done.action,
        "dry_run": dry_run,
        "site": str(done.site),
        "before": done.before,
        "after": done.after,
        "patches": done.patches.as_json(),
        "files": dict(done.files),
        "files_checked": done.checked,
        "by_size_alone": done.by_size,
        "official_build": done.is_official_build,
        "upstreams": done.origin.match if done.origin else None,
        "recovered": done.recovered,
    }


def _print(done: InPlaceResult, dry_run: bool) -> None:
    if done.recovered:
        out.print("An earlier run was interrupted; it has been brought to its end.")
    if done.action == "nothing":
        state = "patched" if done.is_patched else "upstream's"
        out.print(
            f"vLLM {done.before} in {done.site} is {state} already: {done.patches}.", markup=False
        )
        return
    for path, kind in done.files.items() if dry_run or done.action == "repaired" else ():
        out.print(f"{kind} {path}", markup=False)
    counts = {kind: list(done.files.values()).count(kind) for kind in "MAD"}
    told = f"{counted(counts['M'], 'file')} changed, {counts['A']} added, {counts['D']} removed"
    by_size = f", {done.by_size} libraries of them by size (--full hashes them)"
    out.print(
        f"vLLM {done.before} in {done.site}\n"
        f"{counted(done.checked, 'file')} checked{by_size if done.by_size else ''}\n"
        f"{'would be ' if dry_run else ''}{done.action} to {done.after}: {done.patches}, {told}",
        markup=False,
    )
    if not done.is_official_build:
        what = "Its compiled files"
        if done.origin and done.origin.match == "source":
            what = "Its compiled files and its vllm_flash_attn"
        out.print(f"{what} are not the official wheel's; they are left as they are.")
