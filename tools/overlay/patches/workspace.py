"""What every command works with: the project, its releases, the cache and the tree store."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from overlay.base.console import Progress
from overlay.base.errors import Exit, OverlayError
from overlay.base.project import Project
from overlay.patches import patch, series, tree
from overlay.patches.patch import Patch
from overlay.patches.series import PatchPath
from overlay.patches.tree import Result, Store
from overlay.releases import versions
from overlay.releases.sources import Cache, Fetcher
from overlay.releases.versions import Release, Versions


@dataclass(frozen=True)
class Workspace:
    """One run of the tool."""

    project: Project
    fetcher: Fetcher

    @classmethod
    def open(cls, project: Project, cache: Path, *, offline: bool = False) -> Workspace:
        """A workspace with the project's VERSIONS.toml, with the default index settings."""
        name = versions.load(project.versions_file).upstream.project
        return cls(project, Fetcher(Cache(cache), name, offline=offline))

    @cached_property
    def versions(self) -> Versions:
        """VERSIONS.toml."""
        return versions.load(self.project.versions_file)

    @cached_property
    def store(self) -> Store:
        """The releases' source trees."""
        return Store.open(self.fetcher.cache.folder)

    @property
    def progress(self) -> Progress:
        """Where long work shows how far it is."""
        return self.fetcher.progress

    def series(self, release: Release) -> tuple[PatchPath, ...]:
        """The patches of a release, in order; none for a control."""
        return series.read_series(self.project.patches, release.series) if release.series else ()

    def patches(self, release: Release) -> list[Patch]:
        """The patches of a release, read; neither a source tree nor git is needed."""
        return [patch.read_patch(None, self.project.patches, path) for path in self.series(release)]

    def require_topic(self, topic: str) -> None:
        """Nothing, if some series lists `topic`.

        Raises:
            OverlayError: none does.
        """
        listed = [self.series(release) for release in self.versions.patched]
        known = sorted({path.topic for paths in listed for path in paths})
        if topic not in known:
            near = difflib.get_close_matches(topic, known, n=3, cutoff=0.5)
            raise OverlayError(
                f"unknown topic {topic!r}",
                "no series lists it",
                f"Did you mean {' or '.join(near)}" if near else f"Name one of {', '.join(known)}",
                Exit.USAGE,
            )

    def base(self, release: Release) -> str:
        """Commit of the release's unpacked sdist in the store."""
        return self.store.base(release, lambda: self.fetcher.fetch(release, "sdist", check=True))

    def apply(self, release: Release, until: str | None = None) -> Result:
        """The release with its series applied, or with the patches before topic `until`."""
        patches = self.series(release)
        if until is not None:
            topics = [p.topic for p in patches]
            patches = patches[: topics.index(until)]
        return tree.apply_series(
            self.store, release, self.base(release), self.project.patches, patches
        )
