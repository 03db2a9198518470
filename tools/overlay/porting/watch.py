"""New releases on the package index: their files, and what the overlay's topics do on them.

Nothing is written but to the cache. A release that cannot be tried is reported with the reason,
and keeps none of the others from being tried.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.attempt import Attempt, AttemptStatus
from overlay.patches.tally import Tally
from overlay.patches.workspace import Workspace
from overlay.porting.candidate import (
    Candidate,
    Needs,
    detail,
    fetch_sdist,
    find_candidates,
    get_candidate,
    nearest_release,
    needs_of,
    pin_aarch64,
    pin_wheel,
    shown_status,
    try_topics,
)
from overlay.probes.probing import Probing, on_tree
from overlay.releases.versions import PinnedFile, Versions

#: Characters of a conflict in Markdown: an issue's body has a limit.
WIDTH = 240


@dataclass(frozen=True)
class Found:
    """One new release, as far as it could be looked at."""

    candidate: Candidate
    nearest: str
    """The release whose series was tried."""
    tally: Tally
    """Patches that apply as they are, of those that it lists."""
    sdist: PinnedFile | None = None
    wheel: PinnedFile | None = None
    aarch64: PinnedFile | None = None
    needs: Needs | None = None
    attempts: tuple[Attempt, ...] = ()
    probing: Probing = field(default_factory=Probing)
    """What the topics' probes say of it."""
    problems: tuple[str, ...] = ()
    """Why something of it could not be looked at."""

    @property
    def name(self) -> str:
        """The release's version."""
        return self.candidate.name

    @property
    def summary(self) -> str:
        """How many topics did what, e.g. `12 clean, 2 offset, 1 conflict`."""
        counts = dict.fromkeys(AttemptStatus, 0)
        for attempt in self.attempts:
            counts[shown_status(attempt)] += 1
        told = [f"{count} {status.value}" for status, count in counts.items() if count]
        return ", ".join(told) or "not tried"


def watch(
    workspace: Workspace, names: Sequence[str] = (), *, newer: bool = False, probe: bool = True
) -> tuple[Found, ...]:
    """The new releases named, or all of them; see `candidate.find` and `candidate.try_topics`.

    With `probe`, the topics' probes are run on each: whether they are still needed there.

    Raises:
        OverlayError: an index does not answer, there is no new release of a name, or the
            overlay's own series do not apply.
    """
    if names:
        candidates = tuple(get_candidate(workspace, name) for name in dict.fromkeys(names))
    else:
        candidates = find_candidates(workspace, newer=newer)
    return tuple(
        _look(workspace, one, f"{number} of {len(candidates)}", probe)
        for number, one in enumerate(candidates, 1)
    )


def _look(workspace: Workspace, one: Candidate, place: str, probe: bool) -> Found:
    origin = nearest_release(workspace.versions, one.version)
    log_for(one.name).info("new release %s: trying the series of %s", place, origin.name)
    listed = len(workspace.apply(origin).require().applied)  # a fault of our own is no finding
    tally = Tally(0, listed)
    problems: list[str] = []
    sdist, wheel, aarch64, needs = None, None, None, None
    attempts: tuple[Attempt, ...] = ()
    probing = Probing()
    try:
        sdist, commit = fetch_sdist(workspace, one)
        topics = [path.topic for path in workspace.series(origin)]
        probing = on_tree(workspace, commit, topics) if probe else probing
        attempts = try_topics(workspace, one.name, commit)
        tally = Tally(_applied(workspace, commit, attempts), listed)
        needs = needs_of(workspace, one.name, commit)
    except OverlayError as error:
        problems.append(_reported(error))
    try:
        wheel, aarch64 = pin_wheel(workspace, one), pin_aarch64(workspace, one)
    except OverlayError as error:
        problems.append(_reported(error))
    return Found(one, origin.name, tally, sdist, wheel, aarch64, needs, attempts, probing,
                 tuple(problems))  # fmt: skip


def _applied(workspace: Workspace, commit: str, attempts: Sequence[Attempt]) -> int:
    """How many patches are on top of the release's `commit`, by git's count."""
    commits = [attempt.applied.commit for attempt in attempts if attempt.applied.commit]
    return workspace.store.count(commit, commits[-1]) if commits else 0


def _reported(error: OverlayError) -> str:
    """What is wrong with a release, for its report.

    Raises:
        OverlayError: `error` itself, where it is this machine's or the overlay's own fault.
    """
    if error.status not in (Exit.UNAVAILABLE, Exit.INTEGRITY):
        raise error
    return f"{error.what}: {error.why}"


