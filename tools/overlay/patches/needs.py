"""Which earlier topics of a series a topic needs, found by trying.

Needed is an earlier topic without which the patch does not apply to the release, or imports what
is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overlay.patches.imports import Import, Sources
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
    sources = Sources(store)
    whole = apply_series(store, release, base, patches, series).require()

    def stands(others: Sequence[PatchPath]) -> bool:
        tried = apply_series(store, release, base, patches, [*others, last])
        return tried.error is None and not _dangling(sources, tried.head) - dangling

    dangling = _dangling(sources, whole.head)  # compiled modules are in no source tree
    if stands(()):
        return ()
    kept = list(earlier)
    for one in reversed(earlier):  # what stands on it is gone before it is tried
        without = [other for other in kept if other != one]
        if stands(without):
            kept = without
    return tuple(kept)


def _dangling(sources: Sources, commit: str) -> frozenset[Import]:
    """Imports in the files that `commit` changed, of what its tree has not."""
    return sources.dangling(commit, sources.store.changed(f"{commit}^", commit))
