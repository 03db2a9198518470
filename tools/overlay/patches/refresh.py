"""Patches written back: from an edit tree, or exported anew from the series as it is.

All is tried on a copy of patches/ first, with the applier that builds; `Plan` says what would be
written. A patch's text is exported from the release in its file's name, whichever release it
was edited in, and every release that lists the file must still take it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from overlay.base import transaction
from overlay.base.console import counted
from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git
from overlay.patches import edit, guilt, lock, range_diff, tally
from overlay.patches.edit import Commit, EditTree
from overlay.patches.hunks import parse_diff
from overlay.patches.patch import Patch, content_of, export_patch, lint_patch, parse_mail, with_date
from overlay.patches.range_diff import Section
from overlay.patches.series import PatchPath, parse_path
from overlay.patches.tally import Tally
from overlay.patches.tree import Applied, Result, Store, patched_tree
from overlay.patches.trial import Trial
from overlay.patches.validate import WORKERS
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

#: Exports and applications after which the text must have settled; two are the rule.
_ROUNDS = 6


@dataclass(frozen=True)
class RefreshOptions:
    """What the user says beside the edit trees."""

    topics: Mapping[str | None, str]
    """Topics of new commits: by commit, or None for the only one."""
    drops: frozenset[str]
    """Topics to be taken out of the series of the edit trees."""
    forks: tuple[tuple[str | None, str], ...]
    """Topic (None: the one that was changed) and release from which its text differs."""
    date: str
    """For Last-Update of the patches whose diff changed."""


@dataclass(frozen=True)
class Failure:
    """A release whose series would no longer apply."""

    release: Release
    applied: Applied
    """The first patch that does not."""
    forks: tuple[str, ...] = ()
    """Values of --fork-at that would keep it from this release."""


@dataclass(frozen=True)
class Plan:
    """What a refresh would write."""

    releases: tuple[Release, ...]
    """Those tried: the ones asked for, and all that list a changed file."""
    files: Mapping[str, bytes | None]
    """By path below the checkout's root; None: the file goes."""
    changes: tuple[lock.Change, ...]
    """Tree ids that change in VERSIONS.toml (which is among `files`)."""
    failures: tuple[Failure, ...]
    """If there are any, nothing is to be written."""
    unfit: tuple[Failure, ...]
    """Releases that did not apply before either; they are left as they are."""
    settled: tuple[tuple[EditTree, Result], ...]
    """Edit trees and what they become."""
    results: Mapping[str, Result]
    """By release: its series as it would be, applied."""
    tallies: Mapping[str, Tally]
    """By release: its patches that apply now, and those that it lists."""


@dataclass(frozen=True)
class _Edited:
    """An edit tree, compared with the series as it is."""

    release: Release
    tree: EditTree
    topics: tuple[str, ...]
    """In the order of the commits."""
    texts: Mapping[str, bytes]
    """Of the topics whose patch is another one now, or new."""
    dropped: frozenset[str]


def last_update(date: str | None) -> str:
    """The date for Last-Update: as given, $SOURCE_DATE_EPOCH's, or today's (UTC).

    Raises:
        OverlayError: it is no date.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        if date is not None:
            return datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d")
        when = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else None
    except (ValueError, OverflowError, OSError) as error:
        what = f"--date {date}" if date is not None else f"SOURCE_DATE_EPOCH={epoch}"
        form = "YYYY-MM-DD" if date is not None else "whole seconds since 1970"
        raise OverlayError(
            f"{what} is no date", str(error), f"Write it as {form}", Exit.USAGE
        ) from error
    return (when or datetime.now(timezone.utc)).strftime("%Y-%m-%d")


def plan(
    workspace: Workspace,
    releases: Sequence[Release],
    trees: Sequence[EditTree],
    options: RefreshOptions,
    done: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What writing back `trees`, and exporting the series of `releases`, would change.

    `done` hears of each release that was tried.

    Raises:
        OverlayError: an edit tree that cannot be taken, or a wish that makes no sense. Patches
            that no longer apply are no exception: they are in the plan.
    """
    _ = workspace.store  # made once, before the threads need it
    edited = [_compare(workspace, tree, options) for tree in trees]
    _require_sense(edited, options)
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        trial = Trial(workspace, Path(folder))
        drafted = _draft(trial, edited, options)
        results = _settle(trial, releases, done)
        return _conclude(trial, edited, drafted, results)


