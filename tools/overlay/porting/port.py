"""A series ported to a release that VERSIONS.toml does not list yet, or as a control.

Topic by topic, in the order of the release it is ported from: an existing file of the topic that
applies is shared; else that release's patch is merged three ways, and what comes out is a file of
its own. A conflict, and a topic that upstream has or fixed, wait for the maintainer's decision.

`replay` works all of it out from the port's state and the checkout, from the start each time;
`files` says what is to be written in the end, all together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from packaging.version import Version

from overlay.base.errors import Exit, OverlayError
from overlay.base.project import Project
from overlay.patches import entry, guilt, range_diff, tree
from overlay.patches.attempt import AttemptStatus, try_patch
from overlay.patches.changes import shipped
from overlay.patches.conflict import Conflict, locate
from overlay.patches.patch import (
    Patch,
    Removal,
    content_of,
    export_patch,
    parse_mail,
    with_date,
)
from overlay.patches.range_diff import Change, Section
from overlay.patches.series import PatchPath
from overlay.patches.tally import Tally
from overlay.patches.threeway import tree_with
from overlay.patches.tree import UNKNOWN_TREE, Applied, Result
from overlay.patches.trial import copy_patches
from overlay.patches.validate import validate
from overlay.patches.workspace import Workspace
from overlay.porting import port_state, upstreamed
from overlay.porting.candidate import (
    draft_release,
    get_candidate,
    nearest_release,
    promoted,
    texts_for,
)
from overlay.porting.port_state import Decision, State
from overlay.porting.upstreamed import Part
from overlay.probes.probing import on_tree
from overlay.releases.versions import Release


class How(Enum):
    """What became of a topic."""

    SHARED = "shared"
    MERGED = "merged"
    SOLVED = "solved"
    SKIPPED = "left out"
    UPSTREAM = "already upstream"
    FIXED = "fixed upstream"
    UNNEEDED = "not needed"
    CONFLICT = "conflict"

    @property
    def stops(self) -> bool:
        """Whether it waits for a decision."""
        return self in (How.UPSTREAM, How.FIXED, How.UNNEEDED, How.CONFLICT)

    @property
    def may_be_kept(self) -> bool:
        """Whether the decision is to keep a patch that fits."""
        return self in (How.FIXED, How.UNNEEDED)


@dataclass(frozen=True)
class Step:
    """One topic, ported as far as it goes."""

    own: Applied
    """Its patch on the release that is ported from."""
    how: How
    path: PatchPath | None = None
    """The file that the new release's series will list, if it will."""
    applied: Applied | None = None
    """That file, applied; of a conflict: the patch of the other release, tried."""
    text: bytes | None = None
    """Of a new file."""
    parts: tuple[Part, ...] = ()
    """What is upstream already of a patch that does not apply as it is."""
    conflicts: tuple[Conflict, ...] = ()
    reason: str = ""
    """Why it is left out, or how it is known to be upstream."""

    @property
    def topic(self) -> str:
        """The topic."""
        return self.own.path.topic

    @property
    def patch(self) -> Patch:
        """The patch of the release that is ported from."""
        assert self.own.patch is not None
        return self.own.patch

    @property
    def summary(self) -> str:
        """What became of it, in some words."""
        if self.how is How.SHARED:
            assert self.applied is not None
            return self.applied.summary
        return f"{self.how.value}: {self.reason}" if self.reason else str(self.how.value)

    def fixed(self, state: State) -> Removal | None:
        """Its condition for removal, if that was met between the two releases."""
        removal = self.patch.mail.removal
        if removal is None or removal.is_met(Version(state.origin)):
            return None
        return removal if removal.is_met(state.release.version) else None


