"""A patch that was edited by hand, or refreshed by real quilt, as canonical text again.

Quilt leaves out git's headers and writes `Index:` lines; a hand leaves wrong counts in the @@
lines. Both are fixed without guessing at any line of the change: the result must apply, with
no fuzz, to the release in the file's name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git
from overlay.patches.patch import Mail, export_patch, lint_patch, parse_mail, read_patch
from overlay.patches.series import PatchPath, parse_path
from overlay.patches.tree import apply_series
from overlay.patches.trial import Trial
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*")
_VERSION = re.compile(r"\d+\.\d+[\w.() -]*")
#: Headers of a git diff that say more than its other lines; index lines are made anew.
_KEPT = (
    "new file mode", "deleted file mode", "old mode", "new mode", "rename ", "copy ",
    "GIT binary patch", "Binary files",
)  # fmt: skip


@dataclass(frozen=True)
class Normalized:
    """One patch, brought back to canonical text."""

    path: PatchPath
    old: bytes
    new: bytes
    problems: tuple[str, ...]
    """What is missing or wrong in its header, a phrase each."""


def find(workspace: Workspace, files: Iterable[Path]) -> list[PatchPath]:
    """The patches that `files` are: paths on the disk, or relative to patches/.

    Raises:
        OverlayError: no such file, or one that is no patch of the overlay.
    """
    patches = workspace.project.patches.resolve()
    found = []
    for file in files:
        place = next((one for one in (file, patches / file) if one.is_file()), None)
        if place is None:
            raise OverlayError(
                f"cannot read {file}", "there is no such file, here or in patches/",
                "Name a file as patches/<topic>/<first-tag>.patch", Exit.USAGE,
            )  # fmt: skip
        resolved = place.resolve()
        inside = resolved.is_relative_to(patches)
        name = resolved.relative_to(patches).as_posix() if inside else ""
        path = parse_path(name)
        if path is None:
            raise OverlayError(
                f"{file} is no patch of this overlay",
                f"it is not {patches}/<topic>/<first-tag>.patch",
                "Move it there, and list it in a series",
                Exit.USAGE,
            )
        found.append(path)
    return list(dict.fromkeys(found))


def normalize(
    workspace: Workspace, paths: Sequence[PatchPath], done: Callable[[str], None] = lambda _: None
) -> list[Normalized]:
    """The canonical texts of `paths`, in their order; nothing is written.

    `done` hears of each release that was tried.

    Raises:
        OverlayError: a patch without the headers of a mail, one that its release's series does
            not list, or one that does not apply there.
    """
    git = workspace.store.git
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        trial = Trial(workspace, Path(folder))
        releases = {path: _release(trial, path) for path in paths}
        for path in paths:
            mail = parse_mail(git, trial.read(path), str(path))
            trial.write(path, _as_mail(replace(mail, diff=tidy(mail.diff, str(path)))))
        for release in workspace.versions.patched:
            wanted = [path for path in paths if releases[path] == release]
            if wanted:
                _export(trial, release, wanted)
                done(release.name)
        old = {path: trial.before[str(path)] for path in paths}
        return [
            Normalized(path, old[path], trial.read(path), tuple(_lint(git, trial, path)))
            for path in paths
        ]


def _lint(git: Git, trial: Trial, path: PatchPath) -> Iterable[str]:
    return lint_patch(read_patch(git, trial.folder, path))


def _release(trial: Trial, path: PatchPath) -> Release:
    """The release that a file is named for, whose series must list it."""
    release = trial.workspace.versions.get_patched(path.first_tag)
    if path not in trial.series(release):
        raise OverlayError(
            f"patches/{path} is not in the series of {release.name}",
            "what goes before it is told by the series of the release in its name",
            f"List it in patches/{release.series}, or rename the file",
            Exit.PATCH,
        )
    return release


def _export(trial: Trial, release: Release, wanted: Sequence[PatchPath]) -> None:
    """Replace the texts of `wanted` by what git exports when they are applied to `release`."""
    store = trial.workspace.store
    series = trial.series(release)
    last = max(series.index(path) for path in wanted)
    base = trial.workspace.base(release)
    result = apply_series(store, release, base, trial.folder, series[: last + 1])
    for one in result.require().applied:
        if one.path in wanted:
            trial.write(one.path, export_patch(store.git, one.commit))


def _as_mail(mail: Mail) -> bytes:
    head = f"From: {mail.author} <{mail.email}>\nDate: {mail.date}\nSubject: {mail.subject}"
    return f"{head}\n\n{mail.body.strip(chr(10))}\n\n{mail.diff}".encode()


@dataclass
class _File:
    """One file of a diff, as it is read."""

    path: str = ""
    headers: list[str] = field(default_factory=list)
    old: str = ""
    new: str = ""
    hunks: list[tuple[str, list[str]]] = field(default_factory=list)


def tidy(diff: str, where: str) -> str:
    """`diff` with git's headers and with counts in its @@ lines that are right.

    `where` names the patch in errors. A diff that is right already stays so, but for its index
    lines and the text after @@, which go.

    Raises:
        OverlayError: a line that belongs to no hunk's text.

    >>> diff = "Index: x/a.py\\n===\\n--- x.orig/a.py\\n+++ x/a.py\\n@@ -1,9 +1,9 @@\\n-a\\n+b\\n"
    >>> print(tidy(diff, "it"))
    diff --git a/a.py b/a.py
    --- a/a.py
    +++ b/a.py
    @@ -1,1 +1,1 @@
    -a
    +b
    <BLANKLINE>
    """
    return "".join(_render(file) for file in _files(diff, where))


def _files(diff: str, where: str) -> list[_File]:
    lines = _without_signature(diff.removesuffix("\n").split("\n"))
    files: list[_File] = []
    for number, line in enumerate(lines):
        after = [*lines[number + 1 : number + 3], "", ""]
        current = files[-1] if files else None
        if line.startswith(("diff -", "Index: ")):
            files.append(_File(headers=[line] if line.startswith("diff --git ") else []))
        elif line.startswith("--- ") and after[0].startswith("+++ ") and _HUNK.fullmatch(after[1]):
            if current is None or current.old:
                files.append(current := _File())
            current.old = line[4:].split("\t")[0]
        elif current is None:
            continue  # a diffstat
        elif line.startswith("+++ ") and current.old and not current.new:
            current.new = line[4:].split("\t")[0]
            current.path = _path(current)
        elif _HUNK.fullmatch(line):
            current.hunks.append((line, []))
        elif current.hunks:
            if line and line[0] not in " +-\\":
                raise OverlayError(
                    f"patch {where} is broken",
                    f"{line!r} is no line of a diff: it starts with none of ' ', '+', '-'",
                    "Fix that line",
                    Exit.PATCH,
                )
            current.hunks[-1][1].append(line)
        elif line.startswith(_KEPT):
            current.headers.append(line)
    return [file for file in files if file.hunks or file.headers]


def _without_signature(lines: list[str]) -> list[str]:
    """Less the "-- " and git's version that end a mail."""
    while lines and not lines[-1]:
        lines = lines[:-1]
    signed = len(lines) > 1 and lines[-2] in ("-- ", "--") and _VERSION.fullmatch(lines[-1])
    return lines[:-2] if signed else lines


