"""Upstream pull requests from the patches: a branch with a commit a topic, and what goes with it.

One branch for what belongs together, and by default that is all of a release: on GitHub a pull
request from a fork shows every commit since upstream's branch, so a stack of them would be shown
over and over. `--topic` makes one of a single topic, with the topics that it needs; `--each` makes
that for every topic, so that those which stand alone can be reviewed alone.

Everything is tried in a throwaway store. A repository gets objects and a branch at the very end,
when nothing can fail any more but a push.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git, GitError
from overlay.patches import needs
from overlay.patches.attempt import AttemptStatus
from overlay.patches.fit import Fit, fit
from overlay.patches.patch import FORMAT_PATCH
from overlay.patches.series import PatchPath
from overlay.patches.tree import Applied, Store
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.staging import linters, onto, pull_request
from overlay.staging.linters import Lint
from overlay.staging.onto import Destination, Repository
from overlay.staging.pull_request import Change, Evidence
from overlay.testing import results
from overlay.testing.results import Record

#: A branch of all topics is called so.
ALL = "all"


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    release: Release
    topics: tuple[str, ...] = ()
    """Empty: all."""
    with_needed: bool = False
    each: bool = False
    onto: Destination | None = None
    with_results: bool = True
    with_lint: bool = True
    replace: bool = False
    push: str | None = None
    work: Path = Path("work")
    """Holds the results of the suites, and gets stage/RELEASE."""
    dry_run: bool = False

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.work / "stage" / self.release.name


@dataclass(frozen=True)
class Target:
    """Where a branch goes."""

    repository: Repository | None
    """None: a dry run, on a repository that is not there yet."""
    objects: Path
    """The git folder whose objects hold `base`."""
    base: str
    """The commit that the branch starts from."""
    base_name: str
    is_release: bool
    """It is the release's own tree, and no clone of upstream."""

    @property
    def name(self) -> str:
        """The repository, for people."""
        return self.repository.name if self.repository else self.base_name


@dataclass(frozen=True)
class Selection:
    """The topics of one branch."""

    name: str
    topics: tuple[PatchPath, ...]
    named: tuple[PatchPath, ...]
    """Those that it is for; the others are there because these need them."""


@dataclass(frozen=True)
class Staged:
    """One branch, and what became of it."""

    branch: str
    base_name: str
    fits: tuple[Fit, ...]
    lint: Lint
    commit: str = ""
    """Its head; empty if there is none to make."""
    state: str = ""
    """made, replaced, there already, would be made, would replace …"""
    title: str = ""
    body: str = ""
    command: str = ""
    folder: Path | None = None
    """Where mails, bundle and body lie; None: nothing was written."""
    pushed: str = ""

    @property
    def conflicts(self) -> tuple[Fit, ...]:
        """The topics that do not fit."""
        return tuple(f for f in self.fits if f.status is AttemptStatus.CONFLICT)

    def topics_of(self, path: str) -> str:
        """The topics on it that change `path`."""
        return ", ".join(f.topic for f in self.fits if path in {d.path for d in f.patch.files})

    @property
    def failed(self) -> bool:
        """Whether something keeps it from being made."""
        return bool(self.conflicts or self.lint.findings)


def stage(workspace: Workspace, request: Request) -> list[Staged]:
    """Prepare the branches that `request` asks for. A failed one changes nothing.

    Raises:
        OverlayError: wrong topic, clone or ref; no result to state; a branch that is in the way;
            a remote that refuses.
    """
    release = request.release
    applied = {a.path.topic: a for a in workspace.apply(release).require().applied}
    selections = list(_select(workspace, request))
    records = _records(request)
    made = []
    with _target(workspace, request) as target:
        _require_upstream(workspace, target, release)
        for selection in selections:
            with onto.scratch(workspace.store.git.git_dir, target.objects) as scratch:
                series = [applied[p.topic] for p in selection.topics]
                made.append(
                    _stage_one(workspace, request, target, scratch, selection, series, records)
                )
    return made


def _records(request: Request) -> Mapping[str, Record]:
    if not request.with_results:
        return {}
    found = results.load(request.work, request.release.name)
    return pull_request.require_results(request.release, found)