@dataclass(frozen=True)
class Port:
    """A port, replayed as far as it goes."""

    state: State
    base: str
    """Commit of the new release's sdist."""
    steps: tuple[Step, ...]
    left: tuple[str, ...]
    """Topics after the one that stops it."""
    head: str
    """Commit with all in it that was ported."""

    @property
    def stop(self) -> Step | None:
        """The topic that waits for a decision."""
        return next((step for step in self.steps if step.how.stops), None)

    @property
    def applied(self) -> tuple[Applied, ...]:
        """The patches of the new release, as far as it goes."""
        return tuple(s.applied for s in self.steps if s.applied and not s.how.stops)

    def result(self, store: tree.Store) -> Result:
        """The release with what was ported, as the applier tells of a series."""
        return Result(self.state.release, self.base, self.applied, store.tree_of(self.head))

    def tally(self, store: tree.Store) -> Tally:
        """How many patches are ported, by git's count, of those that the other release lists."""
        listed = len(self.steps) + len(self.left)
        return Tally(store.count(self.base, self.head), listed)


@dataclass(frozen=True)
class Listing:
    """What becomes of VERSIONS.toml beside the fields of a series."""

    was_control: bool
    """It lists the release, which needed no patch so far."""
    range: str
    """Its `upstream.range`, with the release in it."""
    old_range: str
    """The range as it is."""


def listing(workspace: Workspace, release: Release) -> Listing:
    """How VERSIONS.toml comes to list `release` as a patched one.

    Raises:
        OverlayError: its range cannot be widened.
    """
    versions = workspace.versions
    wanted = versions.range_with(release.version)
    return Listing(release.name in versions.releases, wanted, versions.upstream.range)


def start(workspace: Workspace, name: str, origin: str | None, date: str) -> State:
    """The state of a port that was not begun: its pins, and where it comes from.

    A control's pins are those of VERSIONS.toml, and another's come from the index.

    Raises:
        OverlayError: the release is patched already, is unavailable, or the range of
            VERSIONS.toml cannot be widened to it.
    """
    versions = workspace.versions
    wanted = name.removeprefix("v")
    listed = versions.releases.get(wanted)
    if listed and listed.is_patched:
        raise OverlayError(
            f"release {wanted} is no new one",
            "VERSIONS.toml lists it",
            f"Change its patches with 'vllm-overlay edit {wanted}'",
            Exit.USAGE,
        )
    source = versions.get_patched(origin) if origin else None
    release = (
        promoted(listed) if listed else draft_release(workspace, get_candidate(workspace, wanted))
    )
    listing(workspace, release)
    series = workspace.project.patches / str(release.series)
    if series.exists():
        raise OverlayError(
            f"patches/{release.series} is in the way", "it exists, and no release uses it",
            "Delete it", Exit.PROBLEMS,
        )  # fmt: skip
    source = source or nearest_release(versions, release.version)
    return State(release=release, origin=source.name, date=date)


def probed(workspace: Workspace, state: State) -> State:
    """The state with what the topics' probes say of the release as upstream has it."""
    topics = [path.topic for path in workspace.series(workspace.versions.get(state.origin))]
    found = on_tree(workspace, workspace.base(state.release), topics)
    return state.model_copy(update={"probes": {one.topic: one for one in found.probed}})


def replay(
    workspace: Workspace, state: State, done: Callable[[str], None] = lambda _: None
) -> Port:
    """Port the topics in order, up to the first that waits for a decision.

    `done` hears of each topic.

    Raises:
        OverlayError: the series that is ported does not apply to its own release, or a text that
            was solved does not apply any more.
    """
    origin = workspace.versions.get_patched(state.origin)
    own = workspace.apply(origin).require()
    base = head = workspace.base(state.release)
    steps = list[Step]()
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        scratch = Path(folder)
        for one in own.applied:
            step = _port_one(workspace, state, scratch, head, one)
            steps.append(_blamed(workspace, own, Port(state, base, tuple(steps), (), head), step))
            done(step.topic)
            if step.how.stops:
                break
            head = step.applied.commit if step.applied else head
    left = tuple(one.path.topic for one in own.applied[len(steps) :])
    return Port(state, base, tuple(steps), left, head)


