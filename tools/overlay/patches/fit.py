"""Patches of a series, carried over to another commit than the release's: upstream's main, say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from overlay.base.errors import Exit, OverlayError
from overlay.patches.attempt import AttemptStatus, try_patch
from overlay.patches.conflict import Conflict, locate
from overlay.patches.patch import Mail, Patch
from overlay.patches.series import PatchPath
from overlay.patches.threeway import tree_with
from overlay.patches.tree import Applied, Store
from overlay.releases.versions import Release

#: Trailers that are the overlay's own and say nothing to upstream.
_OURS = ("Origin", "Bug", "Forwarded", "Applied-Upstream", "Remove-When", "Last-Update")


@dataclass(frozen=True)
class Fit:
    """One topic, tried."""

    path: PatchPath
    patch: Patch
    status: AttemptStatus
    commit: str
    """The commit made of it; empty if none was."""
    offsets: tuple[int, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    known: tuple[str, ...] = ()
    """Files in which upstream has the change already, while others needed it (merged only)."""

    @property
    def topic(self) -> str:
        """The patch's topic."""
        return self.path.topic

    @property
    def detail(self) -> str:
        """The status, with what there is to say of it."""
        if self.status is AttemptStatus.OFFSET:
            return "offset " + ", ".join(f"{offset:+d}" for offset in self.offsets)
        if self.known:
            return f"merged, in part upstream already ({', '.join(self.known)})"
        return str(self.status.value)


def upstream_message(mail: Mail) -> str:
    """The commit message without the overlay's own trailers; it stands alone.

    Raises:
        OverlayError: its author did not sign it off.
    """
    author = f"{mail.author} <{mail.email}>"
    if ("Signed-off-by", author) not in mail.trailers:
        raise OverlayError(
            f"{mail.subject!r} is not signed off by its author",
            f"upstream's DCO check wants 'Signed-off-by: {author}'",
            "Who wrote it adds that trailer to the patch (git commit --amend --signoff)",
            Exit.PATCH,
        )
    ours = tuple(f"{key}: " for key in _OURS)
    text, _, trailers = mail.body.strip("\n").rpartition("\n\n")
    kept = [line for line in trailers.split("\n") if not line.startswith(ours)]
    return "\n\n".join(part for part in (mail.subject, text, "\n".join(kept)) if part) + "\n"


def fit(
    scratch: Store,
    release: Release,
    patches: Path,
    series: Iterable[Applied],
    base: str,
) -> tuple[Fit, ...]:
    """Try topics in order on the commit `base`; each goes on what the ones before it left.

    `series` are the topics as they applied to their release. Nothing but `scratch` is written.

    Raises:
        OverlayError: a patch is not signed off, or broken.
    """
    head, found = base, []
    for applied in series:
        assert applied.patch is not None
        message = upstream_message(applied.patch.mail)
        one = _fit_one(scratch, release, patches, applied, head, message)
        head = one.commit or head
        found.append(one)
    return tuple(found)


def _fit_one(
    scratch: Store, release: Release, patches: Path, origin: Applied, head: str, message: str
) -> Fit:
    assert origin.patch is not None
    path, patch = origin.path, origin.patch
    tried = try_patch(scratch, release.name, patches, head, origin, [path])
    status, merge = tried.status, tried.merge
    if status is AttemptStatus.CONFLICT and merge:
        conflicts = tuple(locate(patch, clash) for clash in merge.clashes)
        return Fit(path, patch, status, "", conflicts=conflicts)
    if status is AttemptStatus.MERGED and merge:
        tree = tree_with(scratch, head, origin.commit, merge.changed)
        commit = scratch.commit(tree, head, patch.mail, message)
        return Fit(path, patch, status, commit, known=merge.known)
    if not status.applies:
        return Fit(path, patch, status, "")
    commit = scratch.commit(scratch.tree_of(tried.applied.commit), head, patch.mail, message)
    return Fit(path, patch, status, commit, tried.applied.offsets)
