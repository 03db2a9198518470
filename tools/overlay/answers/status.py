"""The state of the overlay: what each patch is on each release, and what the tests last said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from io import StringIO
from pathlib import Path

from unidiff.patch import PatchSet

from overlay.base.console import counted
from overlay.patches.patch import Patch, read_patch
from overlay.patches.series import PatchPath, topic_order
from overlay.patches.tree import Applied
from overlay.patches.validate import WORKERS
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing import results
from overlay.testing.results import Record


@dataclass(frozen=True)
class Cell:
    """One topic on one release."""

    path: PatchPath
    state: str
    """clean, offset, conflict, upstreamed, …"""
    offsets: tuple[int, ...]
    """Lines by which its hunks moved, of those that did."""
    subject: str
    forwarded: str
    """Its Forwarded trailer; empty where the patch can't be read."""
    updated: date | None
    """Its Last-Update trailer."""

    @property
    def word(self) -> str:
        """The state, with the widest offset."""
        return self.state + (f" {max(self.offsets, key=abs):+d}" if self.offsets else "")

    def age(self, today: date) -> int | None:
        """Days since its last update."""
        return None if self.updated is None else (today - self.updated).days


@dataclass(frozen=True)
class Row:
    """One release."""

    release: Release
    cells: tuple[Cell, ...]
    tree: str
    """as locked, differs, or — where the series does not apply."""
    tests: Mapping[str, Record]
    """The last record of each suite."""

    def verdict(self, suite: str) -> str:
        """What a suite said last, in a few words; "—" if it was not run here."""
        record = self.tests.get(suite)
        if record is None:
            return "—"
        problems = len(record.verdict.problems)
        said = counted(problems, "problem") if problems else "ok"
        return said if record.is_of(self.release) else f"{said}, outdated"


