"""Is every series sound? Checks, in the order a reader of the table meets them:

- the series file exists, has quilt's plain syntax, and lists no topic twice;
- every patch listed exists, is a git mail with one diff, and touches nothing it may not;
- it applies with zero fuzz; where a hunk moved, it matches in one place only;
- its header is complete (`patch.lint`);
- its text is canonical: exported from the release of its file name it is the same bytes;
- the tree after the series is the one locked in VERSIONS.toml;
- every patch that exists is listed by some series, and first by the release it is named for.

The applier is the one that builds: a validator of its own would validate nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from overlay.base.errors import OverlayError
from overlay.patches.changes import shipped
from overlay.patches.patch import export_patch, lint_patch
from overlay.patches.series import PatchPath, SeriesError, parse_path, patch_files
from overlay.patches.tree import Applied, Result
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

#: Releases at a time: git does the work in processes of its own.
WORKERS = 3


@dataclass(frozen=True)
class Row:
    """One release of the table."""

    release: Release
    cells: dict[str, str]
    """By topic: clean, offset +3, conflict, …"""
    tree: str
    """as locked, differs, or — where the series did not apply."""
    problems: tuple[str, ...]
    """One line each."""


@dataclass(frozen=True)
class Report:
    """The whole validation."""

    rows: tuple[Row, ...]
    topics: tuple[str, ...]
    problems: tuple[str, ...] = field(default=())
    """Those that belong to no release."""

    @property
    def all_problems(self) -> tuple[str, ...]:
        """Every problem, rows first."""
        return tuple(p for row in self.rows for p in row.problems) + self.problems


def validate(
    workspace: Workspace, releases: Sequence[Release], done: Callable[[str], None] = lambda _: None
) -> Report:
    """Check the series of `releases`; `done` hears of each release as it ends.

    Raises:
        OverlayError: an sdist is unavailable or can't be read. What is wrong with a series or a
            patch is no exception: it is in the report.
    """
    _ = workspace.store  # made once, before the threads need it

    def check(release: Release) -> Row:
        row = _check_release(workspace, release)
        done(release.name)
        return row

    with ThreadPoolExecutor(WORKERS) as pool:
        rows = tuple(pool.map(check, releases))
    topics = tuple(dict.fromkeys(topic for row in rows for topic in row.cells))
    whole = len(releases) == len(workspace.versions.releases)
    return Report(rows, topics, tuple(_check_folder(workspace)) if whole else ())


def _check_release(workspace: Workspace, release: Release) -> Row:
    try:
        result = workspace.apply(release)
    except OverlayError as error:
        is_of_a_file = isinstance(error.__cause__, (OSError, UnicodeDecodeError))
        if not is_of_a_file and not isinstance(error, SeriesError):
            raise
        return Row(release, {}, "—", (f"{release.name}: {error}",))
    problems = [str(a.error) for a in result.applied if a.error]
    for applied in result.applied:
        problems += _check_patch(workspace, release, applied)
    tree = "—"
    if all(a.status.is_good for a in result.applied):
        tree = _check_tree(workspace, release, result, problems)
    cells = {a.path.topic: a.summary for a in result.applied}
    return Row(release, cells, tree, tuple(problems))


def _check_patch(workspace: Workspace, release: Release, applied: Applied) -> Iterable[str]:
    if applied.patch is None or not applied.status.is_good:
        return
    named = applied.path.first_tag == release.name
    if named:  # a shared file is checked once
        for problem in lint_patch(applied.patch):
            yield f"{applied.path}: {problem}"
        text = export_patch(workspace.store.git, applied.commit)
        if text != applied.patch.data:
            where = _first_difference(text, applied.patch.data)
            yield f"{applied.path}: not canonical text ({where})"
    elif applied.path.first_tag not in workspace.versions.releases:
        yield f"{applied.path}: VERSIONS.toml has no release {applied.path.first_tag}"
    elif workspace.versions.releases[applied.path.first_tag].version > release.version:
        yield f"{applied.path}: {release.name} is older than the tag in the file's name"


def _first_difference(canonical: bytes, text: bytes) -> str:
    pairs = zip(canonical.split(b"\n"), text.split(b"\n"), strict=False)
    for number, (wanted, found) in enumerate(pairs, 1):
        if wanted != found:
            return f"line {number} is {found.decode(errors='replace')!r}, git writes " + repr(
                wanted.decode(errors="replace")
            )
    return f"it has {len(text)} bytes, git writes {len(canonical)}"


def _check_tree(workspace: Workspace, release: Release, result: Result, problems: list[str]) -> str:
    wanted = release.tree or release.upstream_tree
    if result.tree == wanted:
        if release.is_patched and shipped(workspace.store, result).digest != release.files:
            problems.append(
                f"{release.name}: `files` in VERSIONS.toml is not what the series makes of the "
                f"package; run 'vllm-overlay lock {release.name}'"
            )
        return "as locked"
    problems.append(
        f"{release.name}: the tree after the series is {result.tree}, VERSIONS.toml locks "
        f"{wanted}; if the change is meant, run 'vllm-overlay lock {release.name}'"
    )
    return "differs"


def _check_folder(workspace: Workspace) -> Iterable[str]:
    """What no single release shows: patches nobody lists, series of unknown releases."""
    patches = workspace.project.patches
    listed: dict[PatchPath, list[str]] = {}
    for release in workspace.versions.patched:
        try:
            for path in workspace.series(release):
                listed.setdefault(path, []).append(release.name)
        except OverlayError:
            continue  # its own row tells
    for relative in patch_files(patches):
        found = parse_path(relative.as_posix())
        if found is None:
            yield f"patches/{relative}: its name is not <topic>/<first-tag>.patch"
        elif found not in listed:
            yield f"patches/{relative}: no series lists it"
        elif found.first_tag not in listed[found]:
            yield f"patches/{relative}: series/{found.first_tag} does not list it"
    known = {r.series for r in workspace.versions.patched}
    for file in sorted((patches / "series").glob("*")):
        relative = Path("series", file.name)
        if relative.as_posix() not in known:
            yield f"patches/{relative}: no release of VERSIONS.toml uses it"
