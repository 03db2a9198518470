"""Patches on files that lie in no git tree: an install's, or a wheel's. Forward, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from overlay.patches.changes import NOT_SHIPPED, Changes
from overlay.patches.hunks import FileDiff, apply_hunks, describe_mismatch, to_bytes, to_text
from overlay.patches.patch import Patch
from overlay.patches.series import PatchPath

Read = Callable[[str], bytes | None]
"""The bytes of a file, by its path; None if there is no such file."""


class MisfitError(Exception):
    """A patch does not fit the files; the message says which and why."""

    def __init__(self, path: PatchPath, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


def apply(patches: Sequence[Patch], read: Read) -> tuple[Changes, frozenset[PatchPath]]:
    """What the patches make of the files, and which of them change one.

    Raises:
        MisfitError: one does not apply.
    """
    before, after, told = _run(_shipped(patches), read)
    return Changes.between(before, after), told


def take_back(patches: Sequence[Patch], read: Read) -> dict[str, bytes | None]:
    """What the files were that `patches` changed, None for those that they added.

    Raises:
        MisfitError: one can't be taken back.
    """
    back = ((path, file.reversed()) for path, file in _shipped(reversed(patches)))
    return _run(back, read)[1]


def _shipped(patches: Iterable[Patch]) -> Iterator[tuple[PatchPath, FileDiff]]:
    """The diffs of files that a wheel may carry, each with its patch's path."""
    for patch in patches:
        for file in patch.files:
            if not file.path.startswith(NOT_SHIPPED):
                yield patch.path, file


def _run(
    diffs: Iterable[tuple[PatchPath, FileDiff]], read: Read
) -> tuple[dict[str, bytes | None], dict[str, bytes | None], frozenset[PatchPath]]:
    """The files that the diffs speak of, before and after all of them, and the patches that
    changed one."""
    changed = set[PatchPath]()
    before: dict[str, bytes | None] = {}
    texts: dict[str, str | None] = {}
    for path, file in diffs:
        if file.path not in before:
            before[file.path] = read(file.path)
            texts[file.path] = to_text(before[file.path])
        old = texts[file.path]
        texts[file.path], matches = apply_hunks(file, old)
        if bad := [describe_mismatch(match) for match in matches if not match.is_good]:
            raise MisfitError(path, "; ".join(bad))
        if texts[file.path] != old:
            changed.add(path)
    return before, {name: to_bytes(text) for name, text in texts.items()}, frozenset(changed)
