"""What of a patch a source tree has already: whole files, hunks, or some of the lines it adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from overlay.patches.hunks import FileDiff, split_lines, to_text
from overlay.patches.threeway import Merge
from overlay.patches.tree import Applied, Store

#: Lines that are told of a file; the rest is counted.
_TOLD = 2


@dataclass(frozen=True)
class Part:
    """What is there of a patch's changes to one file."""

    path: str
    hunks: tuple[int, ...]
    """Numbers (from 1) of the patch's hunks that are there."""
    of: int
    """How many hunks the patch has in this file."""
    lines: tuple[str, ...] = ()
    """Of the hunks that do not apply: lines that upstream added too."""
    added: int = 0
    """How many lines those hunks add."""

    def __str__(self) -> str:
        """The file, and what of its changes is there."""
        told = []
        if self.hunks:
            numbers = ", ".join(map(str, self.hunks))
            whole = len(self.hunks) == self.of
            told.append(
                "all of it"
                if whole
                else f"hunk{'' if len(self.hunks) == 1 else 's'} {numbers} of {self.of}"
            )
        if self.lines:
            listed = ", ".join(repr(line.strip()) for line in self.lines[:_TOLD])
            more = ", …" if len(self.lines) > _TOLD else ""
            told.append(f"{len(self.lines)} of the {self.added} lines it adds: {listed}{more}")
        return f"{self.path}: {'; '.join(told)}"


def parts(store: Store, own: Applied, before: str, head: str, merge: Merge) -> tuple[Part, ...]:
    """What the commit `head` has of a patch that does not apply to it and was merged.

    `own` is the patch on its release, at the commit `before`. Two checks tell: the reverse of a
    hunk matches and the hunk itself does not; and a file that the merge leaves as it is. Of a
    hunk that neither applies nor is there, the lines are counted that upstream added as well.
    """
    assert own.patch is not None
    found = (_part(store, file, before, head, merge) for file in own.patch.files)
    return tuple(part for part in found if part.hunks or part.lines)


def _part(store: Store, file: FileDiff, before: str, head: str, merge: Merge) -> Part:
    whole = tuple(range(1, len(file.hunks) + 1))
    if file.path in merge.known:
        return Part(file.path, whole, len(whole))
    base, image = _lines(store, before, file.path), _lines(store, head, file.path)
    if image is None:
        return Part(file.path, (), len(whole))
    there, theirs = [], Counter[str]()
    for number, hunk in enumerate(file.hunks, 1):
        if hunk.places(image):
            continue
        if hunk.reversed().places(image):
            there.append(number)
        else:
            theirs += Counter(_telling(hunk.new)) - Counter(hunk.old)
    common = (Counter(_telling(image)) - Counter(base or ())) & theirs
    return Part(file.path, tuple(there), len(whole), tuple(common), theirs.total())


def _lines(store: Store, commit: str, path: str) -> list[str] | None:
    text = to_text(store.show(commit, path))
    return None if text is None else split_lines(text)


def _telling(lines: Iterable[str]) -> Iterator[str]:
    """The lines that say something: brackets alone do not."""
    return (line for line in lines if any(c.isalnum() for c in line))