def sections(workspace: Workspace, made: Plan) -> tuple[Section, ...]:
    """What a plan that is not written yet does to each patch, by release."""
    return tuple(
        range_diff.between(
            workspace.store, name, workspace.apply(result.release).applied, result.applied
        )
        for name, result in made.results.items()
    )


def write(workspace: Workspace, made: Plan) -> None:
    """Write a plan's files, all or none, and put the edit trees on the canonical commits.

    Raises:
        OverlayError: they can't be written.
    """
    assert not made.failures
    if made.files:
        transaction.write(workspace.project.root, made.files)
    for tree, result in made.settled:
        edit.settle(workspace.store, tree, result)


def _compare(workspace: Workspace, tree: EditTree, options: RefreshOptions) -> _Edited:
    """Which topics of an edit tree have another patch than the series has."""
    release = workspace.versions.get(tree.release)
    now = workspace.apply(release).require()
    commits = edit.read(workspace, tree, now)
    subjects = edit.subjects(tree, now.base)
    by_topic = edit.assign(tree, commits, subjects, options.topics)
    before = {one.path.topic: one for one in now.applied}
    gone = frozenset(before) - frozenset(by_topic)
    if forgotten := sorted(gone - options.drops):
        raise OverlayError(
            f"{tree.folder} has no commit of {', '.join(forgotten)}",
            f"the series of {release.name} has, and nothing leaves it by accident",
            "Bring the commit back (git reflog), or take the topic out with "
            + " ".join(f"--drop {topic}" for topic in forgotten),
            Exit.PROBLEMS,
        )
    texts = {}
    for topic, commit in by_topic.items():
        old = before.get(topic)
        if old and old.commit == commit.id:
            continue
        text = _changed_text(workspace, tree, commit, old, options.date)
        if text is not None:
            texts[topic] = text
    return _Edited(release, tree, tuple(by_topic), texts, gone)


def _changed_text(
    workspace: Workspace, tree: EditTree, commit: Commit, old: Applied | None, date: str
) -> bytes | None:
    """The text of a commit whose patch differs from `old`, the one in the series; else None."""
    git = workspace.store.git
    text = edit.export(workspace.store, tree, commit)
    mail = parse_mail(git, text, str(commit))
    if old is not None:
        then = parse_mail(git, export_patch(git, old.commit), str(old.path))
        if content_of(then) == content_of(mail):
            return None
        if content_of(then)[1] != content_of(mail)[1]:
            text = with_date(text, date)
    require_sound(git, tree, commit, text)
    return text


def require_sound(git: Git, tree: EditTree, commit: Commit, text: bytes) -> None:
    """Nothing, if the text of an edited commit is that of a patch.

    Raises:
        OverlayError: its diff does what no patch may, or its message lacks something.
    """
    mail = parse_mail(git, text, str(commit))
    try:
        files = parse_diff(mail.diff, str(commit))
    except OverlayError as error:
        raise _unsound(tree, commit, error.why, "Amend it so that it does without") from error
    if problems := lint_patch(Patch(PatchPath("", ""), text, mail, files)):
        raise _unsound(
            tree, commit, "; ".join(problems),
            "Amend its message (git commit --amend, or reword in git rebase -i)",
        )  # fmt: skip


def _unsound(tree: EditTree, commit: Commit, why: str, fix: str) -> OverlayError:
    return OverlayError(f"{tree.folder}: {commit} cannot become a patch", why, fix, Exit.PROBLEMS)


