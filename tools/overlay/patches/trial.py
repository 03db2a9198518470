"""A copy of patches/ in which changes are tried before any of them is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.project import Project
from overlay.patches.patch import read_data
from overlay.patches.series import PatchPath, read_series, rewrite_series
from overlay.patches.tree import Result, apply_series
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release


def copy_patches(project: Project, folder: Path) -> None:
    """Copy patches/ to `folder`.

    Raises:
        OverlayError: there is something in it that is no plain file, or no room for it.
    """
    try:
        plain_file.copy_tree(project.patches, folder)
    except OSError as error:
        raise OverlayError(
            f"cannot copy {project.patches}", f"{error.filename}: {error.strerror}",
            "Restore that file from git, or set TMPDIR to a folder with room", Exit.ENVIRONMENT,
        ) from error  # fmt: skip


class Trial:
    """A copy of patches/ in `folder`, in the form that the applier reads."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        """Copy it.

        Raises:
            OverlayError: there is something in it that is no plain file, or no room for it.
        """
        self.workspace = workspace
        self.folder = folder / "patches"
        copy_patches(workspace.project, self.folder)
        self.before = self._files()

    def _files(self) -> dict[str, bytes]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def changed(self) -> dict[str, bytes | None]:
        """Files that differ from those in the checkout, relative to patches/."""
        now = self._files()
        names = sorted(self.before.keys() | now.keys())
        return {one: now.get(one) for one in names if now.get(one) != self.before.get(one)}

    def series(self, release: Release) -> tuple[PatchPath, ...]:
        """The patches of a release, in order."""
        return read_series(self.folder, str(release.series))

    def listing(self, path: PatchPath) -> list[Release]:
        """The releases whose series list `path`, oldest first."""
        return [one for one in self.workspace.versions.patched if path in self.series(one)]

    def write_series(self, release: Release, paths: Sequence[PatchPath]) -> None:
        """Make `paths` the patches of a release; comments stay."""
        if tuple(paths) != self.series(release):
            file = self.folder / str(release.series)
            text = rewrite_series(file.read_text("utf-8"), paths)
            file.write_text(text, "utf-8", newline="\n")

    def replace(self, releases: Iterable[Release], old: PatchPath, new: PatchPath) -> None:
        """Let the series of `releases` list `new` where they list `old`."""
        for release in releases:
            paths = [new if path == old else path for path in self.series(release)]
            self.write_series(release, paths)

    def write(self, path: PatchPath, text: bytes) -> None:
        """Give a patch this text."""
        file = path.under(self.folder)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text)

    def read(self, path: PatchPath) -> bytes:
        """A patch's text.

        Raises:
            OverlayError: there is none.
        """
        return read_data(self.folder, path)

    def apply(self, release: Release) -> Result:
        """The release with its series, as far as it goes."""
        base = self.workspace.base(release)
        return apply_series(self.workspace.store, release, base, self.folder, self.series(release))

    def inputs(self, release: Release) -> str:
        """Stands for all that `apply` depends on."""
        digest = hashlib.sha256()
        for path in self.series(release):
            file = path.under(self.folder)
            data = file.read_bytes() if file.is_file() else b""
            digest.update(b"%s %d\n%s" % (str(path).encode(), len(data), data))
        return digest.hexdigest()
