"""The commands that maintain the patches: edit, refresh, normalize, status, series, show."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from overlay.answers import status, upstream_state
from overlay.answers.status import Cell, PatchUse, Row
from overlay.base import transaction
from overlay.base.console import counted, err, out, print_json
from overlay.base.errors import Exit, OverlayError
from overlay.base.output import write
from overlay.cli.options import (
    EPILOG,
    all_option,
    json_option,
    pass_workspace,
    range_diff_option,
    require_names,
    review_option,
)
from overlay.patches import conflict, edit, normalize, range_diff, refresh
from overlay.patches.edit import EditTree
from overlay.patches.patch import Patch
from overlay.patches.refresh import Plan, RefreshOptions
from overlay.patches.series import PatchPath
from overlay.patches.tree import Applied
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, ranges


def state_of(applied: Applied) -> str:
    """What became of a patch, with its offsets: offset (+3, -1)."""
    moved = ", ".join(f"{offset:+d}" for offset in applied.offsets)
    return applied.status.value + (f" ({moved})" if moved else "")


@click.command(epilog=EPILOG)
@click.argument("release")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@pass_workspace
def edit_command(workspace: Workspace, release: str, folder: Path | None) -> None:
    """Open a git work tree with one commit per patch, to be changed with any git tool.

    DIR is work/edit/RELEASE of the checkout if not given. Amend, reorder, squash, drop or add
    commits, then write them back with `vllm-overlay refresh RELEASE`. A tree without changes of
    its own is brought up to date.

    \b
    Example:
      vllm-overlay edit 0.8.3
      git -C work/edit/0.8.3 rebase -i v0.8.3
      vllm-overlay refresh 0.8.3
    """
    workspace.project.require_checkout()
    one = workspace.versions.get_patched(release)
    target = (folder or edit.default_folder(workspace.project, one)).absolute()
    result = edit.create(workspace, one, target)
    for applied in result.applied:
        out.print(f"{applied.path}: {state_of(applied)}", markup=False)
    told = f" --from {target}" if folder else ""
    out.print(f"{target}: {one.tag} and {counted(len(result.applied), 'patch')}, a commit each")
    out.print(f"Write them back with: vllm-overlay refresh {one.name}{told}")


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@all_option
@click.option("--from", "folder", metavar="DIR", type=click.Path(path_type=Path),
              help="The edit tree of RELEASE, if it is not work/edit/RELEASE.")  # fmt: skip
@click.option("--no-edits", is_flag=True, help="Leave edit trees alone; export the series anew.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if something would change.")
@click.option("--topic", "topics", metavar="[COMMIT=]NAME", multiple=True,
              help="Topic of the new commit; of several, each with its id or subject.")  # fmt: skip
@click.option("--drop", "drops", metavar="TOPIC", multiple=True,
              help="Take a topic whose commit was dropped out of the series.")  # fmt: skip
@click.option("--fork-at", "forks", metavar="[TOPIC=]RELEASE", multiple=True,
              help="Split a shared file: its text differs from RELEASE on.")  # fmt: skip
@click.option("--date", metavar="YYYY-MM-DD",
              help="Last-Update of changed patches; else SOURCE_DATE_EPOCH, or today.")  # fmt: skip
@range_diff_option
@review_option
@json_option
@pass_workspace
def refresh_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    everything: bool,
    folder: Path | None,
    no_edits: bool,
    check: bool,
    topics: tuple[str, ...],
    drops: tuple[str, ...],
    forks: tuple[str, ...],
    date: str | None,
    with_diff: bool,
    review: Path | None,
    as_json: bool,
) -> None:
    """Write patches back, canonically: from edit trees where there are, else as the series is.

    Each release that shares a changed file must still take it; if one does not, nothing is
    written, and --fork-at gives the two sides a text each: the side of the edited release gets
    the new one. Tree ids in VERSIONS.toml follow. All files are written or none; after a crash
    the next refresh finishes first.

    \b
    Example:
      vllm-overlay refresh 0.8.3
      vllm-overlay refresh 0.8.3 --check --range-diff --markdown review.md
      vllm-overlay refresh 0.9.1 --fork-at engine-selection=0.9.0
      vllm-overlay refresh --all --check
    """
    workspace.project.require_checkout()
    require_names(releases, everything)
    if folder and (len(releases) != 1 or no_edits):
        raise click.UsageError("--from goes with one release, and not with --no-edits")
    options = RefreshOptions(
        dict(_pairs(topics)),
        frozenset(drops),
        tuple(_pairs(forks)),
        refresh.last_update(date),
    )
    for topic in options.drops | {topic for topic, _ in options.forks if topic}:
        workspace.require_topic(topic)
    chosen = workspace.versions.select(releases, patched=True)
    with transaction.locked(workspace.project.root, to_write=not check):
        if check and transaction.unfinished(workspace.project.root):
            raise _unfinished(workspace.project.root)
        label = transaction.unfinished(workspace.project.root)
        if finished := transaction.finish(workspace.project.root):
            err.print(f"finished an interrupted {label}: {', '.join(finished)}", markup=False)
            workspace = Workspace(workspace.project, workspace.fetcher)
            chosen = workspace.versions.select(releases, patched=True)
        trees = [] if no_edits else list(_trees(workspace, chosen, folder))
        with workspace.progress.steps("refreshing", len(chosen)) as done:
            made = refresh.plan(workspace, chosen, trees, options, done)
        _require_fit(made)
        wanted = with_diff or review is not None
        sections = refresh.sections(workspace, made) if wanted else ()
        if not check:
            refresh.write(workspace, made)
    order = [one.name for one in workspace.versions.patched]
    if review is not None:
        notes = {name: str(tally) for name, tally in made.tallies.items()}
        write(review, range_diff.markdown(sections, order, notes).encode(), "--markdown")
    if with_diff and not as_json:
        for line in range_diff.text(sections, order):
            out.print(line, markup=False)
    _print_plan(made, trees, check, as_json, sections)
    if check and made.files:
        sys.exit(Exit.PROBLEMS)


def _pairs(values: tuple[str, ...]) -> Iterator[tuple[str | None, str]]:
    for value in values:
        key, equals, name = value.rpartition("=")
        yield (key if equals else None), name


def _trees(
    workspace: Workspace, releases: tuple[Release, ...], folder: Path | None
) -> Iterator[EditTree]:
    for release in releases:
        place = (folder or edit.default_folder(workspace.project, release)).absolute()
        if folder or place.exists():
            yield edit.find(place, release)


def _unfinished(root: Path) -> OverlayError:
    return OverlayError(
        f"a {transaction.unfinished(root)} was interrupted",
        f"some of its files are written, the others wait in {transaction.JOURNAL}",
        "Finish it with 'vllm-overlay refresh --all', without --check",
        Exit.PROBLEMS,
    )


def _require_fit(made: Plan) -> None:
    """Print every conflict with both sides.

    Raises:
        OverlayError: there is one.
    """
    if not made.failures:
        return
    for name, tally in made.tallies.items():
        err.print(f"{name}: {tally}", markup=False)
    for line in conflict.explain([(one.release.name, one.applied) for one in made.failures]):
        err.print(line, markup=False)
    order = [one.name for one in made.releases]
    by_path: dict[PatchPath, list[str]] = {}
    for one in made.failures:
        by_path.setdefault(one.applied.path, []).append(one.release.name)
    names = ", ".join(f"{ranges(found, order)} ({path})" for path, found in by_path.items())
    first = made.failures[0]
    why = f"the series no longer applies to {names}"
    if first.applied.error and not first.applied.matches:
        why += f"; {first.applied.error}"
    forks = dict.fromkeys(f"--fork-at {fork}" for one in made.failures for fork in one.forks)
    raise OverlayError(
        "the change does not fit every release that shares it; nothing is written"
        if forks
        else "the change does not fit; nothing is written",
        why,
        f"Change it so that it fits, or give the releases a text each with {' '.join(forks)}"
        if forks
        else "Fix the patches named in an edit tree",
        Exit.PATCH,
    )


def _by_release(made: Plan) -> dict[str, dict[str, dict[str, str | int]]]:
    """The fields of VERSIONS.toml that change."""
    found: dict[str, dict[str, dict[str, str | int]]] = {}
    for one in made.changes:
        found.setdefault(one.release, {})[one.key] = {"old": one.old, "new": one.new}
    return found


def _print_plan(
    made: Plan,
    trees: list[EditTree],
    check: bool,
    as_json: bool,
    sections: Sequence[range_diff.Section],
) -> None:
    kinds = {path: "gone" if data is None else "written" for path, data in made.files.items()}
    if as_json:
        print_json(
            {
                "releases": [one.name for one in made.releases],
                "patches": {name: one.as_json() for name, one in made.tallies.items()},
                "edit_trees": [str(tree.folder) for tree in trees],
                "files": kinds,
                "lock": _by_release(made),
                **({"range_diff": range_diff.as_json(sections)} if sections else {}),
                "unfit": {one.release.name: str(one.applied.path) for one in made.unfit},
            }
        )
        return
    for failure in made.unfit:
        err.print(
            f"{failure.release.name}: {failure.applied.path} does not apply, as before",
            style="yellow", markup=False,
        )  # fmt: skip
    for path, kind in kinds.items():
        verb = "would be " if check else ""
        out.print(f"{path}: {verb}{'deleted' if kind == 'gone' else kind}", markup=False)
    for change in made.changes:
        out.print(f"{change.release} {change.key}: {change.old} -> {change.new}")
    for name, tally in made.tallies.items():
        out.print(f"{name}: {tally}")
    count = len(made.files)
    verb = "would change" if check else "changed"
    names = counted(len(made.releases), "release")
    out.print(f"{names} tried, {counted(count, 'file')} {verb}")
    if count and not check:
        err.print(
            "the patched wheels' sums change with that: vllm-overlay lock --all", markup=False
        )


@click.command(epilog=EPILOG)
@click.argument("files", metavar="FILE...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Every patch.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if something would change.")
@pass_workspace
def normalize_command(
    workspace: Workspace, files: tuple[Path, ...], everything: bool, check: bool
) -> None:
    """Bring patches edited by hand, or refreshed by real quilt, back to canonical text.

    Git's headers, blob ids and the counts of @@ lines are made anew; author, date and message
    stay. The patch must apply to the release in its file's name, after those before it there.

    \b
    Example:
      vllm-overlay normalize patches/engine-selection/0.8.3.patch
    """
    workspace.project.require_checkout()
    if bool(files) is everything:
        raise click.UsageError("name one or more files, or pass --all")
    if everything:
        listed = [workspace.series(one) for one in workspace.versions.patched]
        paths = list(dict.fromkeys(path for series in listed for path in series))
    else:
        paths = normalize.find(workspace, files)
    names = {path.first_tag for path in paths}
    root = workspace.project.root
    with transaction.locked(root, to_write=not check):
        if transaction.unfinished(root):
            raise _unfinished(root)
        with workspace.progress.steps("normalizing", len(names)) as done:
            found = normalize.normalize(workspace, paths, done)
        changed = {f"patches/{one.path}": one.new for one in found if one.new != one.old}
        if changed and not check:
            transaction.write(root, changed)
    for path in changed:
        out.print(f"{path}: {'would be ' if check else ''}written", markup=False)
    problems = [f"patches/{one.path}: {what}" for one in found for what in one.problems]
    for problem in problems:
        err.print(problem, style="red", markup=False)
    verb = "would change" if check else "changed"
    out.print(f"{len(changed)} of {len(found)} patches {verb}")
    if problems or (check and changed):
        sys.exit(Exit.PROBLEMS)


@click.command(epilog=EPILOG)
@click.argument("releases", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print Markdown: topics by releases.")
@click.option("--upstream", is_flag=True,
              help="What became of pull requests and issues that patches name.")  # fmt: skip
@click.option("--states", metavar="FILE", type=click.Path(path_type=Path),
              help="With --upstream: their states, if not upstream.json.")  # fmt: skip
@click.option("--references", "only_names", is_flag=True,
              help="With --upstream: print their addresses alone, one a line.")  # fmt: skip
@json_option
@pass_workspace
def status_command(
    workspace: Workspace,
    releases: tuple[str, ...],
    markdown: bool,
    upstream: bool,
    states: Path | None,
    only_names: bool,
    as_json: bool,
) -> None:
    """Tell what each patch is on each release, where it was forwarded, and what tests said last.

    All patched releases, or those named. A topic's file is named after the first of the releases
    beside it; its age is the days since its Last-Update. Test results are those of this
    checkout's work/; one is outdated if the series changed since. `validate` is the check; this
    one only tells.

    \b
    Example:
      vllm-overlay status
      vllm-overlay status 0.8.3 0.8.4 --json
      vllm-overlay status --upstream
    """
    if markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other")
    if (states or only_names) and not upstream:
        raise click.UsageError("--states and --references go with --upstream")
    if upstream and (releases or markdown):
        raise click.UsageError("--upstream is of all patches: name no release, and no --markdown")
    if only_names:
        for named in upstream_state.references(workspace):
            out.print(named.url, markup=False)
        return
    if upstream:
        _tell_upstream(workspace, states, as_json)
        return
    chosen = workspace.versions.select(releases, patched=True)
    with workspace.progress.steps("looking", len(chosen)) as done:
        rows = status.collect(workspace, chosen, workspace.project.root / "work", done)
    today = date.fromisoformat(refresh.last_update(None))
    if as_json:
        print_json(status.as_json(rows, today))
    elif markdown:
        sys.stdout.write(status.markdown(rows, today))
    else:
        if releases:
            for row in rows:
                _print_release(row, today)
        else:
            _print_files(status.by_file(rows), [one.name for one in chosen], today)
        _print_rows(rows)


def _tell_upstream(workspace: Workspace, states: Path | None, as_json: bool) -> None:
    if states and not states.is_file():
        raise click.UsageError(f"--states: there is no {states}")
    known = upstream_state.read(states or workspace.project.root / upstream_state.FILE)
    today = date.fromisoformat(refresh.last_update(None))
    if as_json:
        print_json(upstream_state.as_json(workspace, known, today))
        return
    if known:
        table = _table("reference", "state", "since", "patches", "")
        named = upstream_state.references(workspace)
        for each, one, days, told in upstream_state.rows(named, known, today):
            topics = ", ".join(dict.fromkeys(path.topic for path in each.patches))
            since = "—" if days is None else f"{days} d"
            table.add_row(status.short(each.url), one.state if one else "—", since, topics, told)
        out.print(table, soft_wrap=False)
        out.print()
    table = _table("topic", "releases", "goes when", "")
    for row in upstream_state.condition_lines(workspace):
        table.add_row(*row)
    out.print(table, soft_wrap=False)
    out.print()
    told = upstream_state.age_told(known, today) if known else upstream_state.absent(workspace)
    out.print(told, markup=False)


#: Colours of states; the words alone say the same.
_STYLES = {
    "clean": "",
    "offset": "yellow",
    "ok": "green",
    "outdated": "yellow",
    "as locked": "green",
    "—": "dim",
}


def _styled(text: str) -> Text:
    words = [part.split(" ")[0] if part != "as locked" else part for part in text.split(", ")]
    styles = [_STYLES.get(word, "bold red") for word in words]
    return Text(text, style=max(styles, key=len))


def _print_files(uses: list[PatchUse], order: list[str], today: date) -> None:
    # A file is named after the first of its releases: they tell which one it is.
    table = _table("topic", "releases", "state", "forwarded", "age")
    for topic, group in groupby(uses, lambda use: use.path.topic):
        for number, use in enumerate(group):
            names = ranges(use.cells, order)
            table.add_row("" if number else topic, names, *_cells(use.any_cell, use.state, today))
    out.print(table, soft_wrap=False)
    out.print()


def _print_release(row: Row, today: date) -> None:
    table = _table(row.release.name, "file", "state", "forwarded", "age")
    for cell in row.cells:
        table.add_row(cell.path.topic, cell.path.first_tag, *_cells(cell, cell.word, today))
    out.print(table, soft_wrap=False)
    out.print()


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name)
    return table


def _cells(cell: Cell, state: str, today: date) -> tuple[Text, str, str]:
    age = cell.age(today)
    forwarded = status.short(cell.forwarded) or "—"
    return _styled(state), forwarded, "—" if age is None else f"{age} d"


def _print_rows(rows: list[Row]) -> None:
    suites = status.suites(rows)
    table = _table("release", "patches", "tree", *suites)
    for row in rows:
        said = [_styled(row.verdict(suite)) for suite in suites]
        table.add_row(row.release.name, str(len(row.cells)), _styled(row.tree), *said)
    out.print(table, soft_wrap=False)


@click.command(epilog=EPILOG)
@click.argument("release")
@json_option
@pass_workspace
def series_command(workspace: Workspace, release: str, as_json: bool) -> None:
    """Print a release's patches in order: file, state, subject, and the files they touch.

    \b
    Example:
      vllm-overlay series 0.8.3
    """
    one = workspace.versions.get_patched(release)
    applied = workspace.apply(one).applied
    if as_json:
        print_json(
            [
                {
                    "topic": each.path.topic,
                    "file": f"patches/{each.path}",
                    "state": each.status.value,
                    "offsets": each.offsets,
                    "subject": each.patch.mail.subject if each.patch else None,
                    "files": status.stat(each.patch) if each.patch else {},
                }
                for each in applied
            ]
        )
        return
    for number, each in enumerate(applied, 1):
        out.print(f"{number:>2} {each.path}: {state_of(each)}", markup=False, style="bold")
        if each.patch:
            out.print(f"   {each.patch.mail.subject}", markup=False)
            _print_stat(each.patch, "   ")
    count = len(applied)
    out.print(f"{one.name}: {counted(count, 'patch')}")


def _print_stat(patch: Patch, indent: str) -> None:
    for path, (added, removed) in status.stat(patch).items():
        changed = " ".join([f"+{added}"] * bool(added) + [f"-{removed}"] * bool(removed))
        out.print(f"{indent}{path} {changed}", markup=False, style="dim")


@click.command(epilog=EPILOG)
@click.argument("topic")
@click.option("--release", help="Print the text of the patch that this release lists.")
@json_option
@pass_workspace
def show_command(workspace: Workspace, topic: str, release: str | None, as_json: bool) -> None:
    """Print a topic's patch files: the releases each is for, its header, and what it touches.

    \b
    Example:
      vllm-overlay show engine-selection
      vllm-overlay show engine-selection --release 0.9.0
    """
    files = status.topic_files(workspace, topic)
    if release is not None:
        one = workspace.versions.get_patched(release)
        files = [file for file in files if one.name in file.releases]
        if not files:
            raise OverlayError(
                f"no patch of {topic} in the series of {one.name}",
                f"it lists {', '.join(path.topic for path in workspace.series(one)) or 'none'}",
                "Name another release, or see 'vllm-overlay show' without --release",
                Exit.USAGE,
            )
        if not as_json:
            sys.stdout.buffer.write(files[0].patch.data)  # whatever the encoding of the rest
            return
    if as_json:
        print_json([status.file_json(file) for file in files])
        return
    order = [one.name for one in workspace.versions.patched]
    for number, file in enumerate(files):
        mail = file.patch.mail
        if number:
            out.print()
        out.print(f"patches/{file.patch.path}", markup=False, style="bold")
        out.print(f"for {ranges(file.releases, order)}")
        out.print(f"From: {mail.author} <{mail.email}>\nDate: {mail.date}\n", markup=False)
        out.print(mail.message, markup=False)
        _print_stat(file.patch, "")