def _select(workspace: Workspace, request: Request) -> Iterator[Selection]:
    """The branches, and the topics on each."""
    release = request.release
    series = workspace.series(release)
    known = [path.topic for path in series]
    for topic in request.topics:
        if topic not in known:
            near = difflib.get_close_matches(topic, known, n=1)
            raise OverlayError(
                f"no topic {topic!r} in the series of {release.name}",
                f"it has {', '.join(known) or 'no patch'}",
                f"Did you mean {near[0]}" if near else "Name one of them",
                Exit.USAGE,
            )
    if not request.topics and not request.each:
        yield Selection(ALL, series, series)
    elif request.each:
        for topic in request.topics or known:
            path = series[known.index(topic)]
            yield Selection(topic, (*_needed(workspace, release, path), path), (path,))
    else:
        yield _named(workspace, request, series)


def _named(workspace: Workspace, request: Request, series: Sequence[PatchPath]) -> Selection:
    """One branch with the topics that were named, and, if asked for, what they need."""
    release = request.release
    chosen = {path for path in series if path.topic in request.topics}
    lacking: dict[PatchPath, list[str]] = {}
    for path in sorted(chosen):
        for other in _needed(workspace, release, path):
            if other not in chosen:
                lacking.setdefault(other, []).append(path.topic)
    if lacking and not request.with_needed:
        names = [path.topic for path in series if path in lacking]
        users = sorted({user for listed in lacking.values() for user in listed})
        raise OverlayError(
            f"{', '.join(users)} of {release.name} does not stand alone",
            f"it needs {', '.join(names)}",
            "Pass --with-needed to have them on the branch, before it",
            Exit.USAGE,
        )
    topics = tuple(path for path in series if path in chosen or path in lacking)
    ordered = tuple(path for path in topics if path in chosen)
    return Selection("+".join(path.topic for path in ordered), topics, ordered)


def _needed(workspace: Workspace, release: Release, path: PatchPath) -> tuple[PatchPath, ...]:
    series = workspace.series(release)
    upto = series[: series.index(path) + 1]
    base = workspace.base(release)
    return needs.needed(workspace.store, release, base, workspace.project.patches, upto)


@contextmanager
def _target(workspace: Workspace, request: Request) -> Iterator[Target]:
    """The repository and the commit to stage on."""
    release, folder = request.release, request.folder
    if request.onto is None:
        base = workspace.base(release)
        store, own = workspace.store, folder / "repository"
        if request.dry_run and not own.exists():
            yield Target(None, store.git.git_dir, base, release.tag, is_release=True)
            return
        made = onto.from_release(store, base, release.tag, own)
        yield Target(made, made.git.git_dir, base, release.tag, is_release=True)
        return
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as throwaway:
        repository = _open(request.onto, Path(throwaway) if request.dry_run else folder)
        base = repository.resolve(request.onto.ref)
        name = request.onto.ref or repository.current() or base[:12]
        yield Target(repository, repository.git.git_dir, base, name, is_release=False)


def _open(named: Destination, folder: Path) -> Repository:
    if not named.is_url:
        return Repository.open(Path(named.place))
    log_for(named.place).info("fetching it")
    return onto.fetch(named.place, folder / onto.folder_name(named.place))


def _require_upstream(workspace: Workspace, target: Target, release: Release) -> None:
    """The commit holds upstream's package, not something else."""
    package = workspace.versions.upstream.project
    with onto.scratch(workspace.store.git.git_dir, target.objects) as scratch:
        ours, theirs = (
            set(scratch.git.text("ls-tree", "-r", "--name-only", commit, "--", package).split("\n"))
            for commit in (workspace.base(release), target.base)
        )
    if not ours & theirs - {""}:
        raise OverlayError(
            f"{target.name} is not upstream's",
            f"{target.base_name} has no file of {package}/ in common with {release.name}",
            f"Name a clone of {workspace.versions.upstream.repository}",
            Exit.USAGE,
        )


def _stage_one(
    workspace: Workspace,
    request: Request,
    target: Target,
    scratch: Store,
    selection: Selection,
    series: Sequence[Applied],
    records: Mapping[str, Record],
) -> Staged:
    release = request.release
    fits = fit(scratch, release, workspace.project.patches, series, target.base)
    branch = f"vllm-overlay/{release.name}/{selection.name}"
    commits = [f for f in fits if f.commit]
    staged = Staged(branch, target.base_name, fits, Lint((), (), ()))
    if staged.conflicts or not commits:
        return replace(staged, state="not made" if staged.conflicts else "nothing to make")
    head = commits[-1].commit
    if request.with_lint:
        offline = workspace.fetcher.offline
        staged = replace(staged, lint=linters.lint(scratch, target.base, head, offline=offline))
        if staged.failed:
            return replace(staged, commit=head, state="not made")
    staged = _describe(workspace, request, target, scratch, selection, staged, records)
    state = _state(request, target, branch, head)
    staged = replace(staged, commit=head, state=state)
    return staged if request.dry_run else _write(request, target, scratch, selection, staged)


