"""A release that the package index has and VERSIONS.toml has not.

What is known of it before it is listed (`find`, `draft`), and which of the overlay's topics
apply to it (`try_topics`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version
from pydantic import ValidationError
from unearth import Link

from overlay.base.errors import Exit, OverlayError
from overlay.patches import hunks
from overlay.patches.attempt import Attempt, AttemptStatus, try_patch
from overlay.patches.series import PatchPath, parse_path, patch_files
from overlay.patches.threeway import Merge
from overlay.patches.tree import UNKNOWN_TREE, Applied
from overlay.patches.workspace import Workspace
from overlay.releases.platforms import PLATFORMS, Platform
from overlay.releases.versions import (
    FILE_NAME,
    PinnedFile,
    Release,
    Versions,
)


@dataclass(frozen=True)
class Candidate:
    """A release on the index, and which of its files matter here."""

    name: str
    """Its version as the index spells it normalised, e.g. 0.8.5.post1."""
    sdist: Link | None
    wheel: Link | None
    """The official x86_64 wheel."""
    aarch64: Link | None
    """The official wheel for 64-bit Arm, if there is one."""
    yanked: str | None
    """Why its files were yanked (empty: no reason was given); None if they were not."""

    @property
    def version(self) -> Version:
        """The name, comparable."""
        return Version(self.name)


@dataclass(frozen=True)
class Needs:
    """What a release's metadata says it runs on."""

    requires_python: str | None
    torch: str | None
    """The version it pins; None if it pins none."""
    xformers: str | None
    """The version it pins; None if it pins none."""


def shown_status(attempt: Attempt) -> AttemptStatus:
    """What a topic's patch does as it is: one that needs a merge conflicts."""
    status = attempt.status
    return AttemptStatus.CONFLICT if status is AttemptStatus.MERGED else status


def detail(attempt: Attempt) -> str:
    """What to know beside the status: where it conflicts, how it is known to be upstream."""
    if attempt.status is AttemptStatus.UPSTREAM:
        return "a merge changes nothing" if attempt.merge else "its reverse applies"
    if attempt.status.applies:
        return ""
    return "; ".join(_conflict(attempt.applied, attempt.merge))


def _conflict(applied: Applied, merge: Merge | None) -> Iterator[str]:
    failures = applied.failures
    if failures:
        more = f" (and {len(failures) - 1} more hunks)" if len(failures) > 1 else ""
        yield hunks.describe_mismatch(failures[0]) + more
    elif applied.error:
        yield applied.error.why
    if merge and merge.conflicts:
        yield f"a three-way merge conflicts in {', '.join(merge.conflicts)}"
    elif merge:
        yield "a three-way merge is clean"


def find_candidates(workspace: Workspace, *, newer: bool = False) -> tuple[Candidate, ...]:
    """The final and post releases on the index that VERSIONS.toml does not list, oldest first.

    Those in its range; with `newer`, also those newer than all it lists.

    Raises:
        OverlayError: an index does not answer, or --offline forbids asking.
    """
    versions = workspace.versions
    newest = max(release.version for release in versions.releases.values())
    return tuple(
        one
        for one in _unlisted(workspace)
        if versions.in_range(one.version) or (newer and one.version > newest)
    )


def get_candidate(workspace: Workspace, name: str) -> Candidate:
    """The release `name` on the index, in the range or not; VERSIONS.toml must not list it.

    Raises:
        OverlayError: it lists it, the index does not have it, or as `find`.
    """
    wanted = name.removeprefix("v")
    if wanted in workspace.versions.releases:
        raise OverlayError(
            f"release {wanted} is no new one", "VERSIONS.toml lists it",
            f"See 'vllm-overlay validate {wanted}'", Exit.USAGE,
        )  # fmt: skip
    unlisted = {one.name: one for one in _unlisted(workspace)}
    if wanted not in unlisted:
        raise OverlayError(
            f"no new release {name!r}",
            "the package index has no final or post release of that version",
            f"The newest of those not listed: {', '.join([*unlisted][-3:]) or 'none'}",
            Exit.USAGE,
        )
    return unlisted[wanted]