def _require_sense(edited: Sequence[_Edited], options: RefreshOptions) -> None:
    """--drop and --fork-at speak of topics that were dropped or changed."""
    dropped = {topic for one in edited for topic in one.dropped}
    changed = {topic for one in edited for topic in one.texts}
    folders = " and ".join(str(one.tree.folder) for one in edited) or "no edit tree"
    if options.topics and not edited:
        raise OverlayError(
            "--topic has no commit to name", "no edit tree is written back",
            "Make one with 'vllm-overlay edit'", Exit.USAGE,
        )  # fmt: skip
    for topic in sorted(options.drops - dropped):
        raise OverlayError(
            f"--drop {topic}: nothing to take out",
            f"it was read: {folders}, where the topic's commit is still there or never was",
            "Drop its commit first with git rebase -i",
            Exit.USAGE,
        )
    for named, release in options.forks:
        if (named is None and not changed) or (named is not None and named not in changed):
            raise OverlayError(
                f"--fork-at {f'{named}=' if named else ''}{release}: nothing to fork",
                f"it was read: {folders}, where {named or 'no topic'} "
                + ("is not changed" if named else "is changed"),
                f"Name one of {', '.join(sorted(changed))}" if changed else "Edit a patch first",
                Exit.USAGE,
            )


def _draft(
    trial: Trial, edited: Sequence[_Edited], options: RefreshOptions
) -> dict[PatchPath, dict[str, bytes]]:
    """Put the edited texts into the patches/ on trial, as their own release has them.

    Returns:
        The files that were changed, with the text of each release that changed them.
    """
    old: dict[PatchPath, dict[str, bytes]] = {}
    paths = {one.release.name: _by_topic(trial, one.release) for one in edited}
    for one in edited:
        for topic, text in one.texts.items():
            if path := paths[one.release.name].get(topic):
                old.setdefault(path, {})[one.release.name] = text
    cuts = _cuts(trial, old, options)
    for one in edited:
        _draft_series(trial, one)
    for path, texts in old.items():
        _draft_file(trial, path, texts, cuts.get(path, []))
    for one in edited:
        for topic in one.dropped:
            _tidy(trial, paths[one.release.name][topic])
    return old


def _by_topic(trial: Trial, release: Release) -> dict[str, PatchPath]:
    return {path.topic: path for path in trial.series(release)}


def _cuts(
    trial: Trial, changed: Mapping[PatchPath, object], options: RefreshOptions
) -> dict[PatchPath, list[Release]]:
    """Where each changed file is forked."""
    cuts: dict[PatchPath, list[Release]] = {}
    for topic, name in options.forks:
        release = trial.workspace.versions.get_patched(name)
        fits = [
            path for path in changed
            if topic in (None, path.topic) and release in trial.listing(path)[1:]
        ]  # fmt: skip
        if len(fits) != 1:
            value = f"{topic}={release.name}" if topic else release.name
            why = (
                f"{', '.join(path.topic for path in fits)} were changed and are shared by it"
                if fits
                else "no file that was changed is listed by it and by an older release"
            )
            fix = "Say which one with --fork-at TOPIC=RELEASE" if fits else _shared(trial, changed)
            raise OverlayError(f"--fork-at {value} fits no file" if not fits else
                               f"--fork-at {value} fits {counted(len(fits), 'file')}",
                               why, fix, Exit.USAGE)  # fmt: skip
        cuts.setdefault(fits[0], []).append(release)
    return cuts


def _shared(trial: Trial, changed: Iterable[PatchPath]) -> str:
    shared = [
        f"{path} by {', '.join(one.name for one in listing)}"
        for path in changed
        if len(listing := trial.listing(path)) > 1
    ]
    if not shared:
        return "Leave it out: no changed file is shared"
    return f"Name a release after the first that shares it ({'; '.join(shared)})"


