"""A patch of one release, tried on the source tree of another.

As it is first, with zero fuzz, by the one applier; where it does not apply, its reverse, which
tells that upstream has the change; then by a three-way merge of each file, with the patch's own
release as the common ancestor. A merge that changes nothing means that upstream has the change too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from overlay.patches import threeway
from overlay.patches.series import PatchPath
from overlay.patches.threeway import Merge
from overlay.patches.tree import Applied, ApplyStatus, Store, apply_patch


class AttemptStatus(Enum):
    """What became of it."""

    CLEAN = "clean"
    """It applies where its hunks say."""
    OFFSET = "offset"
    """It applies, some lines away."""
    MERGED = "merged"
    """It does not apply, and a merge is without conflicts."""
    CONFLICT = "conflict"
    """It does not apply, and a merge conflicts."""
    UPSTREAM = "already upstream"
    """What it changes is there."""

    @property
    def applies(self) -> bool:
        """Whether the patch applies as it is."""
        return self in (AttemptStatus.CLEAN, AttemptStatus.OFFSET)


@dataclass(frozen=True)
class Attempt:
    """One patch, tried."""

    path: PatchPath
    """The file that applies, or whose reverse does; else its own release's."""
    applied: Applied
    """What the applier said of that file; of several that do not apply, of the first."""
    merge: Merge | None = None
    """Where no file applies as it is."""

    @property
    def status(self) -> AttemptStatus:
        """What became of it."""
        if self.applied.status is ApplyStatus.UPSTREAMED:
            return AttemptStatus.UPSTREAM
        if self.merge:
            return AttemptStatus.CONFLICT if self.merge.clashes else AttemptStatus.MERGED
        is_offset = self.applied.status is ApplyStatus.OFFSET
        return AttemptStatus.OFFSET if is_offset else AttemptStatus.CLEAN


def try_patch(
    store: Store,
    release: str,
    patches: Path,
    head: str,
    own: Applied,
    texts: Iterable[PatchPath],
    may_be_listed: Callable[[PatchPath], bool] = lambda _: True,
) -> Attempt:
    """Try the files `texts` of a topic, under `patches`, on the commit `head` of `release`.

    `own` is the topic's patch on its own release. A file that may not be listed does not count as
    one that applies.

    Raises:
        OverlayError: a file is broken or missing.
    """
    first = None
    for path in texts:
        applied = apply_patch(store, release, head, patches, path)
        fits = applied.status.is_good and may_be_listed(path)
        if fits or applied.status is ApplyStatus.UPSTREAMED:
            return Attempt(path, applied)
        if applied.error and applied.status in (ApplyStatus.BROKEN, ApplyStatus.MISSING):
            raise applied.error
        first = first or applied
    assert first is not None
    merge = threeway.merge(store, head, f"{own.commit}^", own.commit)
    if merge.is_empty:
        first = Applied(own.path, ApplyStatus.UPSTREAMED, first.patch)
    return Attempt(own.path, first, merge)
