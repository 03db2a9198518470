"""Conflicts as a person reads them: which releases, which hunk, and both sides as a diff."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from overlay.patches.hunks import Hunk, HunkMatch, MatchKind
from overlay.patches.patch import Patch
from overlay.patches.series import PatchPath
from overlay.patches.threeway import Clash
from overlay.patches.tree import Applied

#: Lines around a difference.
_AROUND = 2
#: Lines of a merge's conflict that are told of each side.
_SHOWN = 8


def explain(failures: Sequence[tuple[str, Applied]]) -> Iterator[str]:
    """Lines that show what does not match; `failures` are releases with a patch that does not.

    Releases that have the same lines there are told together.
    """
    told: dict[tuple[object, ...], list[tuple[str, HunkMatch]]] = {}
    for release, applied in failures:
        for match in applied.failures:
            key = (applied.path, match.path, match.number, match.expected, match.found)
            told.setdefault(key, []).append((release, match))
    for (path, *_), same in told.items():
        assert isinstance(path, PatchPath)
        yield from _explain(", ".join(release for release, _ in same), path, *same[0])


def _explain(releases: str, path: PatchPath, first: str, match: HunkMatch) -> Iterator[str]:
    yield f"{releases}: {path}"
    place = f"  {match.path} hunk {match.number} {match.header}"
    if match.kind is MatchKind.AMBIGUOUS:
        yield f"{place} matches in several places: {', '.join(match.found)}"
        yield from _earlier(match.earlier)
        return
    yield place
    yield f"  - what the patch expects, + what {first} has at line {match.line}"
    expected, found = _plain(match.expected), _plain(match.found)
    for line in list(difflib.unified_diff(expected, found, n=_AROUND, lineterm=""))[2:]:
        yield "    …" if line.startswith("@@") else f"    {line}"
    yield from _earlier(match.earlier)


def _earlier(told: Sequence[str]) -> Iterator[str]:
    """Whom the earlier lines are of."""
    yield from (f"  earlier in the series: {phrase}" for phrase in told)


def _plain(lines: Sequence[str]) -> list[str]:
    return [line.rstrip("\n") for line in lines]


def sides(conflict: Conflict, theirs: str) -> Iterator[str]:
    """Lines that tell of a merge's conflict: the place, and what each side has there.

    `theirs` names the tree that was merged into. A long side is told by what it changes.
    """
    yield str(conflict)
    for who, lines in ((theirs, conflict.upstream), ("the patch", conflict.patch)):
        shown, verb = list(lines), "has"
        if len(lines) > _SHOWN and conflict.base:
            verb = "changes"
            diff = difflib.unified_diff(conflict.base, lines, n=_AROUND, lineterm="")
            shown = ["…" if line.startswith("@@") else line for line in list(diff)[2:]]
        if lines or conflict.line:
            yield f"  {who} {verb}" + (":" if shown else " nothing")
        yield from (f"    {line}".rstrip() for line in shown[: 2 * _SHOWN])
        if len(shown) > 2 * _SHOWN:
            yield f"    … and {len(shown) - 2 * _SHOWN} more lines"
    yield from _earlier(conflict.earlier)


@dataclass(frozen=True)
class Conflict:
    """One place where the patch and upstream changed the same lines."""

    path: str
    hunk: str
    """Which of the patch's hunks, with its @@ line."""
    line: int
    """1-based, in upstream's file; 0 where there is no such place."""
    upstream: tuple[str, ...]
    """Upstream's lines."""
    patch: tuple[str, ...]
    """What the patch would have there."""
    base: tuple[str, ...] = ()
    """What the release of the patch has there."""
    earlier: tuple[str, ...] = ()
    """Which earlier patches touched these lines, and how: a phrase each."""

    def __str__(self) -> str:
        """The place, in a line."""
        return f"{self.path} {self.hunk}" + (f", line {self.line} there" if self.line else "")


def locate(patch: Patch, clash: Clash) -> Conflict:
    """A clash, with the hunk of the patch that it is in."""
    if clash.why:
        return Conflict(clash.path, clash.why, 0, (), ())
    (file,) = (file for file in patch.files if file.path == clash.path)
    number, hunk = max(enumerate(file.hunks, 1), key=lambda pair: _shared(pair[1], clash))
    where = f"hunk {number} ({hunk.header})"
    return Conflict(clash.path, where, clash.line, clash.ours, clash.theirs, clash.base)


def _shared(hunk: Hunk, clash: Clash) -> int:
    """How many lines of a clash are a hunk's."""
    old, new = ({line.rstrip("\n") for line in side} for side in (hunk.old, hunk.new))
    return len(old & set(clash.base)) + len(new & set(clash.theirs))
