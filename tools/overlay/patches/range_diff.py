"""What a refresh or a port does to each patch: git's own range-diff, topic by topic.

A diff of two patch files is a diff of diffs with line numbers and blob ids in it; range-diff leaves
those out. Here a topic tells which patch became which, so that git need not guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from overlay.base.console import counted
from overlay.patches.tree import Applied, Store
from overlay.releases.versions import ranges

#: So high that git takes two commits for each other's whatever their diffs are.
_PAIR = "--creation-factor=10000"
#: Characters of Markdown: GitHub takes no longer text.
LIMIT = 60_000


class How(Enum):
    """What became of a patch."""

    SAME = "unchanged"
    CHANGED = "changed"
    NEW = "new"
    GONE = "gone"


@dataclass(frozen=True)
class Change:
    """One topic's patch, before and after."""

    topic: str
    how: How
    diff: str = ""
    """Git's range-diff without its first line, where it changed."""
    why: str = ""
    """Of one that is gone."""


@dataclass(frozen=True)
class Section:
    """The changes of one release."""

    release: str
    changes: tuple[Change, ...]
    order: tuple[str, ...] = ()
    """The topics as they come now, where those that stay come in another order than before."""

    @property
    def summary(self) -> str:
        """How many patches became what."""
        counts = [(sum(c.how is how for c in self.changes), how.value) for how in How]
        told = ", ".join(f"{count} {word}" for count, word in counts if count) or "no patches"
        return f"{told}; in order: {', '.join(self.order)}" if self.order else told


def between(
    store: Store, release: str, before: Sequence[Applied], after: Sequence[Applied]
) -> Section:
    """What became of each patch of a release, in the order of those `after`; those that are gone
    come last."""
    old = {one.path.topic: one for one in before if one.commit}
    new = {one.path.topic: one for one in after if one.commit}
    found = [
        compare(store, old[topic].commit, one.commit, topic)
        if topic in old
        else Change(topic, How.NEW)
        for topic, one in new.items()
    ]
    gone = (Change(topic, How.GONE) for topic in old if topic not in new)
    moved = [topic for topic in old if topic in new] != [topic for topic in new if topic in old]
    return Section(release, (*found, *gone), tuple(new) if moved else ())


def compare(store: Store, old: str, new: str, topic: str) -> Change:
    """What became of one patch, by the commits that it was and is."""
    if old == new:
        return Change(topic, How.SAME)
    spans = (f"{old}^..{old}", f"{new}^..{new}")
    out = store.run("range-diff", "--no-color", _PAIR, *spans).decode("utf-8", "replace")
    _, *lines = (line[4:] for line in out.split("\n"))
    if not any(map(_tells, lines)):
        return Change(topic, How.SAME)
    return Change(topic, How.CHANGED, "\n".join(lines))


def _tells(line: str) -> bool:
    """Whether a line is a change, and more than what git calls the place of a hunk."""
    return line.startswith(("+", "-")) and not line[1:].startswith("@@ ")


def _groups(sections: Sequence[Section]) -> dict[Change, list[str]]:
    """The changes that are one in several releases, with those; what is unchanged is left out."""
    found: dict[Change, list[str]] = {}
    for section in sections:
        for one in section.changes:
            if one.how is not How.SAME:
                found.setdefault(one, []).append(section.release)
    return found


def text(sections: Sequence[Section], order: Sequence[str]) -> Iterator[str]:
    """Lines for a terminal; `order` are all releases."""
    for one, names in _groups(sections).items():
        yield f"{one.topic}, {ranges(names, order)}: {_told(one)}"
        yield from (f"    {line}".rstrip() for line in one.diff.splitlines())
    yield from (f"{section.release}: {section.summary}" for section in sections)


def _told(one: Change) -> str:
    return f"{one.how.value}: {one.why}" if one.why else one.how.value


def as_json(sections: Sequence[Section]) -> list[dict[str, object]]:
    """For scripts: one entry for each change, with the releases that have it."""
    return [
        {"topic": one.topic, "releases": names, "change": one.how.value, "diff": one.diff,
         "reason": one.why or None}
        for one, names in _groups(sections).items()
    ]  # fmt: skip


def markdown(sections: Sequence[Section], order: Sequence[str], notes: Mapping[str, str]) -> str:
    """For a pull request: a table, then each change as a diff that opens. `notes` are of releases.

    What would be longer than GitHub takes is told in numbers.
    """
    rows = [("release", "patches", ""), ("---", "---", "---")]
    rows += [(one.release, one.summary, notes.get(one.release, "")) for one in sections]
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    size = len(parts[0])
    for one, names in _groups(sections).items():
        part = _part(one, ranges(names, order))
        if size + len(part) > LIMIT:
            lines = counted(len(one.diff.splitlines()), "line")
            part = f"**`{one.topic}`**, {ranges(names, order)}: {_told(one)}, {lines} of range-diff"
        parts.append(part)
        size += len(part) + 2
    return "\n\n".join(parts) + "\n"


def _part(one: Change, names: str) -> str:
    told = f"{names}: {_escaped(_told(one))}"
    if not one.diff:
        return f"**`{one.topic}`**, {told}"
    longest = max((len(run) for run in re.findall("`+", one.diff)), default=0)
    fence = "`" * max(3, longest + 1)
    summary = f"<summary><b><code>{one.topic}</code></b>, {told}</summary>"
    return f"<details>{summary}\n\n{fence}diff\n{one.diff}{fence}\n</details>"


def _escaped(text_: str) -> str:
    """A reason's text, which names nobody and makes no tags."""
    return re.sub(r"([<>@`*_\[\]#|\\])", r"\\\1", text_)
