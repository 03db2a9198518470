"""What patches are put on: a release's official wheel, or another build of the release.

Others compile releases too: for another CUDA, for CPUs, in a distribution, in upstream's images.
Such a build is known by its Python files, whose digests are those of the official wheel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from packaging.version import Version

from overlay.base.errors import Exit, OverlayError
from overlay.releases.versions import PinnedFile, Release, Versions
from overlay.wheels import record
from overlay.wheels.record import Pins

#: What of a build is the official wheel's. All: every file. Python: all Python files. Source: these
#: but for FlashAttention's, which come with what is compiled.
Match = Literal["all", "python", "source"]


def match(release: Release, found: Pins) -> tuple[Release, Match] | None:
    """Which of a release's official wheels a build is nearest to, and how much of it is that
    wheel's, by its RECORD; None: not even its source."""
    each = [(one, how) for one in release.builds if (how := _match(one, found))]
    return min(each, key=lambda pair: get_args(Match).index(pair[1]), default=None)


def _match(release: Release, found: Pins) -> Match | None:
    if found.source == release.record_source or found.python == release.record_python:
        if found.python != release.record_python:
            return "source"
        return "all" if found.every == release.record else "python"
    return None


@dataclass(frozen=True)
class Origin:
    """A build of a release, without patches."""

    release: Release
    version: str
    """As its metadata states it, e.g. 0.8.5.post1+cu118."""
    match: Match
    wheel: PinnedFile | None = None
    """The file, if it is a wheel."""

    @classmethod
    def official(cls, release: Release) -> Origin:
        """The official wheel."""
        return cls(release, release.name, "all", release.wheel)

    @classmethod
    def installed(cls, release: Release, version: str, found: Match) -> Origin:
        """What was installed with that version and is `release` (`match`); its wheel is not at
        hand."""
        origin = cls(release, version, found)
        return cls.official(release) if origin.is_official else origin

    @property
    def is_official(self) -> bool:
        """Whether it is the official wheel, or installed from it."""
        return self.match == "all" and not self.label and self.wheel in (None, self.release.wheel)

    @property
    def label(self) -> str:
        """Its local version: cu118; empty without one."""
        return Version(self.version).local or ""

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return self.wheel.file if self.wheel else f"{self.release.name} as it is installed"

    def info(self, versions: Versions) -> str:
        """Name of its dist-info folder."""
        return record.dist_info(versions.upstream.project, self.version)

    def patched_version(self, versions: Versions) -> str:
        """Its version once it is patched."""
        return versions.local_version(self.release, self.label)

    def refused(self, why: str) -> OverlayError:
        """The error for what is no wheel of the release, or a broken one."""
        if self.is_official:
            what, fix = "no vLLM wheel", "Delete it from the cache and run the command again"
        else:
            what, fix = "not to be patched", "Get it again from who built it"
        return OverlayError(f"{self.name} is {what}", why, fix, Exit.INTEGRITY)
