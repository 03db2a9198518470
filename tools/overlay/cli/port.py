"""The `port` command: options, the order of what it does, and printing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from overlay.base import transaction
from overlay.base.console import counted, err, out, print_json
from overlay.base.errors import Exit, OverlayError
from overlay.base.output import write
from overlay.cli.options import (
    EPILOG,
    json_option,
    pass_workspace,
    range_diff_option,
    review_option,
)
from overlay.patches import conflict, range_diff, refresh
from overlay.patches.range_diff import Section
from overlay.patches.tally import Tally
from overlay.patches.workspace import Workspace
from overlay.porting import port, port_state, port_tree
from overlay.porting.port import How, Listing, Port, Step
from overlay.porting.port_state import Decision, State

_CONTINUE = "vllm-overlay port --continue"
_SKIP = "vllm-overlay port --skip"
_ABORT = "vllm-overlay port --abort"


@click.command(epilog=EPILOG)
@click.option("--to", "release", metavar="RELEASE",
              help="A release that is not listed yet, or a control.")  # fmt: skip
@click.option("--from", "origin", metavar="RELEASE",
              help="Whose series is ported; the nearest older one if not given.")  # fmt: skip
@click.option("--continue", "go_on", is_flag=True, help="Go on: the conflict is solved.")
@click.option("--skip", is_flag=True, help="Go on without the topic that it stopped at.")
@click.option("--because", metavar="TEXT", help="Why it is skipped, for a comment in the series.")
@click.option("--abort", is_flag=True, help="Give the port up; the checkout stays as it was.")
@click.option("--date", metavar="YYYY-MM-DD",
              help="Last-Update of changed patches; else SOURCE_DATE_EPOCH, or today.")  # fmt: skip
@range_diff_option
@review_option
@click.option("--no-probe", is_flag=True,
              help="With --to: do not run the topics' probes on the release.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Tell how far it gets, and write nothing.")
@json_option
@pass_workspace
def port_command(
    workspace: Workspace,
    release: str | None,
    origin: str | None,
    go_on: bool,
    skip: bool,
    because: str | None,
    abort: bool,
    date: str | None,
    with_diff: bool,
    review: Path | None,
    no_probe: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add a release to VERSIONS.toml and port the patches of another one to it.

    A control that VERSIONS.toml lists is affected from then on, with the pins that it has there;
    where the release is out of upstream.range, that is widened.

    Files that apply are shared; what does not is merged three ways into a file of its own. It
    stops at a conflict, with a git work tree to solve it in, and at a topic that upstream has
    already, which only --skip leaves out. Before that, each topic's probe is run on the release as
    upstream has it: where it passes, the topic is no longer needed, and it stops there too.
    VERSIONS.toml and patches/ are written together in the end; until then, and after a crash, all
    there is of it is in work/port.

    \b
    Example:
      vllm-overlay port --to 0.9.2 --from 0.9.1
      vllm-overlay port --continue --range-diff --markdown review.md
      vllm-overlay port --skip --because "upstream has it since #16212"
    """
    workspace.project.require_checkout()
    _require_options(release, origin, date, dry_run, because, (go_on, skip, abort))
    if abort and (with_diff or review):
        raise click.UsageError("--abort ports nothing: pass no --range-diff or --markdown")
    root = workspace.project.root
    with transaction.locked(root):
        workspace, written = _recover(workspace, abort, dry_run)
        if not dry_run:
            port_state.tidy(workspace.project)
        state = port_state.find(workspace.project)
        if written and not abort and (release is None or written == release.removeprefix("v")):
            return
        if abort:
            _abort(workspace, state)
            return
        if release is not None and state is None:
            state = port.start(workspace, release, origin, refresh.last_update(date))
            state = state if no_probe else port.probed(workspace, state)
            if not dry_run:
                port_state.save(workspace.project, state)
        elif state is None:
            raise _none_under_way(go_on or skip)
        elif not (go_on or skip):
            raise _under_way(state)
        found = _replay(workspace, state)
        if go_on or skip:
            found = _decide(workspace, found, skip, because)
        section = None
        if with_diff or review is not None:
            section = port.section(workspace, found)
        if section and review is not None:
            notes = {found.state.name: str(found.tally(workspace.store))}
            text = range_diff.markdown([section], [found.state.name], notes)
            write(review, text.encode(), "--markdown")
        _end(workspace, found, dry_run, as_json, section if with_diff else None)


