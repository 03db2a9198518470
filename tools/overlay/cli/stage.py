"""`vllm-overlay stage`: options and printing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from overlay.base.console import err, out, print_json
from overlay.base.errors import Exit
from overlay.cli.options import EPILOG, json_option, pass_workspace
from overlay.patches import conflict
from overlay.patches.conflict import Conflict
from overlay.patches.workspace import Workspace
from overlay.staging import onto, stage
from overlay.staging.stage import Request, Staged


@click.command(epilog=EPILOG)
@click.argument("release")
@click.option(
    "--topic", "topics", multiple=True, metavar="TOPIC", help="This one; may be repeated."
)
@click.option("--with-needed", is_flag=True, help="And the topics that those named need.")
@click.option("--each", is_flag=True, help="A branch for each topic, with what it needs.")
@click.option(
    "--onto", "place", metavar="REPO[@REF]",
    help="A clone of upstream or its URL, and the branch, tag or commit to start from "
    "(default: what is checked out). Without it: the release's own tree.",
)  # fmt: skip
@click.option("--without-results", is_flag=True, help="Say in the body that tests were not run.")
@click.option("--without-lint", is_flag=True, help="Leave upstream's linters out.")
@click.option("--replace", is_flag=True, help="Move a branch of that name that is there.")
@click.option("--push", metavar="REMOTE", help="Push the branch, plainly; never forced.")
@click.option(
    "--work",
    default="work",
    type=click.Path(path_type=Path, file_okay=False),
    show_default=True,
    help="Has the results of regress and upstream; gets stage/RELEASE.",
)
@click.option("--dry-run", is_flag=True, help="Try all of it, write nothing.")
@json_option
@pass_workspace
def stage_command(
    workspace: Workspace,
    release: str,
    topics: tuple[str, ...],
    with_needed: bool,
    each: bool,
    place: str | None,
    without_results: bool,
    without_lint: bool,
    replace: bool,
    push: str | None,
    work: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Prepare a pull request to upstream: a branch with a commit a topic, mails, a bundle, a text.

    The branch vllm-overlay/RELEASE/TOPIC (or …/all) is made in the clone that --onto names. Its
    checkout is not touched, so it may be dirty. If a topic conflicts, or upstream's own linters
    complain, nothing is made and you are told where. The same patches give the same commits.

    \b
    Example:
      vllm-overlay stage 0.10.2 --onto ../vllm@main --dry-run
      vllm-overlay stage 0.8.3 --topic llama4-sampler
    """
    if with_needed and not topics:
        raise click.UsageError("--with-needed goes with --topic")
    if with_needed and each:
        raise click.UsageError("--each has what is needed anyway: leave --with-needed out")
    request = Request(
        workspace.versions.get_patched(release),
        topics,
        with_needed,
        each,
        onto.parse(place) if place else None,
        not without_results,
        not without_lint,
        replace,
        push,
        work.absolute(),
        dry_run,
    )
    made = stage.stage(workspace, request)
    if as_json:
        print_json([_as_json(one) for one in made])
    else:
        for one in made:
            _print(one, request)
    if any(one.conflicts for one in made):
        sys.exit(Exit.PATCH)
    if any(one.failed for one in made):
        sys.exit(Exit.PROBLEMS)


def _print(staged: Staged, request: Request) -> None:
    width = max((len(one.topic) for one in staged.fits), default=0)
    for one in staged.fits:
        out.print(f"{one.topic:<{width}}  {one.detail}", markup=False)
    for one in staged.conflicts:
        for clash in one.conflicts:
            _print_conflict(one.topic, clash, staged.base_name)
    for finding in staged.lint.findings:
        err.print(f"{staged.topics_of(finding.path)}: {finding}", style="red", markup=False)
    if staged.lint.ran:
        out.print(staged.lint.sentence, markup=False)
    for name in staged.lint.left_out:
        out.print(f"Not run: {name}.", markup=False)
    where = f"{staged.branch} on {staged.base_name}"
    out.print(f"{where}: {staged.state}" + _at(staged), markup=False)
    if staged.conflicts:
        topics = ", ".join(one.topic for one in staged.conflicts)
        err.print(
            f"error: {topics}: no fit for {staged.base_name}, so nothing was made. Name the "
            "others with --topic, or port the patch to it.",
            style="bold red",
            markup=False,
        )
    elif staged.failed:
        err.print(
            "error: upstream's linters complain, so nothing was made. Fix the patches named, or "
            "pass --without-lint.",
            style="bold red",
            markup=False,
        )
    if staged.title:
        _print_request(staged, request)


def _at(staged: Staged) -> str:
    return f" ({staged.commit[:12]})" if staged.commit and not staged.failed else ""


def _print_request(staged: Staged, request: Request) -> None:
    if staged.folder:
        out.print(f"{staged.folder}: mails/, branch.bundle, pull-request.md", markup=False)
    else:
        out.print(f"{staged.title}\n\n{staged.body}", markup=False)
    if staged.pushed:
        out.print(f"pushed to {staged.pushed}", markup=False)
    elif request.push:
        out.print(f"would be pushed to {request.push}", markup=False)
    if request.onto is None:
        out.print(
            "The branch stands on the release's files, not on upstream's history: to open a pull "
            "request, stage it with --onto.",
            markup=False,
        )
    out.print(staged.command, style="bold", markup=False)


def _print_conflict(topic: str, one: Conflict, base_name: str) -> None:
    place, *lines = conflict.sides(one, base_name)
    err.print(f"{topic}: {place}", style="red", markup=False)
    for line in lines:
        err.print(line, markup=False)


def _as_json(staged: Staged) -> dict[str, Any]:
    return {
        "branch": staged.branch,
        "base": staged.base_name,
        "state": staged.state,
        "commit": staged.commit,
        "topics": {
            one.topic: {
                "status": one.status.value,
                "commit": one.commit,
                "offsets": one.offsets,
                "upstream_already": one.known,
                "conflicts": [
                    {
                        "path": c.path, "hunk": c.hunk, "line": c.line,
                        "upstream": c.upstream, "patch": c.patch,
                    }
                    for c in one.conflicts
                ],
            }
            for one in staged.fits
        },
        "linters": {
            "ran": staged.lint.ran,
            "not_run": staged.lint.left_out,
            "findings": [
                {"linter": f.hook, "path": f.path, "line": f.line, "text": f.text}
                for f in staged.lint.findings
            ],
        },
        "title": staged.title,
        "body": staged.body,
        "command": staged.command,
        "folder": str(staged.folder) if staged.folder else None,
        "pushed": staged.pushed or None,
    }  # fmt: skip