def collect(
    workspace: Workspace,
    releases: Sequence[Release],
    work: Path,
    done: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """The rows of `releases`; `done` hears of each as it ends, `work` has the suites' folders.

    Raises:
        OverlayError: an sdist is unavailable, or a series or a record can't be read.
    """
    _ = workspace.store  # made once, before the threads need it

    def row(release: Release) -> Row:
        result = workspace.apply(release)
        done(release.name)
        tree = "as locked" if result.tree == (release.tree or release.upstream_tree) else "differs"
        return Row(
            release,
            tuple(_cell(one) for one in result.applied),
            "—" if result.error else tree,
            results.load(work, release.name),
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(row, releases))


def _cell(applied: Applied) -> Cell:
    mail = applied.patch.mail if applied.patch else None
    return Cell(
        applied.path,
        applied.status.value,
        applied.offsets,
        mail.subject if mail else "",
        (mail.trailer("Forwarded") if mail else None) or "",
        _date(mail.trailer("Last-Update") if mail else None),
    )


def _date(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        return None


@dataclass(frozen=True)
class PatchUse:
    """One patch file and what it is on the releases that list it."""

    path: PatchPath
    cells: Mapping[str, Cell]
    """By release."""

    @property
    def any_cell(self) -> Cell:
        """A cell in which the patch was read, if there is one."""
        return next((c for c in self.cells.values() if c.subject), next(iter(self.cells.values())))

    @property
    def state(self) -> str:
        """What it is where it is not clean, with the widest offset; clean if it is everywhere."""
        words = dict.fromkeys(c.state for c in self.cells.values() if c.state != "clean")
        offsets = [offset for c in self.cells.values() for offset in c.offsets]
        widest = f" to {max(offsets, key=abs):+d}" if offsets else ""
        found = [word + (widest if word == "offset" else "") for word in words]
        return ", ".join(found) or "clean"


def by_file(rows: Sequence[Row]) -> list[PatchUse]:
    """The patch files of `rows`, topics in the order of the series."""
    found: dict[PatchPath, dict[str, Cell]] = {}
    for row in rows:
        for cell in row.cells:
            found.setdefault(cell.path, {})[row.release.name] = cell
    order = topic_order([cell.path for cell in row.cells] for row in rows)
    return [
        PatchUse(path, cells)
        for topic in order
        for path, cells in found.items()
        if path.topic == topic
    ]


@dataclass(frozen=True)
class File:
    """One of a topic's patch files."""

    patch: Patch
    releases: tuple[str, ...]
    """Those whose series list it."""


def stat(patch: Patch) -> dict[str, tuple[int, int]]:
    """Lines that a patch adds and removes, by path."""
    files = PatchSet(StringIO(patch.mail.diff, newline="\n"))
    return {file.path: (file.added, file.removed) for file in files}


def topic_files(workspace: Workspace, topic: str) -> list[File]:
    """The patch files of a topic, oldest first.

    Raises:
        OverlayError: no series lists the topic, or a patch can't be read.
    """
    workspace.require_topic(topic)
    used: dict[PatchPath, list[str]] = {}
    for release in workspace.versions.patched:
        for path in workspace.series(release):
            if path.topic == topic:
                used.setdefault(path, []).append(release.name)
    read = read_patch
    return [
        File(read(workspace.store.git, workspace.project.patches, path), tuple(names))
        for path, names in used.items()
    ]


def file_json(file: File) -> dict[str, object]:
    """A topic's file as `show --json` prints it."""
    mail = file.patch.mail
    return {
        "file": f"patches/{file.patch.path}",
        "releases": file.releases,
        "author": f"{mail.author} <{mail.email}>",
        "date": mail.date,
        "subject": mail.subject,
        "body": mail.body.strip("\n"),
        "trailers": [{"key": key, "value": value} for key, value in mail.trailers],
        "files": stat(file.patch),
    }


def suites(rows: Iterable[Row]) -> list[str]:
    """The suites that were run here, regress always among them."""
    return list(dict.fromkeys(["regress", *(suite for row in rows for suite in row.tests)]))


def short(forwarded: str) -> str:
    """A Forwarded trailer in a word: the number of a pull request, or no reason beside a no.

    >>> short("https://github.com/vllm-project/vllm/pull/16212")
    '#16212'
    >>> short("not-needed (upstream removed the V0 engine in v0.11.0)")
    'not-needed'
    """
    number = forwarded.rstrip("/").rpartition("/")[2]
    return f"#{number}" if number.isdigit() else forwarded.partition(" ")[0]


def as_json(rows: Iterable[Row], today: date) -> dict[str, object]:
    """What `status --json` prints, by release."""
    return {
        row.release.name: {
            "tree": row.tree,
            "patches": [
                {
                    "topic": cell.path.topic,
                    "file": f"patches/{cell.path}",
                    "state": cell.state,
                    "offsets": cell.offsets,
                    "subject": cell.subject,
                    "forwarded": cell.forwarded or None,
                    "last_update": cell.updated.isoformat() if cell.updated else None,
                    "age_days": cell.age(today),
                }
                for cell in row.cells
            ],
            "tests": {
                suite: {
                    "date": record.date.isoformat(),
                    "current": record.is_of(row.release),
                    "fail_to_pass": len(record.verdict.fail_to_pass),
                    "pass_to_pass": len(record.verdict.pass_to_pass),
                    "skipped": len(record.verdict.skipped),
                    "problems": len(record.verdict.problems),
                }
                for suite, record in row.tests.items()
            },
        }
        for row in rows
    }


def markdown(rows: Sequence[Row], today: date) -> str:
    """Two tables: a topic a line with a column a release, and the releases."""
    names = [row.release.name for row in rows]
    lines = [_line(["topic", "forwarded", "age", *names]), _line(["---"] * (3 + len(names)))]
    uses = by_file(rows)
    for topic in dict.fromkeys(use.path.topic for use in uses):
        cells = {name: cell for use in uses if use.path.topic == topic
                 for name, cell in use.cells.items()}  # fmt: skip
        forwarded = dict.fromkeys(_link(cell.forwarded) for cell in cells.values())
        ages = sorted({age for cell in cells.values() if (age := cell.age(today)) is not None})
        lines.append(
            _line(
                [
                    topic,
                    ", ".join(forwarded),
                    f"{'–'.join(str(age) for age in dict.fromkeys((ages[0], ages[-1])))} d"
                    if ages
                    else "—",
                    *(_word(cells.get(name)) for name in names),
                ]
            )
        )
    shown = suites(rows)
    head = ["release", "patches", "tree", *shown]
    lines += ["", _line(head), _line(["---"] * len(head))]
    for row in rows:
        said = (_said(row, suite) for suite in shown)
        lines.append(_line([row.release.name, str(len(row.cells)), row.tree, *said]))
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _word(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return cell.path.first_tag + ("" if cell.word == "clean" else f", {cell.word}")


def _link(forwarded: str) -> str:
    name = short(forwarded)
    return name if name == forwarded else f"[{name}]({forwarded})"


def _said(row: Row, suite: str) -> str:
    record = row.tests.get(suite)
    return row.verdict(suite) + (f" ({record.date:%Y-%m-%d})" if record else "")