def _require_options(
    release: str | None,
    origin: str | None,
    date: str | None,
    dry_run: bool,
    because: str | None,
    modes: tuple[bool, bool, bool],
) -> None:
    if sum(modes) + (release is not None) > 1:
        raise click.UsageError("pass one of --to, --continue, --skip and --abort")
    if release is None and (origin or date or dry_run):
        raise click.UsageError("--from, --date and --dry-run go with --to")
    if because is not None and not (modes[1] and because.strip() and because.isprintable()):
        raise click.UsageError("--because goes with --skip, and is one line of text")


def _recover(workspace: Workspace, abort: bool, dry_run: bool) -> tuple[Workspace, str]:
    """Settle what an interrupted command left; what it wrote is read anew.

    Returns:
        The workspace, and the release whose port was finished or taken back, if one was.
    """
    root = workspace.project.root
    label = transaction.unfinished(root)
    if not label:
        return workspace, ""
    if dry_run:
        raise OverlayError(
            f"a {label} was interrupted", "some of its files are written, the others wait",
            "Run it again without --dry-run", Exit.PROBLEMS,
        )  # fmt: skip
    name = label.removeprefix("port to ") if label.startswith("port to ") else ""
    if abort and name:
        transaction.undo(root)
        err.print(f"took an interrupted {label} back", markup=False)
        return Workspace(workspace.project, workspace.fetcher), ""
    paths = transaction.finish(root)
    err.print(f"finished an interrupted {label}: {', '.join(paths)}", markup=False)
    return Workspace(workspace.project, workspace.fetcher), name


def _abort(workspace: Workspace, state: State | None) -> None:
    if state is None:
        raise _none_under_way(True)
    (workspace.project.root / port_state.file(state.name)).unlink()
    port_state.tidy(workspace.project)
    out.print(f"the port to {state.name} is given up; VERSIONS.toml and patches/ are as before")


def _none_under_way(going_on: bool) -> OverlayError:
    return OverlayError(
        "no port is under way" if going_on else "nothing to port",
        f"there is no {port_state.FOLDER}/*/state.json" if going_on else "no release is named",
        "Begin one with 'vllm-overlay port --to RELEASE'",
        Exit.USAGE,
    )


def _under_way(state: State) -> OverlayError:
    where = f"it stopped at {state.stopped}" if state.stopped else "it was interrupted"
    return OverlayError(
        f"a port to {state.name} is under way",
        f"{where}; {port_state.file(state.name)} has what was decided",
        f"Go on with '{_CONTINUE}' or '{_SKIP}', or give it up with '{_ABORT}'",
        Exit.PROBLEMS,
    )


def _replay(workspace: Workspace, state: State) -> Port:
    count = len(workspace.series(workspace.versions.get_patched(state.origin)))
    with workspace.progress.steps("porting", count) as done:
        return port.replay(workspace, state, done)


def _decide(workspace: Workspace, found: Port, skip: bool, because: str | None) -> Port:
    """Take the maintainer's decision on the topic that it stopped at, and go on."""
    step, state = found.stop, found.state
    if step is None and skip:
        raise OverlayError(
            "there is nothing to skip", "every topic is ported; only the end was interrupted",
            f"Run '{_CONTINUE}'", Exit.USAGE,
        )  # fmt: skip
    if step is None or not _was_told(workspace, found, step, skip):
        return found
    if skip:
        decision = Decision(reason=(because or _default_reason(step, state)).strip())
    elif step.how.may_be_kept:
        decision = Decision(keep=True)
    elif step.how is How.UPSTREAM:
        raise OverlayError(
            f"{step.topic} is upstream already in {state.name}", step.reason,
            f"Leave it out with '{_SKIP}', or give the port up with '{_ABORT}'", Exit.PATCH,
        )  # fmt: skip
    else:
        text = port_tree.read(workspace, found, step)
        decision = Decision(text=port.solved(workspace, found, text))
    state = state.deciding(step.topic, decision)
    port_state.save(workspace.project, state)
    port_tree.remove(workspace, found, step)
    return _replay(workspace, state)