def _draft_series(trial: Trial, one: _Edited) -> None:
    """Order, new and dropped topics of an edited release."""
    known = _by_topic(trial, one.release)
    paths = []
    for topic in one.topics:
        path = known.get(topic)
        if path is None:
            path = PatchPath(topic, one.release.name)
            _require_free(trial, path)
            trial.write(path, one.texts[topic])
        paths.append(path)
    trial.write_series(one.release, paths)


def _draft_file(
    trial: Trial, path: PatchPath, texts: Mapping[str, bytes], cuts: Collection[Release]
) -> None:
    """Give each run of releases between `cuts` the text of the one that was edited in it."""
    before = trial.before[str(path)]
    runs: list[list[Release]] = []
    for release in trial.listing(path):
        if not runs or release in cuts:
            runs.append([])
        runs[-1].append(release)
    for number, run in enumerate(runs):
        found = {one.name: texts[one.name] for one in run if one.name in texts}
        essences = {
            content_of(parse_mail(trial.workspace.store.git, text, name))
            for name, text in found.items()
        }
        if len(essences) > 1:
            raise OverlayError(
                f"{' and '.join(found)} both changed {path}, differently",
                "they share that file",
                f"Make one of them as the other, or give them a text each: --fork-at "
                f"{path.topic}={list(found)[-1]}",
                Exit.PROBLEMS,
            )
        named = path if number == 0 else PatchPath(path.topic, run[0].name)
        if named != path:
            _require_free(trial, named)
            trial.replace(run, path, named)
        # Where several have it, the oldest's text is nearest to the file's name.
        trial.write(named, next(iter(found.values()), before))


def _require_free(trial: Trial, path: PatchPath) -> None:
    if path.under(trial.folder).exists():
        raise OverlayError(
            f"patches/{path} is in the way",
            "it exists, and the new text would go there",
            "Delete it if no series lists it, or name another topic or release",
            Exit.PROBLEMS,
        )


def _tidy(trial: Trial, path: PatchPath) -> None:
    """A file that lost a release is named after the first that still lists it, or goes."""
    left = trial.listing(path)
    if left and left[0].name == path.first_tag:
        return
    text = trial.read(path)
    path.under(trial.folder).unlink()
    if left:
        named = PatchPath(path.topic, left[0].name)
        _require_free(trial, named)
        trial.write(named, text)
        trial.replace(left, path, named)


def _settle(
    trial: Trial, asked: Sequence[Release], done: Callable[[str], None]
) -> dict[str, Result]:
    """Apply and export until the texts stay the same. Returns what became of each release."""
    tried: dict[str, tuple[str, Result]] = {}
    concerned = _owners(trial, _changed_patches(trial))  # texts first, so that others fit
    for _ in range(_ROUNDS):
        due = [one for one in concerned if tried.get(one.name, ("",))[0] != trial.inputs(one)]
        with ThreadPoolExecutor(WORKERS) as pool:
            for release, result in zip(due, pool.map(trial.apply, due), strict=True):
                tried[release.name] = trial.inputs(release), result
                done(release.name)
        rewritten = False
        for path, text in _exports(trial, [tried[one.name][1] for one in due]).items():
            if trial.read(path) != text:
                trial.write(path, text)
                rewritten = True
        wider = _concerned(trial, asked)
        if not rewritten and concerned == wider:
            return {one.name: tried[one.name][1] for one in concerned}
        concerned = wider
    raise OverlayError(
        "the patches do not settle",
        "exported and applied again, they are exported differently each time",
        "Report it, with the edit tree",
        Exit.PATCH,
    )


def _exports(trial: Trial, results: Iterable[Result]) -> dict[PatchPath, bytes]:
    """Canonical texts of the files that are named for these releases."""
    return {
        one.path: export_patch(trial.workspace.store.git, one.commit)
        for result in results
        for one in result.applied
        if one.status.is_good and one.path.first_tag == result.release.name
    }


def _changed_patches(trial: Trial) -> list[PatchPath]:
    return [path for name in trial.changed() if (path := parse_path(name))]


