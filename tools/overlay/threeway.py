"""A patch of one release, merged three ways into the source tree of another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from overlay.git import Git, GitError
from overlay.tree import Store


@dataclass(frozen=True)
class Merge:
    """What a merge gave."""

    changed: Mapping[str, bytes | None]
    """Bytes of the files that differ from those merged into; None for a deleted one."""
    conflicts: tuple[str, ...]
    """Files that do not merge."""

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing: what the patch does is there already."""
        return not self.changed and not self.conflicts


def merge(store: Store, head: str, before: str, after: str) -> Merge:
    """Merge what the commit `after` changes in its parent `before` into the commit `head`."""
    changed: dict[str, bytes | None] = {}
    conflicts = []
    for path in store.changed(before, after):
        ours, base, theirs = (store.show(commit, path) for commit in (head, before, after))
        try:
            merged = _merge_file(store.git, ours, base, theirs)
        except GitError:
            conflicts.append(path)
            continue
        if merged != ours:
            changed[path] = merged
    return Merge(changed, tuple(conflicts))


def _merge_file(
    git: Git, ours: bytes | None, base: bytes | None, theirs: bytes | None
) -> bytes | None:
    """One file merged; None stands for no such file.

    Raises:
        GitError: both sides changed the same lines, or one deleted what the other changed.
    """
    if ours == theirs or base == theirs:
        return ours
    if ours == base:
        return theirs
    if ours is None or base is None or theirs is None:
        raise GitError("merge-file", 1, "it is not on all three sides")
    # Not git merge-tree: it takes a base of one's own only from git 2.40 on.
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        names = []
        for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, name).write_bytes(data)
            names.append(str(Path(folder, name)))
        return git.run("merge-file", "-p", "--quiet", *names)