def as_json(versions: Versions, found: Iterable[Found]) -> dict[str, object]:
    """The findings, for scripts."""
    return {
        "project": versions.upstream.project,
        "range": versions.upstream.range,
        "releases": {one.name: _as_json(one) for one in found},
    }


def _as_json(one: Found) -> dict[str, object]:
    return {
        "yanked": one.candidate.yanked,
        "sdist": one.sdist.model_dump() if one.sdist else None,
        "wheel": one.wheel.model_dump() if one.wheel else None,
        "aarch64": one.aarch64.model_dump() if one.aarch64 else None,
        **asdict(one.needs or Needs(None, None, None)),
        "nearest": one.nearest,
        "patches": one.tally.as_json(),
        "topics": {
            attempt.path.topic: {
                "patch": str(attempt.path),
                "status": shown_status(attempt).value,
                "offsets": attempt.applied.offsets,
                "detail": detail(attempt),
                "removal_met": removal(one, attempt),
                "probe": said.as_json() if (said := one.probing.find(attempt.path.topic)) else None,
            }
            for attempt in one.attempts
        },
        "problems": one.problems,
    }


def removal(one: Found, attempt: Attempt) -> str | None:
    """A topic's condition for removal, if the new release meets it."""
    patch = attempt.applied.patch
    found = patch.mail.removal if patch else None
    return str(found) if found and found.is_met(one.candidate.version) else None


def facts(one: Found) -> Iterator[tuple[str, str]]:
    """What is known of a release beside its topics, a label and a text each."""
    if one.candidate.yanked is not None:
        yield "yanked", one.candidate.yanked or "no reason given"
    for kind, file in (("sdist", one.sdist), ("wheel", one.wheel), ("aarch64", one.aarch64)):
        if file:
            yield kind, f"{file.file}  {file.size / 1e6:.1f} MB"
            yield "sha256", file.sha256
    if one.needs:
        pins = [("Python ", one.needs.requires_python or ""), ("torch ", one.needs.torch or "—")]
        pins.append(("xformers ", one.needs.xformers or "—"))
        yield "needs", ", ".join(f"{name}{value}" for name, value in pins)
    for problem in one.problems:
        yield "problem", problem
    yield "topics", f"{one.summary} (series of {one.nearest})"
    yield "patches", f"{one.tally} as is"
    unneeded = [said.topic for said in one.probing.probed if said.is_needed is False]
    if unneeded:
        yield "not needed", f"by their probes, no longer: {', '.join(unneeded)}"


def nothing(versions: Versions) -> str:
    """What to say when there is no new release."""
    upstream = versions.upstream
    return f"no new release of {upstream.project} in {upstream.range}"


def markdown(versions: Versions, found: Sequence[Found]) -> str:
    """The findings as the body of an issue; the same findings give the same text."""
    if not found:
        return f"There is {nothing(versions)}.\n"
    upstream = versions.upstream
    listed = ", ".join(one.name for one in found)
    parts = [
        f"The package index has releases of {upstream.project} that VERSIONS.toml does not "
        f"list (its range is `{upstream.range}`): {listed}.",
        *(part for one in found for part in _section(one)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(one: Found) -> Iterator[str]:
    yield f"## {one.name}"
    # Whatever was read from the index or a source tree stands in code: it must name nobody.
    yield "\n".join(f"- {label}: {_code(text)}" for label, text in facts(one))
    if not one.attempts:
        return
    rows = [("topic", "patch", "result"), ("---", "---", "---")]
    rows += [(a.path.topic, f"`{a.path}`", a.applied.summary) for a in one.attempts]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    details = [(a.path.topic, text) for a in one.attempts for text in details_of(one, a)]
    if details:
        yield "\n".join(f"- {topic}: {_code(text)}" for topic, text in details)


def details_of(one: Found, attempt: Attempt) -> Iterator[str]:
    """What to know of a topic beside its status."""
    if more := detail(attempt):
        yield more
    if met := removal(one, attempt):
        yield f"its condition for removal is met: {met}"
    if said := one.probing.find(attempt.path.topic):
        yield said.of_stock(one.name)


def _code(text: str) -> str:
    """`text` as inline code: on one line, not too long, whatever backticks it has.

    >>> _code("a `b` c")
    '`` a `b` c ``'
    """
    short = textwrap.shorten(text, WIDTH, placeholder=" …")
    fence = "`" * (1 + max((len(run) for run in _backticks(short)), default=0))
    space = " " if "`" in short else ""  # a renderer takes it away again
    return f"{fence}{space}{short}{space}{fence}"


def _backticks(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()
