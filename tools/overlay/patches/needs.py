"""Which earlier topics of a series a topic needs, found by trying.

Needed is an earlier topic without which the patch does not apply to the release, or imports what
is not there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from overlay.patches.series import PatchPath
from overlay.patches.tree import Store, apply_series
from overlay.releases.versions import Release


def needed(
    store: Store, release: Release, base: str, patches: Path, series: Sequence[PatchPath]
) -> tuple[PatchPath, ...]:
    """The smallest part of `series` that its last patch stands on, in order, without itself.

    `base` is the commit of the release's sdist; the whole series applies to it.
    """
    *earlier, last = series
    whole = apply_series(store, release, base, patches, series).require()

    def stands(others: Sequence[PatchPath]) -> bool:
        tried = apply_series(store, release, base, patches, [*others, last])
        return tried.error is None and not set(_dangling(store, tried.head)) - dangling

    dangling = set(_dangling(store, whole.head))  # compiled modules are in no source tree
    if stands(()):
        return ()
    kept = list(earlier)
    for one in reversed(earlier):  # what stands on it is gone before it is tried
        without = [other for other in kept if other != one]
        if stands(without):
            kept = without
    return tuple(kept)


def _dangling(store: Store, commit: str) -> Iterator[tuple[str, str, str]]:
    """Imports in the files that `commit` changed, of what its tree has not: file, module, name."""
    for path, change in store.changed(f"{commit}^", commit).items():
        source = store.show(commit, path) if path.endswith(".py") and change != "D" else None
        for module, name in _imports(source or b""):
            if not _is_there(store, commit, module, name):
                yield path, module, name


def _imports(source: bytes) -> Iterator[tuple[str, str]]:
    """Absolute imports of a module, or of a name in one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def _is_there(store: Store, commit: str, module: str, name: str) -> bool:
    place = module.replace(".", "/")
    if store.show(commit, f"{place.partition('/')[0]}/__init__.py") is None:
        return True  # a package of others
    text = store.show(commit, f"{place}.py") or store.show(commit, f"{place}/__init__.py")
    if text is not None and (not name or re.search(rf"\b{re.escape(name)}\b".encode(), text)):
        return True
    if text is not None and name == "*":
        return True
    beside = f"{place}/{name}" if name else place
    return bool(store.git.text("ls-tree", commit, "--", f"{beside}.py", f"{beside}/__init__.py"))