def _path(file: _File) -> str:
    side = file.old if file.new == "/dev/null" else file.new
    return side.partition("/")[2]


def _render(file: _File) -> str:
    if not file.hunks:  # an empty file made or deleted, or something that is refused later
        return "".join(f"{line}\n" for line in file.headers)
    headers = [line for line in file.headers if not line.startswith("diff --git ")]
    if file.old == "/dev/null" and not any(line.startswith("new file") for line in headers):
        headers.append("new file mode 100644")
    if file.new == "/dev/null" and not any(line.startswith("deleted file") for line in headers):
        headers.append("deleted file mode 100644")
    old = "/dev/null" if file.old == "/dev/null" else f"a/{file.path}"
    new = "/dev/null" if file.new == "/dev/null" else f"b/{file.path}"
    lines = [f"diff --git a/{file.path} b/{file.path}", *headers, f"--- {old}", f"+++ {new}"]
    moved = 0
    for header, body in file.hunks:
        text = _body(header, body)
        removed = sum(line[0] in " -" for line in text)
        added = sum(line[0] in " +" for line in text)
        match = _HUNK.fullmatch(header)
        assert match
        start = 0 if old == "/dev/null" else int(match[1])
        first = max(start - 1, 0) if removed else start
        target = first + moved + (1 if added else 0)
        source = first + 1 if removed else first
        lines += [f"@@ -{source},{removed} +{target},{added} @@", *text]
        moved += added - removed
    return "".join(f"{line}\n" for line in lines)


def _body(header: str, body: Sequence[str]) -> list[str]:
    """A hunk's lines; empty ones are context that lost its space, but for those after its end."""
    match = _HUNK.fullmatch(header)
    assert match
    stated = int(match[2] or 1)
    lines = list(body)
    while lines and not lines[-1] and sum(line[:1] in ("", " ", "-") for line in lines) > stated:
        lines.pop()
    return [line or " " for line in lines]