def _was_told(workspace: Workspace, found: Port, step: Step, skip: bool) -> bool:
    """Whether it stopped at this topic before; else it was interrupted, and has to tell first."""
    if found.state.stopped != step.topic:
        return False
    return skip or step.how is not How.CONFLICT or port_tree.exists(workspace, found, step)


def _default_reason(step: Step, state: State) -> str:
    if fixed := step.fixed(state):
        return str(fixed)
    if unneeded := state.unneeded(step.topic):
        return unneeded
    return f"{step.how.value}: {step.reason}" if step.reason else "not needed"


def _end(
    workspace: Workspace, found: Port, dry_run: bool, as_json: bool, section: Section | None
) -> None:
    """Write the port, or tell where it stopped."""
    step, name, tree = found.stop, found.state.name, None
    listing = port.listing(workspace, found.state.release)
    files: dict[str, bytes | None] = {}
    if step is None:
        files = port.files(workspace, found)
        if not dry_run:
            transaction.write(workspace.project.root, files, f"port to {name}")
            port_state.tidy(workspace.project)
    elif not dry_run:
        state = found.state.model_copy(update={"stopped": step.topic})
        port_state.save(workspace.project, state)
        if step.how is How.CONFLICT:
            tree = port_tree.place(workspace.project, name, step.topic)
            if not port_tree.exists(workspace, found, step):
                port_tree.create(workspace, found, step)
    written = [path for path, data in files.items() if data is not None]
    tally = found.tally(workspace.store)
    if as_json:
        told = {"range_diff": range_diff.as_json([section])} if section else {}
        print_json({**_as_json(found, tally, listing, written, tree), **told})
    else:
        for line in range_diff.text([section], [name]) if section else ():
            out.print(line, markup=False)
        _print(found, tally, listing, written, dry_run)
    if step is not None:
        _stop(found, step, tree, dry_run)


def _print(found: Port, tally: Tally, listing: Listing, written: list[str], dry_run: bool) -> None:
    name = found.state.name
    for line in _of_probes(found.state):
        out.print(line, markup=False)
    for step in found.steps:
        out.print(f"{step.path or step.own.path}: {step.summary}", markup=False)
        for part in () if step.how.stops else step.parts:
            out.print(f"  already upstream: {part}", markup=False)
    out.print(f"{name}: {tally}, as {found.state.origin} lists them{_others(found)}", markup=False)
    verb = "would be written" if dry_run else "written"
    for path in written:
        out.print(f"{path}: {verb}", markup=False)
    if written and listing.was_control:
        out.print(f"{name} was a control, and is affected now", markup=False)
    if written and listing.range != listing.old_range:
        out.print(f"upstream.range: {listing.old_range} becomes {listing.range}", markup=False)
    if written and found.state.release.constraints and not listing.was_control:
        listed = ", ".join(found.state.release.constraints)
        out.print(f"constraints of the nearest release, to be checked: {listed}", markup=False)
    if written and not dry_run:
        out.print(
            f"Look at it with git diff, then: vllm-overlay lock {name} (its wheel's digests); "
            f"vllm-overlay kernels {name} --keep (the GPUs that it has code for); "
            f"vllm-overlay matrix {name} --weights (the quantised checkpoints that it takes); "
            f"vllm-overlay matrix {name} --settings (what other settings change); "
            f"vllm-overlay validate {name}; vllm-overlay regress {name}",
            markup=False,
        )


def _of_probes(state: State) -> Iterator[str]:
    """What the probes say of the release as upstream has it."""
    if not state.probes:
        return
    said = list(state.probes.values())
    counts = {
        "needed": sum(one.is_needed is True for one in said),
        "no longer needed": sum(one.is_needed is False for one in said),
        "cannot be told": sum(one.is_needed is None for one in said),
    }
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    yield f"{counted(len(said), 'topic')} probed on stock {state.name}: {told}"
    for one in said:
        if one.is_needed is not True:
            yield f"  {one.topic}: {one.of_stock(state.name)}"