def _blamed(workspace: Workspace, own: Result, port: Port, step: Step) -> Step:
    """The same, with the earlier patches of both series that touched where it conflicts.

    `own` is the series that is ported, `port` what came before the step.
    """
    store, topics = workspace.store, [one.path.topic for one in own.applied]
    before = own.applied[: topics.index(step.topic)]
    here = tree.patched_tree(store, port.base, port.applied)
    there = tree.patched_tree(store, own.base, before)
    name, origin = port.state.name, own.release.name
    skipped = (one.own.path for one in port.steps if one.how is How.SKIPPED)
    notes = dict.fromkeys(skipped, f" (left out of {name})")
    conflicts = tuple(
        replace(c, earlier=guilt.of_merge(here, there, origin, (c.path, c.line),
                                          (c.upstream, c.base), notes))
        for c in step.conflicts
    )  # fmt: skip
    return replace(step, conflicts=conflicts)


def _port_one(workspace: Workspace, state: State, scratch: Path, head: str, own: Applied) -> Step:
    """Port a topic to `head`; `own` is its patch on the other release."""
    decision = state.decisions.get(own.path.topic, Decision())
    if decision.text is not None:
        return _put(workspace, state, scratch, head, own, decision.text.encode())
    if decision.reason is not None:
        return Step(own, How.SKIPPED, reason=decision.reason)
    step = _try(workspace, state, scratch, head, own)
    fixed, unneeded = step.fixed(state), state.unneeded(own.path.topic)
    if decision.keep or step.how.stops or not (fixed or unneeded):
        return step
    # It may fit all the same, beside upstream's own fix: a person has to look.
    how = How.FIXED if fixed else How.UNNEEDED
    reason = f"{fixed or unneeded}; as a patch it is {step.summary}"
    return replace(step, how=how, path=None, text=None, reason=reason)


def _try(workspace: Workspace, state: State, scratch: Path, head: str, own: Applied) -> Step:
    """Port a topic on which nothing was decided."""
    version, store = state.release.version, workspace.store
    tried = try_patch(
        store,
        state.name,
        workspace.project.patches,
        head,
        own,
        texts_for(workspace, own.path, version),
        # A file that is named after a newer release is none that an older one may list.
        lambda path: Version(path.first_tag) <= version,
    )
    status, merge = tried.status, tried.merge
    if status is AttemptStatus.UPSTREAM:
        reason = "a merge changes nothing" if merge else f"the reverse of {tried.path} applies"
        return Step(own, How.UPSTREAM, None, tried.applied, reason=reason)
    if merge is None:
        return Step(own, How.SHARED, tried.path, tried.applied)
    patch = own.patch
    assert patch is not None
    parts = upstreamed.parts(store, own, f"{own.commit}^", head, merge)
    if status is AttemptStatus.CONFLICT:
        conflicts = tuple(locate(patch, clash) for clash in merge.clashes)
        return Step(own, How.CONFLICT, None, tried.applied, parts=parts, conflicts=conflicts)
    _require_free(workspace, state, own.path.topic)
    whole = tree_with(store, head, own.commit, merge.changed)
    commit = store.commit(whole, head, patch.mail, patch.mail.message)
    text = dated(workspace, own, export_patch(store.git, commit), state.date)
    return replace(_put(workspace, state, scratch, head, own, text), how=How.MERGED, parts=parts)


def dated(workspace: Workspace, own: Applied, text: bytes, date: str) -> bytes:
    """A new text of a topic, with `date` as its Last-Update if its diff is another one."""
    git = workspace.store.git
    then = parse_mail(git, export_patch(git, own.commit), str(own.path))
    now = parse_mail(git, text, str(own.path))
    same = content_of(then)[1] == content_of(now)[1]
    return text if same else with_date(text, date)


def _require_free(workspace: Workspace, state: State, topic: str) -> None:
    path = PatchPath(topic, state.name)
    if path.under(workspace.project.patches).exists():
        raise OverlayError(
            f"patches/{path} is in the way",
            f"it exists and does not apply to {state.name}, and the new text would go there",
            "Delete it if no series lists it",
            Exit.PROBLEMS,
        )


