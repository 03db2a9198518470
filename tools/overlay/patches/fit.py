"""Patches of a series, tried on another commit than the release's: upstream's main, say.

As they are first, with zero fuzz, by the one applier; then by a three-way merge of each file,
with the release's file as the common ancestor. A merge that changes nothing means that upstream
has the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from overlay.base.errors import Exit, OverlayError
from overlay.patches import threeway
from overlay.patches.hunks import Hunk
from overlay.patches.patch import Mail, Patch
from overlay.patches.series import PatchPath
from overlay.patches.threeway import Clash
from overlay.patches.tree import Applied, ApplyStatus, Store, apply_patch
from overlay.releases.versions import Release

#: Trailers that are the overlay's own and say nothing to upstream.
_OURS = ("Origin", "Bug", "Forwarded", "Applied-Upstream", "Last-Update")


class FitStatus(Enum):
    """What became of one topic on the commit."""

    CLEAN = "clean"
    OFFSET = "offset"
    MERGED = "merged"
    UPSTREAM = "already upstream"
    CONFLICT = "conflict"


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

    def __str__(self) -> str:
        """The place, in a line."""
        return f"{self.path} {self.hunk}" + (f", line {self.line} there" if self.line else "")


@dataclass(frozen=True)
class Fit:
    """One topic, tried."""

    path: PatchPath
    patch: Patch
    status: FitStatus
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
        if self.status is FitStatus.OFFSET:
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
    plain = apply_patch(scratch, release.name, head, patches, origin.path)
    if plain.status.is_good:
        status = FitStatus.OFFSET if plain.offsets else FitStatus.CLEAN
        commit = scratch.commit(scratch.tree_of(plain.commit), head, origin.patch.mail, message)
        return Fit(origin.path, origin.patch, status, commit, plain.offsets)
    if plain.status is ApplyStatus.UPSTREAMED:
        return Fit(origin.path, origin.patch, FitStatus.UPSTREAM, "")
    return _merge(scratch, origin, head, message)


def _merge(scratch: Store, origin: Applied, head: str, message: str) -> Fit:
    assert origin.patch is not None
    path, patch = origin.path, origin.patch
    merged = threeway.merge(scratch, head, f"{origin.commit}^", origin.commit)
    if merged.clashes:
        conflicts = tuple(locate(patch, clash) for clash in merged.clashes)
        return Fit(path, patch, FitStatus.CONFLICT, "", conflicts=conflicts)
    if merged.is_empty:
        return Fit(path, patch, FitStatus.UPSTREAM, "")
    tree = tree_with(scratch, head, origin.commit, merged.changed)
    commit = scratch.commit(tree, head, patch.mail, message)
    return Fit(path, patch, FitStatus.MERGED, commit, known=merged.known)


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