def _others(found: Port) -> str:
    """What became of the patches that are not applied."""
    skipped = sum(step.how is How.SKIPPED for step in found.steps)
    told = [f"{skipped} {How.SKIPPED.value}"] * bool(skipped)
    told += [f"1 stopped at ({found.stop.topic})"] if found.stop else []
    told += [f"{len(found.left)} not tried yet"] * bool(found.left)
    return "".join(f"; {part}" for part in told)


def _stop(found: Port, step: Step, tree: Path | None, dry_run: bool) -> NoReturn:
    """Tell why it stopped, both sides of a conflict, and the ways on; exit."""
    name = found.state.name
    for line in _told(found, step):
        err.print(line, markup=False)
    if tree:
        err.print(f"Solve it in {tree} (git status), and git add it, then:\n  {_CONTINUE}",
                  markup=False)  # fmt: skip
    if step.how.may_be_kept and not dry_run:
        err.print(f"Keep it in {name}, if upstream's fix is not enough:\n  {_CONTINUE}")
    if not dry_run:
        err.print(f"Leave {step.topic} out of {name}:\n  {_SKIP}", markup=False)
        err.print(f"Give the port up:\n  {_ABORT}", markup=False)
    sys.exit(Exit.PATCH)


def _told(found: Port, step: Step) -> Iterator[str]:
    name = found.state.name
    if step.how is How.UPSTREAM:
        yield f"stopped at {step.topic}: {name} has it already ({step.reason})"
    elif step.how is How.FIXED:
        yield f"stopped at {step.topic}: its condition for removal is met; is it needed in {name}?"
        yield step.reason
    elif step.how is How.UNNEEDED:
        yield f"stopped at {step.topic}: {step.reason}"
    else:
        places = len(step.conflicts)
        yield (
            f"stopped at {step.topic}: {step.own.path} does not apply to {name}, and merging it "
            f"conflicts in {counted(places, 'place')}"
        )
    for one in step.conflicts:
        yield from conflict.sides(one, name)
    if step.parts:
        yield f"already upstream in {name}, in part:"
        yield from (f"  {part}" for part in step.parts)
    if step.how is not How.FIXED and (fixed := step.fixed(found.state)):
        yield f"its condition for removal is met: {fixed}"
    if step.how is not How.UNNEEDED and (said := found.state.probes.get(step.topic)):
        yield f"by its probe it is {said.of_stock(name)}"
    if found.left:
        yield f"not tried yet: {', '.join(found.left)}"


def _as_json(
    found: Port, tally: Tally, listing: Listing, written: list[str], tree: Path | None
) -> dict[str, Any]:
    stop = found.stop
    return {
        "release": found.state.name,
        "from": found.state.origin,
        "was_control": listing.was_control,
        "range": listing.range,
        "patches": tally.as_json(),
        "probes": {topic: one.as_json() for topic, one in found.state.probes.items()},
        "topics": {step.topic: _step_json(step, found.state) for step in found.steps},
        "not_tried": found.left,
        "stopped": stop.topic if stop else None,
        "work_tree": str(tree) if tree else None,
        "written": written,
    }


def _step_json(step: Step, state: State) -> dict[str, Any]:
    return {
        "status": step.how.value,
        "file": f"patches/{step.path}" if step.path else None,
        "offsets": step.applied.offsets if step.applied else (),
        "reason": step.reason or None,
        "removal_met": str(fixed) if (fixed := step.fixed(state)) else None,
        "upstream_already": [
            {"path": p.path, "hunks": p.hunks, "of": p.of, "lines": p.lines} for p in step.parts
        ],
        "conflicts": [
            {
                "path": c.path, "hunk": c.hunk, "line": c.line,
                "upstream": c.upstream, "patch": c.patch, "earlier": c.earlier,
            }
            for c in step.conflicts
        ],
    }  # fmt: skip