def _put(
    workspace: Workspace, state: State, scratch: Path, head: str, own: Applied, text: bytes
) -> Step:
    """A solved step: `text` is a new file, applied by the one applier as any other patch."""
    path = PatchPath(own.path.topic, state.name)
    file = path.under(scratch)
    file.parent.mkdir()
    file.write_bytes(text)
    applied = tree.apply_patch(workspace.store, state.name, head, scratch, path)
    if not applied.status.is_good:
        why = applied.error.why if applied.error else applied.summary
        raise OverlayError(
            f"the text of {own.path.topic} for {state.name} does not apply",
            f"patches/ changed since the port stopped: {why}",
            "Undo that change, or start again after 'vllm-overlay port --abort'",
            Exit.PROBLEMS,
        )
    # As the applier's commit is exported: the text of the file's own release.
    text = export_patch(workspace.store.git, applied.commit)
    return Step(own, How.SOLVED, path, applied, text)


def section(workspace: Workspace, port: Port) -> Section:
    """What the port does to each patch, as far as it goes."""
    return Section(port.state.name, tuple(_change(workspace, step) for step in port.steps))


def _change(workspace: Workspace, step: Step) -> Change:
    if step.how.stops or step.applied is None:
        return Change(step.topic, range_diff.How.GONE, why=step.summary)
    return range_diff.compare(workspace.store, step.own.commit, step.applied.commit, step.topic)


def solved(workspace: Workspace, port: Port, text: bytes) -> str:
    """The text of a solved conflict, as the state keeps it.

    Raises:
        OverlayError: the file that it would become is there.
    """
    assert port.stop is not None
    _require_free(workspace, port.state, port.stop.topic)
    return dated(workspace, port.stop.own, text, port.state.date).decode()


def files(workspace: Workspace, port: Port) -> dict[str, bytes | None]:
    """What a port that does not stop writes, by path below the checkout's root.

    The state goes with the same stroke.

    Raises:
        OverlayError: the release would not be valid.
    """
    release = port.state.release.model_copy(
        update={
            "tree": workspace.store.tree_of(port.head),
            "files": shipped(workspace.store, port.result(workspace.store)).digest,
            "upstream_tree": UNKNOWN_TREE,
        }
    )
    upstream_tree = workspace.store.tree_of(workspace.base(release))
    release = release.model_copy(update={"upstream_tree": upstream_tree})
    made: dict[str, bytes] = {
        workspace.project.versions_file.name: _listed(workspace, release).encode(),
        f"patches/{release.series}": _series(port).encode(),
    }
    made |= {f"patches/{s.path}": s.text for s in port.steps if s.path and s.text is not None}
    _require_valid(workspace, release, made)
    return {**made, port_state.file(port.state.name).as_posix(): None}


def _listed(workspace: Workspace, release: Release) -> str:
    """The text of VERSIONS.toml with `release` in it."""
    text, how = workspace.project.versions_file.read_text("utf-8"), listing(workspace, release)
    if how.range != how.old_range:
        text = entry.widen(text, how.range)
    return entry.promote(text, release) if how.was_control else entry.insert(text, release)


def _series(port: Port) -> str:
    return "".join(f"{line}\n" for line in _series_lines(port))


def _series_lines(port: Port) -> Iterator[str]:
    for step in port.steps:
        if step.path:
            yield str(step.path)
        else:
            yield f"# Without {step.own.path} of {port.state.origin}: {step.reason}"


def _require_valid(workspace: Workspace, release: Release, made: Mapping[str, bytes]) -> None:
    """Nothing, if the checkout with `made` in it has a sound `release`."""
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        root = Path(folder)
        copy_patches(workspace.project, root / "patches")
        for name, data in made.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        copy = Workspace(Project(root), workspace.fetcher)
        report = validate(copy, [copy.versions.get(release.name)])
    if problems := report.all_problems:
        raise OverlayError(
            f"the port to {release.name} is not sound; nothing is written",
            "; ".join(problems),
            "Fix the patch that is named in the release it is ported from, or start again after "
            "'vllm-overlay port --abort'",
            Exit.PATCH,
        )