def _describe(
    workspace: Workspace,
    request: Request,
    target: Target,
    scratch: Store,
    selection: Selection,
    staged: Staged,
    records: Mapping[str, Record],
) -> Staged:
    """The branch with its title, body and gh command."""
    repository = workspace.versions.upstream.repository
    made = [f for f in staged.fits if f.commit]
    changes = [Change(f.patch.mail, tuple(_tests(f))) for f in made]
    sentence = staged.lint.sentence
    template = pull_request.template(scratch, target.base)
    named = [f.patch.mail.subject for f in made if f.path in selection.named]
    whole = selection.name == ALL and len(named) > 1
    title = pull_request.TITLE if whole else pull_request.title(named or [changes[-1].mail.subject])
    text = pull_request.body(template, changes, Evidence(records, sentence), repository)
    base = "main" if target.is_release else target.base_name.removeprefix("origin/")
    file = request.folder / selection.name / "pull-request.md"
    command = pull_request.command(repository, base, staged.branch, title, str(file))
    return replace(staged, title=title, body=text, command=command)


def _tests(one: Fit) -> Iterator[str]:
    for file in one.patch.files:
        if file.path.startswith("tests/") and not file.is_deleted:
            yield file.path


def _state(request: Request, target: Target, branch: str, head: str) -> str:
    """What has to be done with the branch.

    Raises:
        OverlayError: it is there, and may not be moved.
    """
    old = target.repository.branch(branch) if target.repository else None
    would = "would be " if request.dry_run else ""
    if old is None:
        return f"{would}made"
    if old == head:
        return "there already"
    assert target.repository is not None
    name = target.repository.name
    if not request.replace:
        raise OverlayError(
            f"branch {branch} in {name} is another one",
            f"it is at {old[:12]}, and the patches make {head[:12]} of {target.base_name}",
            "Pass --replace to move it, if nothing on it is of use",
            Exit.PROBLEMS,
        )
    place = target.repository.checked_out(branch)
    if place:
        raise OverlayError(
            f"branch {branch} is checked out in {place}", "a branch in use is not moved",
            f"Leave it there: git -C {place} switch --detach", Exit.PROBLEMS,
        )  # fmt: skip
    return f"{would}replaced, was {old[:12]}"


def _write(
    request: Request, target: Target, scratch: Store, selection: Selection, staged: Staged
) -> Staged:
    """Put the branch into the repository, its files beside, and push it if asked to."""
    assert target.repository is not None
    repository, folder = target.repository, request.folder / selection.name
    is_new = staged.state != "there already"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder / "pull-request.md", staged.body)
        mails = scratch.git.run(
            *(word for word in FORMAT_PATCH if word != "--stdout"),
            "-o", str(folder / "mails"), f"{target.base}..{staged.commit}",
        ).decode().split("\n")  # fmt: skip
        for stale in set((folder / "mails").glob("*.patch")) - {Path(name) for name in mails}:
            stale.unlink()
        _bundle(scratch.git, target, staged, folder / "branch.bundle")
    except (OSError, GitError) as error:
        raise OverlayError(
            f"cannot write {folder}", str(error), "Name another folder with --work",
            Exit.ENVIRONMENT,
        ) from error  # fmt: skip
    if is_new:
        repository.receive(scratch, staged.commit, target.base, staged.branch)
    if request.push:
        repository.push(request.push, staged.branch)
    return replace(staged, folder=folder, pushed=request.push or "")


def _put(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text("utf-8") != text:
        file.write_text(text, "utf-8")


def _bundle(git: Git, target: Target, staged: Staged, file: Path) -> None:
    """The branch for `git fetch FILE`: whole on the release's own tree, which nobody else has."""
    what = [f"refs/heads/{staged.branch}"]
    if file.is_file() and _holds(git, file, what[0], staged.commit):
        return
    git.run("update-ref", what[0], staged.commit)
    if target.is_release:
        what.append(f"refs/tags/{target.base_name}")
        git.run("update-ref", what[1], target.base)
    else:
        what.append(f"^{target.base}")
    git.run("bundle", "create", "--quiet", str(file), *what)


def _holds(git: Git, bundle: Path, ref: str, commit: str) -> bool:
    """Whether a bundle has `ref` at `commit`."""
    try:
        return f"{commit} {ref}" in git.text("bundle", "list-heads", str(bundle)).split("\n")
    except GitError:
        return False