def _owners(trial: Trial, paths: Iterable[PatchPath]) -> list[Release]:
    """The releases that files are named for, oldest first."""
    names = {path.first_tag for path in paths}
    return [one for one in trial.workspace.versions.patched if one.name in names]


def _concerned(trial: Trial, asked: Sequence[Release]) -> list[Release]:
    """The releases asked for, those that their files are named for, and all whose series or
    files differ from the checkout's."""
    changed = trial.changed()
    names = {one.name for one in asked}
    paths = {path for one in asked if one.is_patched for path in trial.series(one)}
    names |= {path.first_tag for path in paths | set(_changed_patches(trial))}
    return [
        one
        for one in trial.workspace.versions.patched
        if one.name in names
        or one.series in changed
        or any(str(path) in changed for path in trial.series(one))
    ]


def _conclude(
    trial: Trial,
    edited: Sequence[_Edited],
    drafted: Mapping[PatchPath, Mapping[str, bytes]],
    results: Mapping[str, Result],
) -> Plan:
    workspace = trial.workspace
    failures, unfit, changes = [], [], []
    for result in results.values():
        release = result.release
        if result.error is None:
            changes += lock.of_result(workspace, result)
            continue
        bad = next(one for one in result.applied if one.error)
        before = workspace.apply(release)
        if _failed_before(before, bad):
            unfit.append(Failure(release, bad))
        else:
            bad = _blamed(workspace.store, before, result, bad)
            failures.append(Failure(release, bad, _forks(trial, drafted, results, release)))
    real = tuple(change for change in changes if change.is_change)
    files = {f"patches/{name}": data for name, data in trial.changed().items()}
    if real:
        versions = workspace.project.versions_file
        files[versions.name] = lock.render(versions, real).encode()
    return Plan(
        tuple(result.release for result in results.values()),
        files,
        real,
        tuple(failures),
        tuple(unfit),
        tuple((one.tree, results[one.release.name]) for one in edited if not failures
              and one.release.name in results),
        results,
        {name: tally.of_result(workspace.store, result) for name, result in results.items()},
    )  # fmt: skip


def _failed_before(before: Result, bad: Applied) -> bool:
    """Whether the same patch of it does not apply as the checkout is."""
    found = next((one for one in before.applied if one.error), None)
    return found is not None and (found.path.topic, found.status) == (bad.path.topic, bad.status)


def _blamed(store: Store, before: Result, now: Result, bad: Applied) -> Applied:
    """The same, with the patches that wrote what it expects, as the checkout is."""
    topics = [one.path.topic for one in before.applied]
    if bad.path.topic not in topics:
        return bad
    earlier = before.applied[: topics.index(bad.path.topic)]
    tree = patched_tree(store, before.base, earlier)
    left = {one.path.topic for one in now.applied if one.status.is_good}
    matches = tuple(
        match
        if match.is_good
        else replace(match, earlier=match.earlier + guilt.of_change(tree, left, match))
        for match in bad.matches
    )
    return replace(bad, matches=matches)


def _forks(
    trial: Trial,
    drafted: Mapping[PatchPath, Mapping[str, bytes]],
    results: Mapping[str, Result],
    release: Release,
) -> tuple[str, ...]:
    """Where a changed file can be forked so that `release` keeps the old text."""
    found = []
    for path, texts in drafted.items():
        sharing = [one for one in trial.workspace.versions.patched if path.topic in
                   {listed.topic for listed in trial.series(one)}]  # fmt: skip
        names = [one.name for one in sharing]
        if release.name not in names or release.name in texts:
            continue
        nearest = min(texts, key=lambda name: abs(names.index(name) - names.index(release.name)))
        here, there = names.index(release.name), names.index(nearest)
        bad = [name in results and results[name].error is not None for name in names]
        if here > there:
            at = next(at for at in range(there + 1, here + 1) if bad[at])
        else:
            at = next(at for at in range(there, here, -1) if bad[at - 1])
        found.append(f"{path.topic}={names[at]}")
    return tuple(found)
