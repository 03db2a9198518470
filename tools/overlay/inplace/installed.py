"""A vLLM that is installed: what its RECORD says of it, and whether that is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path

from overlay.answers import advice, probe
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError, some
from overlay.inplace.session import Session
from overlay.releases.versions import Release, Versions
from overlay.wheels import record
from overlay.wheels.identity import first_known
from overlay.wheels.origin import Origin, match
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

    def path(self, name: str) -> Path:
        """Where a file of it lies, by its path in RECORD."""
        return self.site / name

    def read(self, name: str) -> bytes:
        """A file of it, by its path in RECORD."""
        return self.path(name).read_bytes()

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
            path = self.path(row[0])
            if full or not is_library(row):
                return record.hash_of(path) == row[1]
            return path.is_file() and str(path.stat().st_size) == row[2]

        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            same = pool.map(is_same, rows)
            return [row[0] for row, good in zip(rows, same, strict=True) if not good]

    def require_unchanged(self, rows: Sequence[Row], fix: str, *, full: bool = True) -> None:
        """Raise unless the files of `rows` are as RECORD has them (`changed`); `fix` is the command
        that heals."""
        if names := self.changed(rows, full=full):
            raise self.refused(
                f"not as RECORD has them are {some(names)}",
                f"Somebody has changed them. Keep what you need of that, and heal it: {fix}",
            )


def is_library(row: Row) -> bool:
    """Whether a line of RECORD is a compiled library's."""
    return row[0].endswith(".so")


def by_size(rows: Sequence[Row], full: bool) -> int:
    """How many files of `rows` `Target.changed` compares by size alone."""
    return 0 if full else sum(map(is_library, rows))


def read(session: Session, versions: Versions) -> Target:
    """The vLLM that is installed there.

    Raises:
        OverlayError: it is there twice, was not installed from a wheel, or is an editable
            install: RECORD says nothing of its files.
    """
    site, project = session.site, versions.upstream.project
    infos = probe.dist_infos(site, project)
    heal = without_metadata(session, versions, infos)
    if any((site / each / record.ORIGINALS).exists() for each in infos):
        heal = advice.overlay(session.python, "--repair")
    if len(infos) != 1:
        raise not_one(session, infos, heal)
    (info,) = infos
    try:
        metadata = HeaderParser().parsestr((site / info / "METADATA").read_text("utf-8"))
        target = Target(site, info, str(metadata["Version"]))
        is_whole = bool(target.rows) and info == record.dist_info(project, target.version)
    except (OSError, ValueError, IndexError) as error:
        raise OverlayError(
            f"the vLLM in {site} is refused",
            f"the metadata in {info} can't be read ({error})",
            f"Heal it: {heal}",
            Exit.INTEGRITY,
        ) from error
    if probe.is_editable(site / info) or f"{project}/__init__.py" not in target.rows:
        raise target.refused(
            "it is an editable install: its files are a source tree's",
            "Patch that tree: 'vllm-overlay apply RELEASE' makes one",
        )
    if not is_whole:
        why = f"its metadata says {target.version}, its folder is {info}"
        raise target.refused(why, f"Heal it: {heal}")
    return target


def not_one(session: Session, infos: Sequence[str], heal: str) -> OverlayError:
    """The error for a folder with several dist-info folders of vLLM, or none; `heal` is the command
    that heals."""
    return OverlayError(
        f"the vLLM in {session.site} is refused",
        f"there is not one dist-info folder of it but {', '.join(infos) or 'none'}",
        f"Heal it: {heal}",
        Exit.INTEGRITY,
    )


def without_metadata(session: Session, versions: Versions, infos: Sequence[str]) -> str:
    """What installs the release of the first of these dist-info folders in their place."""
    one = first_known(infos, versions)
    return advice.without_metadata(session.python, session.site, infos, one.release, one.label)


def require_build(target: Target, release: Release, python: Python, *, other_build: bool) -> Origin:
    """The build that RECORD lists the files of, if its Python files are upstream's.

    `other_build` admits one that is not the official wheel's.

    Raises:
        OverlayError: its Python files are others, or it is another build and not to be admitted.
    """
    if release.record is None:
        raise OverlayError(
            f"{release.name}: nothing tells the official wheel's files",
            "VERSIONS.toml does not lock its RECORD",
            f"Run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )
    found = match(release, record.pins(target.own, target.info))
    if found is None:
        raise target.refused(
            "its RECORD is not the official wheel's: it is a changed build",
            f"Install upstream's: {advice.upstreams(python, release)}",
        )
    build, how = found
    origin = Origin.installed(build, target.version, how)
    if not origin.is_official and not other_build:
        raise target.refused(
            "its Python files are upstream's, its other files those of another build than the "
            "wheel on the index",
            "If you trust that build (the official image's is such a one), pass --other-build: "
            f"{advice.overlay(python, '--other-build')}",
        )
    return origin