def _unlisted(workspace: Workspace) -> Iterator[Candidate]:
    """The final and post releases on the index that VERSIONS.toml does not list, oldest first."""
    versions = workspace.versions
    listed = {release.version for release in versions.releases.values()}
    files: dict[Version, list[Link]] = {}
    for link in workspace.fetcher.listed():
        version = _version_of(link, versions.upstream.project)
        # A local version is a build of someone's own: the overlay's, for one.
        if version and not (version in listed or version.is_prerelease or version.local):
            files.setdefault(version, []).append(link)
    for version in sorted(files):
        yield _candidate(version, files[version])


def _version_of(link: Link, project: str) -> Version | None:
    """The version that a file is of; None for another project's file, or what is no file of one."""
    if not re.fullmatch(FILE_NAME, link.filename):
        return None
    try:
        if link.filename.endswith(".whl"):
            name, version, _, _ = parse_wheel_filename(link.filename)
        else:
            name, version = parse_sdist_filename(link.filename)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None
    return version if name == canonicalize_name(project) else None


def _candidate(version: Version, links: Iterable[Link]) -> Candidate:
    # By name, so that the order in which an index lists them does not matter; the sort is
    # stable, so that of two places with the same file the first one asked counts.
    ordered = sorted(links, key=lambda link: link.filename)
    sdist = next((link for link in ordered if link.filename.endswith(".tar.gz")), None)
    wheel, aarch64 = (
        next((link for link in ordered if _is_official_wheel(link, platform)), None)
        for platform in PLATFORMS
    )
    reasons = [link.yank_reason for link in (sdist, wheel) if link and link.is_yanked]
    # The JSON of an index may say true in place of a reason.
    yanked = next((str(r) if isinstance(r, str) else "" for r in reasons), None)
    return Candidate(str(version), sdist, wheel, aarch64, yanked)


def _is_official_wheel(link: Link, platform: Platform) -> bool:
    if not link.is_wheel:
        return False
    tags = [tag.platform for tag in parse_wheel_filename(link.filename)[3]]
    return any(tag.startswith("manylinux") and tag.endswith(f"_{platform}") for tag in tags)


def fetch_sdist(workspace: Workspace, candidate: Candidate) -> tuple[PinnedFile, str]:
    """The candidate's sdist, pinned to what the index says, and its commit in the store.

    Raises:
        OverlayError: there is none, or it is not what the index says.
    """
    pinned = workspace.fetcher.pin(_require(candidate, candidate.sdist, "sdist"))
    fetcher, name = workspace.fetcher, candidate.name
    commit = workspace.store.imported(
        name, pinned, lambda: fetcher.fetch_file(name, pinned, check=True)
    )
    return pinned, commit


def pin_wheel(workspace: Workspace, candidate: Candidate) -> PinnedFile:
    """The candidate's official x86_64 wheel, pinned to what the index says; it is not fetched.

    Raises:
        OverlayError: there is none, or the index states no sha256.
    """
    return workspace.fetcher.pin(_require(candidate, candidate.wheel, "x86_64 wheel"))


def pin_aarch64(workspace: Workspace, candidate: Candidate) -> PinnedFile | None:
    """The same of its wheel for 64-bit Arm; None if there is none.

    Raises:
        OverlayError: the index states no sha256.
    """
    return workspace.fetcher.pin(candidate.aarch64) if candidate.aarch64 else None


def _require(candidate: Candidate, link: Link | None, what: str) -> Link:
    if link is None:
        raise OverlayError(
            f"{candidate.name} has no {what} on the index",
            "the overlay patches the sdist and repacks the x86_64 wheel",
            "Wait for it, or pass --find-links with a place that has it",
            Exit.UNAVAILABLE,
        )
    return link


def needs_of(workspace: Workspace, name: str, commit: str) -> Needs:
    """What the metadata in the source tree `commit` of release `name` asks for.

    Raises:
        OverlayError: there is no PKG-INFO in it, or one that cannot be read.
    """
    data = workspace.store.show(commit, "PKG-INFO")
    try:
        metadata = Metadata.from_email(data or b"", validate=False)
        required = list(metadata.requires_dist or ())
        python = metadata.requires_python
    except ValueError as error:
        raise _no_metadata(name, str(error)) from error
    if data is None:
        raise _no_metadata(name, "there is no PKG-INFO in the sdist")
    return Needs(
        str(python) if python else None, _pin(required, "torch"), _pin(required, "xformers")
    )


