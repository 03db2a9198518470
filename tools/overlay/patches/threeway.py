"""A patch of one release, merged three ways into the source tree of another."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from overlay.base.git import Git, GitError
from overlay.patches.tree import Store

_SIDES = ("ours", "base", "theirs")
#: What `git merge-file --diff3` puts before the lines of each side, and at the end.
_MARKERS = {"<<<<<<<": "ours", "|||||||": "base", "=======": "theirs", ">>>>>>>": ""}
_MARKER = re.compile(r"(<{7}|\|{7}|={7}|>{7})(?: \w+)?")


@dataclass(frozen=True)
class Clash:
    """A place where both sides changed the same lines, or a file that is not on both."""

    path: str
    why: str = ""
    """What is wrong with the whole file; empty: with the lines below."""
    line: int = 0
    """1-based, in the file merged into; 0: of no line."""
    ours: tuple[str, ...] = ()
    """The lines of the tree merged into."""
    base: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    """The patch's lines."""


@dataclass(frozen=True)
class Merge:
    """What a merge gave."""

    changed: Mapping[str, bytes | None]
    """Bytes of the files that differ from those merged into; None for a deleted one."""
    known: tuple[str, ...]
    """Files that the patch changes, and that have the change already."""
    clashes: tuple[Clash, ...]
    """What does not merge."""

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Files that do not merge."""
        return tuple(dict.fromkeys(clash.path for clash in self.clashes))

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing: what the patch does is there already."""
        return not self.changed and not self.conflicts


def merge(store: Store, head: str, before: str, after: str) -> Merge:
    """Merge what the commit `after` changes in its parent `before` into the commit `head`."""
    changed: dict[str, bytes | None] = {}
    known, clashes = [], list[Clash]()
    for path in store.changed(before, after):
        ours, base, theirs = (store.show(commit, path) for commit in (head, before, after))
        merged, found = _merge_file(store.git, path, ours, base, theirs)
        clashes += found
        if merged != ours and not found:
            changed[path] = merged
        elif not found:
            known.append(path)
    return Merge(changed, tuple(known), tuple(clashes))


def _merge_file(
    git: Git, path: str, ours: bytes | None, base: bytes | None, theirs: bytes | None
) -> tuple[bytes | None, list[Clash]]:
    """One file merged, and what clashes in it; None stands for no such file."""
    if ours in (base, theirs):
        return theirs, []
    if ours is None:
        return None, [Clash(path, "is not there")]
    if theirs is None:
        return None, [Clash(path, "is deleted by the patch and changed there")]
    # Not git merge-tree: it takes a base of one's own only from git 2.40 on.
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        names = []
        for name, data in zip(_SIDES, (ours, base or b"", theirs), strict=True):
            Path(folder, name).write_bytes(data)
            names.append(str(Path(folder, name)))
        labels = [word for side in _SIDES for word in ("-L", side)]
        try:
            return git.run("merge-file", "-p", "--quiet", "--diff3", *labels, *names), []
        except GitError as error:
            if error.status > 127:  # a binary file, say
                return None, [Clash(path, "cannot be merged")]
            text = error.stdout.decode("utf-8", "surrogateescape")
            return None, list(_clashes(path, text))


def _clashes(path: str, text: str) -> Iterator[Clash]:
    """The conflicts in what `git merge-file --diff3` wrote."""
    line, side = 1, ""
    sides: dict[str, list[str]] = {}
    for one in text.split("\n"):
        marker = _MARKER.fullmatch(one)
        if marker and marker[1] == "<<<<<<<":
            sides = {name: [] for name in _SIDES}
        if marker and sides:
            side = _MARKERS[marker[1]]
            if not side:
                ours, base, theirs = (tuple(sides[name]) for name in _SIDES)
                yield Clash(path, "", line, ours, base, theirs)
                line += len(ours)
                sides = {}
        elif side:
            sides[side].append(one)
        else:
            line += 1


def tree_with(scratch: Store, head: str, origin: str, files: Mapping[str, bytes | None]) -> str:
    """The tree of `head` with `files` put in. Returns its id."""
    with scratch.index(head) as env:
        for path, data in files.items():
            if data is None:
                scratch.git.run("update-index", "--force-remove", "--", path, env=env)
                continue
            blob = scratch.git.run("hash-object", "-w", "--stdin", stdin=data).decode().strip()
            mode = _mode(scratch, head, path) or _mode(scratch, origin, path)
            scratch.git.run(
                "update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}", env=env
            )
        return scratch.git.text("write-tree", env=env)


def _mode(scratch: Store, commit: str, path: str) -> str | None:
    listed = scratch.git.text("ls-tree", commit, "--", path)
    return listed.split(" ")[0] if listed else None
