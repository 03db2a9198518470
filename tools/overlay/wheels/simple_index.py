"""A package index of patched wheels as plain files: PEP 503 (HTML) and PEP 691 (JSON).

    DIR/index.html, index.json             the one project
    DIR/vllm/index.html, index.json        its wheels, with hashes and required Pythons
    DIR/vllm/<wheel>, <wheel>.metadata     the wheel and its METADATA (PEP 658, 714)

Any web server's default serves the HTML, and that is all pip and uv need. One that negotiates
content may serve index.json as application/vnd.pypi.simple.v1+json. No file holds a time, so the
same wheels make the same bytes.
"""

from __future__ import annotations

import hashlib
import html
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from overlay.base import atomic, plain_file
from overlay.base.console import log_for
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.wheels import rawzip, record, verify
from overlay.wheels.origin import Origin
from overlay.wheels.plan import file_name

#: Where `vllm-overlay build` puts wheels.
DIST = Path("dist")
#: Says whose index it is.
_GENERATOR = "vllm-overlay"
_PAGE = """<!DOCTYPE html>
<html>
  <head>
    <meta charset="utf-8">
    <meta name="pypi:repository-version" content="1.0">
    <meta name="generator" content="{generator}">
    <title>{title}</title>
  </head>
  <body>
{body}
  </body>
</html>
"""


@dataclass(frozen=True)
class Entry:
    """A wheel in the index."""

    name: str
    sha256: str
    size: int
    """Bytes."""
    metadata_sha256: str
    requires_python: str | None

    @property
    def version(self) -> Version:
        """As the file's name has it."""
        return parse_wheel_filename(self.name)[1]

    def anchor(self) -> str:
        """Its line in the HTML page."""
        requires = ""
        if self.requires_python:
            requires = f' data-requires-python="{html.escape(self.requires_python)}"'
        return (
            f'    <a href="{quote(self.name)}#sha256={self.sha256}"{requires}'
            f' data-core-metadata="sha256={self.metadata_sha256}">{html.escape(self.name)}</a><br>'
        )

    def as_json(self) -> dict[str, object]:
        """Its object in the JSON page."""
        found: dict[str, object] = {
            "filename": self.name,
            "url": quote(self.name),
            "hashes": {"sha256": self.sha256},
            "size": self.size,
            "core-metadata": {"sha256": self.metadata_sha256},
        }
        return found | ({"requires-python": self.requires_python} if self.requires_python else {})


@dataclass(frozen=True)
class Made:
    """An index that was written."""

    folder: Path
    project: str
    entries: tuple[Entry, ...]
    """By version."""
    new: frozenset[str]
    """Names of the wheels that this run was given."""

    @property
    def url(self) -> str:
        """The folder, as pip and uv take it."""
        return self.folder.as_uri()

    @property
    def versions(self) -> list[str]:
        """Versions that can be installed from it, oldest first."""
        return list(dict.fromkeys(str(entry.version) for entry in self.entries))


def write(workspace: Workspace, folder: Path, wheels: Sequence[Path]) -> Made:
    """Write the index of `wheels`, or of those in dist/, into `folder`.

    Wheels that an earlier run put there stay in it. Files get their names when they are complete,
    and the pages theirs after the files.

    Raises:
        OverlayError: a wheel is none of this overlay's or not as `verify` demands, there is none,
            `folder` holds something else, or can't be written.
    """
    project = workspace.versions.upstream.project
    chosen = [path.absolute() for path in wheels] or _built(workspace)
    for path in chosen:
        _require_verified(workspace, path)
    try:
        found = {entry.name: entry for entry in _earlier(folder, project)}
        (folder / project).mkdir(parents=True, exist_ok=True)
        for path in chosen:
            entry, metadata = _entry(path)
            _place(path, entry, folder / project / entry.name)
            _write(folder / project / f"{entry.name}.metadata", metadata)
            found[entry.name] = entry
        entries = tuple(sorted(found.values(), key=lambda entry: (entry.version, entry.name)))
        made = Made(folder, project, entries, frozenset(path.name for path in chosen))
        _write_pages(made)
    except OSError as error:
        raise OverlayError(
            f"cannot write the index {folder}",
            error.strerror or str(error),
            "Name a folder that can be written, with room for the wheels",
            Exit.ENVIRONMENT,
        ) from error
    return made


def _built(workspace: Workspace) -> list[Path]:
    """This overlay's wheels in dist/, as this checkout builds them."""
    builds = (build for release in workspace.versions.patched for build in release.builds)
    names = [file_name(workspace.versions, Origin.official(build)) for build in builds]
    found = [DIST.absolute() / name for name in names if (DIST / name).is_file()]
    if not found:
        raise OverlayError(
            "there is no wheel for an index",
            f"{DIST.absolute()} holds none of this overlay's",
            "Build one with 'vllm-overlay build RELEASE', or name the files",
            Exit.USAGE,
        )
    return found