def _pin(required: Iterable[Requirement], name: str) -> str | None:
    """The version of `name` that is required, extras aside."""
    for one in required:
        exact = [s.version for s in one.specifier if s.operator == "=="]
        if one.name == name and exact and "extra" not in str(one.marker):
            return exact[0]
    return None


def _no_metadata(name: str, why: str) -> OverlayError:
    return OverlayError(
        f"{name}: cannot read its metadata", why, "Add it to VERSIONS.toml by hand", Exit.INTEGRITY
    )


def draft_release(workspace: Workspace, candidate: Candidate) -> Release:
    """The candidate as VERSIONS.toml would list it, but for the tree after its series.

    Files are pinned to what the index says, and the source tree to what the sdist has. The
    constraints are those of the nearest release.

    Raises:
        OverlayError: a file or a pin is missing, or a file is not what the index says.
    """
    wheel, aarch64 = pin_wheel(workspace, candidate), pin_aarch64(workspace, candidate)
    sdist, commit = fetch_sdist(workspace, candidate)
    found = needs_of(workspace, candidate.name, commit)
    fields = {"Requires-Python": found.requires_python, "torch": found.torch}
    if missing := [k for k, v in {**fields, "xformers": found.xformers}.items() if v is None]:
        raise _no_metadata(candidate.name, f"it states no exact {', '.join(missing)}")
    try:
        return Release.model_validate(
            {
                "name": candidate.name,
                "tag": f"v{candidate.name}",
                "status": "affected",
                "revision": 1,
                "series": f"series/{candidate.name}",
                "requires_python": found.requires_python,
                "torch": found.torch,
                "xformers": found.xformers,
                "constraints": nearest_release(workspace.versions, candidate.version).constraints,
                "upstream_tree": workspace.store.tree_of(commit),
                "tree": UNKNOWN_TREE,
                "sdist": sdist,
                "wheel": wheel,
                "aarch64": {"wheel": aarch64} if aarch64 else None,
            }
        )
    except ValidationError as error:
        raise _no_metadata(candidate.name, error.errors()[0]["msg"]) from error


def promoted(control: Release) -> Release:
    """The control as VERSIONS.toml would list it to be patched, but for the tree after its series.

    Its pins stay: they were checked when it was listed.
    """
    fields = {"status": "affected", "revision": 1, "series": f"series/{control.name}"}
    return Release.model_validate({**control.model_dump(), **fields, "tree": UNKNOWN_TREE})


def nearest_release(versions: Versions, version: Version) -> Release:
    """The newest release with a series that is not newer than `version`; else the oldest one.

    Raises:
        OverlayError: no release has a series.
    """
    if not versions.patched:
        raise OverlayError(
            "there are no patches to try", "no release of VERSIONS.toml has a series",
            "List one first", Exit.USAGE,
        )  # fmt: skip
    older = [release for release in versions.patched if release.version <= version]
    return older[-1] if older else versions.patched[0]


def try_topics(workspace: Workspace, name: str, commit: str) -> tuple[Attempt, ...]:
    """Try each topic of the nearest release's series, in its order, on the source tree `commit`.

    Of each topic that release's patch is tried first, then its others from the newest that is
    not newer than release `name`. A topic that conflicts does not stop the rest: they are
    tried on what applied.

    Raises:
        OverlayError: the nearest release's own series does not apply.
    """
    origin = nearest_release(workspace.versions, Version(name))
    result = workspace.apply(origin).require()
    attempts = []
    head, patches = commit, workspace.project.patches
    for own in result.applied:
        texts = texts_for(workspace, own.path, Version(name))
        attempts.append(try_patch(workspace.store, name, patches, head, own, texts))
        head = attempts[-1].applied.commit or head
    return tuple(attempts)


def texts_for(workspace: Workspace, own: PatchPath, version: Version) -> Iterator[PatchPath]:
    """The patches of a topic that may fit `version`, the likeliest first."""
    yield own
    found = (parse_path(relative.as_posix()) for relative in patch_files(workspace.project.patches))
    others = [p for p in found if p and p.topic == own.topic and p != own]
    fitting = [p for p in others if Version(p.first_tag) <= version]
    yield from sorted(fitting, key=lambda p: Version(p.first_tag), reverse=True)
