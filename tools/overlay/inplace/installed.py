"""A vLLM that is installed: what its RECORD says of it, and whether that is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path

from overlay.answers import probe
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError, some
from overlay.releases.versions import Release
from overlay.wheels import record
from overlay.wheels.record import Row

#: As `probe.ORIGIN`, by uv.
CACHED_ORIGIN = "uv_cache.json"


@dataclass(frozen=True)
class Target:
    """An installed vLLM."""

    site: Path
    """The folder that its package and its dist-info folder lie in."""
    info: str
    """Name of the dist-info folder."""
    version: str

    def read(self, name: str) -> bytes:
        """A file of it, by its path in RECORD."""
        return (self.site / name).read_bytes()

    def find(self, name: str) -> bytes | None:
        """The same; None if RECORD does not list it."""
        return self.read(name) if name in self.rows else None

    @cached_property
    def rows(self) -> Mapping[str, Row]:
        """RECORD's lines by path, in its order."""
        return record.read(self.read(f"{self.info}/RECORD").decode())

    @cached_property
    def own(self) -> tuple[Row, ...]:
        """The lines of the wheel's own files."""
        return tuple(r for r in self.rows.values() if not record.is_installers(r[0], self.info))

    def refused(self, why: str, fix: str, status: Exit = Exit.INTEGRITY) -> OverlayError:
        """The error for a vLLM that is not to be touched."""
        return OverlayError(f"vLLM {self.version} in {self.site} is refused", why, fix, status)

    def changed(self, rows: Sequence[Row], *, full: bool = True) -> list[str]:
        """The files of `rows` that are missing or not as RECORD has them.

        Without `full`, compiled libraries, a gigabyte, are compared by size alone.
        """

        def is_same(row: Row) -> bool:
            path = self.site / row[0]
            if full or not is_library(row):
                return record.hash_of(path) == row[1]
            return path.is_file() and str(path.stat().st_size) == row[2]

        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            same = pool.map(is_same, rows)
            return [row[0] for row, good in zip(rows, same, strict=True) if not good]

    def require_unchanged(self, rows: Sequence[Row], *, full: bool = True) -> None:
        """Raise unless the files of `rows` are as RECORD has them (`changed`)."""
        if names := self.changed(rows, full=full):
            raise self.refused(
                f"not as RECORD has them are {some(names)}",
                "Somebody has changed them. Keep what you need of that and install it again: "
                f"{reinstall(self.version)}",
            )


def is_library(row: Row) -> bool:
    """Whether a line of RECORD is a compiled library's."""
    return row[0].endswith(".so")


def reinstall(version: str) -> str:
    """The command line that puts another vLLM's files in the place of an installed one's."""
    return f"pip install --force-reinstall --no-deps 'vllm=={version}'"


def find_site(python: Python, project: str) -> Path:
    """The folder in which `python` finds vLLM.

    Raises:
        OverlayError: it finds none.
    """
    found = probe.find_vllm(python.paths, project)
    if found is None:
        raise OverlayError(
            f"{python.executable} has no vLLM",
            "there is none on the paths that it imports from",
            "Name the Python that vLLM runs on: --python /path/to/venv/bin/python",
            Exit.USAGE,
        )
    return Path(str(found.locate_file("")))


def read(site: Path, project: str) -> Target:
    """The vLLM that is installed in `site`.

    Raises:
        OverlayError: it is there twice, was not installed from a wheel, or is an editable
            install: RECORD says nothing of its files.
    """
    infos = probe.dist_infos(site, project)
    if len(infos) != 1:
        raise OverlayError(
            f"the vLLM in {site} is refused",
            f"there is not one dist-info folder of it but {', '.join(infos) or 'none'}",
            "Uninstall it and install a release: pip install 'vllm==RELEASE'",
            Exit.INTEGRITY,
        )
    (info,) = infos
    try:
        metadata = HeaderParser().parsestr((site / info / "METADATA").read_text("utf-8"))
        target = Target(site, info, str(metadata["Version"]))
        is_whole = bool(target.rows) and info == record.dist_info(project, target.version)
    except (OSError, ValueError, IndexError) as error:
        raise OverlayError(
            f"the vLLM in {site} is refused",
            f"the metadata in {info} can't be read ({error})",
            "Uninstall it and install a release: pip install 'vllm==RELEASE'",
            Exit.INTEGRITY,
        ) from error
    if probe.is_editable(site / info) or f"{project}/__init__.py" not in target.rows:
        raise target.refused(
            "it is an editable install: its files are a source tree's",
            "Patch that tree: 'vllm-overlay apply RELEASE' makes one",
        )
    if not is_whole:
        why = f"its metadata says {target.version}, its folder is {info}"
        raise target.refused(why, "Uninstall it and install a release: pip install 'vllm==RELEASE'")
    return target


def require_official(target: Target, release: Release, *, other_build: bool) -> bool:
    """Raise unless what RECORD lists is the official wheel's.

    `other_build` admits one whose Python files alone are. Returns whether all is official.
    """
    pins = record.pins(target.own, target.info)
    if release.record is None:
        raise OverlayError(
            f"{release.name}: nothing tells the official wheel's files",
            "VERSIONS.toml does not lock its RECORD",
            f"Run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )
    if pins == (release.record, release.record_python):
        return True
    if pins[1] != release.record_python:
        raise target.refused(
            "its RECORD is not the official wheel's: it is a changed build",
            f"Install upstream's: {reinstall(release.name)}",
        )
    if not other_build:
        raise target.refused(
            "its Python files are upstream's, its other files those of another build than the "
            "wheel on the index",
            "If you trust that build (the official image's is such a one), pass --other-build",
        )
    return False