def _require_verified(workspace: Workspace, path: Path) -> None:
    problems = [p for check in verify.verify(workspace, path) for p in check.problems]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise OverlayError(
            f"{path.name} is refused",
            f"{problems[0]}{more}",
            f"See 'vllm-overlay verify {path}', and build it again",
            Exit.INTEGRITY,
        )
    log_for(verify.release_of(workspace, path).name).info("verified %s", path.name)


def _entry(path: Path) -> tuple[Entry, bytes]:
    """A verified wheel's entry, and its METADATA."""
    name, version = path.name.split("-")[:2]
    with path.open("rb") as stream:
        members = {member.name: member for member in rawzip.members(stream, path.name)}
        metadata = rawzip.read(stream, members[f"{record.dist_info(name, version)}/METADATA"])
    requires = HeaderParser().parsestr(metadata.decode())["Requires-Python"]
    return Entry(
        path.name, sha256(path), path.stat().st_size, hashlib.sha256(metadata).hexdigest(), requires
    ), metadata


def _earlier(folder: Path, project: str) -> list[Entry]:
    """The wheels that an earlier run put into `folder`, which are still as it left them.

    Raises:
        OverlayError: it holds something else, or a wheel has changed.
    """
    page = folder / project / "index.json"
    if not page.exists() and _is_unfinished(folder, project):
        return []
    try:
        raw = json.loads(plain_file.read(page))
        if raw["meta"]["_generator"] != _GENERATOR:
            raise ValueError(f"{page} was made by something else")
        entries = [
            Entry(
                file["filename"],
                file["hashes"]["sha256"],
                file["size"],
                file["core-metadata"]["sha256"],
                file.get("requires-python"),
            )
            for file in raw["files"]
        ]
        for entry in entries:
            parse_wheel_filename(entry.name)
    except (
        OSError, ValueError, LookupError, TypeError, RecursionError, InvalidWheelFilename
    ) as error:  # fmt: skip
        raise OverlayError(
            f"{folder} is in the way",
            f"it is not empty, and no index that this command wrote ({error})",
            "Name another folder, or empty this one",
            Exit.ENVIRONMENT,
        ) from error
    for entry in entries:
        path = folder / project / entry.name
        if not path.is_file() or sha256(path) != entry.sha256:
            raise OverlayError(
                f"{path} is damaged",
                "it is missing, or not what the index says",
                f"Put it back, or delete {folder} and write the index again",
                Exit.INTEGRITY,
            )
    return entries


def _is_unfinished(folder: Path, project: str) -> bool:
    """Whether there is nothing in `folder` but what a run that was killed may have left."""
    if not folder.is_dir():
        return not folder.exists()
    inside = folder / project
    names = {path.name for path in folder.iterdir()}
    files = {path.name for path in inside.iterdir()} if inside.is_dir() else set()
    return names <= {project} and all(n.startswith((".", f"{project}-", "index.")) for n in files)


def _place(source: Path, entry: Entry, target: Path) -> None:
    """A wheel at its place in the index: a second name where that works, else a copy."""
    if target.is_file() and sha256(target) == entry.sha256:
        return
    part = atomic.part_of(target)
    try:
        part.unlink(missing_ok=True)
        part.hardlink_to(source)
        part.replace(target)
    except OSError:
        with atomic.writing(target) as out, source.open("rb") as stream:
            shutil.copyfileobj(stream, out)


def _write(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all; leave it alone if it is so already."""
    if path.is_file() and path.read_bytes() == data:
        return
    atomic.put(path, data)


def _write_pages(made: Made) -> None:
    meta = {"api-version": "1.1", "_generator": _GENERATOR}
    files = {
        "meta": meta,
        "name": made.project,
        "versions": made.versions,
        "files": [entry.as_json() for entry in made.entries],
    }
    _page(made.folder / made.project, made.project, [e.anchor() for e in made.entries], files)
    link = f'    <a href="{made.project}/">{made.project}</a><br>'
    _page(made.folder, "vllm-overlay", [link], {"meta": meta, "projects": [{"name": made.project}]})


def _page(folder: Path, title: str, lines: Sequence[str], data: Mapping[str, object]) -> None:
    text = _PAGE.format(generator=_GENERATOR, title=title, body="\n".join(lines))
    _write(folder / "index.html", text.encode())
    _write(folder / "index.json", (json.dumps(data, indent=2) + "\n").encode())
