"""Which earlier patches of a series touched the lines that a later one conflicts in.

`git blame` of the partially patched tree tells who wrote the lines that are there; the hunks of the
earlier patches tell who removed those that are expected. What is upstream's own names nobody.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from overlay.base.git import Git, GitError
from overlay.patches.hunks import (
    FileDiff,
    HunkMatch,
    MatchKind,
    find_lines,
    split_lines,
    to_text,
)
from overlay.patches.series import PatchPath

_BLAMED = re.compile(r"([0-9a-f]{40,64}) \d+ (\d+)(?: \d+)?")
#: Lines that are told of each patch.
_TOLD = 3


@dataclass(frozen=True)
class Earlier:
    """A patch that is in a tree."""

    path: PatchPath
    commit: str
    files: tuple[FileDiff, ...]


@dataclass(frozen=True)
class PatchedTree:
    """A release with the first patches of a series on it."""

    git: Git = field(repr=False)
    base: str
    """Commit of the release."""
    patches: tuple[Earlier, ...]
    """In order."""

    @property
    def head(self) -> str:
        """The last commit."""
        return self.patches[-1].commit if self.patches else self.base

    def lines(self, path: str) -> list[str]:
        """The lines of a file, none if there is no such file."""
        try:
            text = to_text(self.git.run("cat-file", "blob", f"{self.head}:{path}"))
        except GitError:
            return []
        return split_lines(text or "")

    def wrote(self, path: str, numbers: Iterable[int]) -> dict[PatchPath, list[int]]:
        """Who wrote the lines `numbers` (0-based, of a file that is there), by patch."""
        spans = [word for number in sorted(set(numbers)) for word in ("-L", f"{number + 1},+1")]
        if not (spans and self.patches):
            return {}
        span = f"{self.base}..{self.head}"
        out = self.git.text("blame", "--porcelain", *spans, span, "--", path)
        known = {one.commit: one.path for one in self.patches}
        found: dict[PatchPath, list[int]] = {}
        for line in out.split("\n"):
            told = _BLAMED.fullmatch(line)
            if told and (who := known.get(told[1])):
                found.setdefault(who, []).append(int(told[2]))
        return found

    def removed(self, path: str, lines: Iterable[str]) -> Iterator[PatchPath]:
        """Who removed one of `lines`, which say something, from a file."""
        wanted = {line for line in lines if _tells(line)}
        for one in self.patches:
            hunks = [hunk for file in one.files if file.path == path for hunk in file.hunks]
            gone = {line for hunk in hunks for line in hunk.old if line not in hunk.new}
            if gone & wanted:
                yield one.path

    def made(self, path: str) -> Iterator[tuple[PatchPath, str]]:
        """Who added or deleted a file, with the word for it."""
        for one in self.patches:
            for file in one.files:
                if file.path == path and (file.is_new or file.is_deleted):
                    yield one.path, "adds" if file.is_new else "deletes"


def of_match(tree: PatchedTree, files: Sequence[FileDiff], match: HunkMatch) -> tuple[str, ...]:
    """Who touched the lines in which a hunk of a patch with `files` does not match `tree`."""
    if not match.line:
        return tuple(f"{path} {verb} that file" for path, verb in tree.made(match.path))
    image = tree.lines(match.path)
    if match.kind is MatchKind.AMBIGUOUS:
        (file,) = (file for file in files if file.path == match.path)
        hunk = file.hunks[match.number - 1]
        spans = [range(at, at + len(hunk.old)) for at in hunk.places(image)]
        return tuple(_written(tree.wrote(match.path, (n for span in spans for n in span))))
    start = _nearest(image, match.found, match.line - 1)
    return tuple(
        _sides(tree, match.path, image, range(start, start + len(match.found)), match.expected)
    )


def of_merge(
    here: PatchedTree,
    there: PatchedTree,
    name: str,
    place: tuple[str, int],
    sides: tuple[Sequence[str], Sequence[str]],
    notes: Mapping[PatchPath, str],
) -> tuple[str, ...]:
    """Who touched the lines of a merge's conflict.

    Args:
        here: The tree that was merged into.
        there: The tree of release `name` that the patch stands on.
        place: Path and line (1-based; 0: none) in `here`.
        sides: The lines of `here` and those of `there`, without newlines.
        notes: What more there is to say of patches of `there`.
    """
    path, line = place
    ours, base = (tuple(f"{one}\n" for one in side) for side in sides)
    told = list[str]()
    if line:
        start = line - 1
        told += _sides(here, path, here.lines(path), range(start, start + len(ours)), base)
        image = there.lines(path)
        for at in find_lines(image, base, 0)[:1] if base else ():
            missing = _only(base, ours)
            for who in there.wrote(path, (at + number for number in missing)):
                told.append(f"{who} wrote what is expected, in {name}{notes.get(who, '')}")
    else:
        told += [f"{who} {verb} that file" for who, verb in here.made(path)]
        told += [
            f"{who} {verb} that file in {name}{notes.get(who, '')}"
            for who, verb in there.made(path)
        ]
    return tuple(dict.fromkeys(told))


def of_change(before: PatchedTree, now: Collection[str], match: HunkMatch) -> tuple[str, ...]:
    """Who wrote, as the series was `before`, what a hunk expects and does not find any more.

    `now` are the topics that are before the patch as the series is.
    """
    image = before.lines(match.path)
    places = find_lines(image, match.expected, 0) if match.expected else []
    if not places:
        return ()
    at = min(places, key=lambda place: abs(place - match.line + 1))
    missing = _only(match.expected, match.found)
    wrote = before.wrote(match.path, (at + number for number in missing))
    return tuple(
        f"{who} wrote what is expected, before this change"
        + ("" if who.topic in now else ", and is not there any more")
        for who in wrote
    )


def _sides(
    tree: PatchedTree, path: str, image: Sequence[str], span: range, expected: Sequence[str]
) -> Iterator[str]:
    """Who wrote what is there and not expected, and who removed what is expected."""
    found = [image[number] for number in span if number < len(image)]
    new = [span.start + number for number in _only(found, expected)]
    yield from _written(tree.wrote(path, new))
    gone = [expected[number] for number in _only(expected, found)]
    for who in tree.removed(path, gone):
        yield f"{who} removed what is expected"


def _written(wrote: Mapping[PatchPath, Sequence[int]]) -> Iterator[str]:
    for who, numbers in wrote.items():
        listed = ", ".join(map(str, numbers[:_TOLD])) + (", …" if len(numbers) > _TOLD else "")
        yield f"{who} wrote line{'' if len(numbers) == 1 else 's'} {listed}"


def _only(lines: Sequence[str], others: Sequence[str]) -> list[int]:
    """0-based numbers of the lines that `others` has not, in a comparison of both."""
    matcher = difflib.SequenceMatcher(a=list(lines), b=list(others), autojunk=False)
    return [
        number
        for tag, start, stop, *_ in matcher.get_opcodes()
        if tag in ("delete", "replace")
        for number in range(start, stop)
    ]


def _nearest(image: Sequence[str], lines: Sequence[str], around: int) -> int:
    """Where `lines` stand in `image`: other hunks of the same patch may have moved them."""
    places = find_lines(image, lines, around) if lines else []
    return min(places, key=lambda at: abs(at - around), default=around)


def _tells(line: str) -> bool:
    """Whether a line says something: brackets alone do not."""
    return any(character.isalnum() for character in line)
