"""The report: one HTML page of what matrix/, patches/, VERSIONS.toml and docs/ say.

The page loads nothing, and is a function of those files and the tool's version: no time, no
machine, no path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import get_args

import jinja2
from markupsafe import Markup

from overlay.answers import evidence, grid, later, matrix, runnable
from overlay.answers.basis import BASES
from overlay.answers.grid import Grid, Ran
from overlay.base import document
from overlay.base.errors import Exit, OverlayError
from overlay.patches.patch import Patch, read_patch
from overlay.patches.series import PatchPath, topic_order
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, ranges

#: What is rendered of docs/, in this order: id on the page, file, title in the page's contents.
DOCUMENTS = (
    ("gpu", "gpu-results.md", "GPU results"),
    ("benchmarks", "benchmarks.md", "Benchmarks"),
)
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Count:
    """How many cells of a release come to what, on stock or patched."""

    release: str
    variant: str
    verdicts: Mapping[matrix.Verdict, int]

    @property
    def total(self) -> int:
        """Cells."""
        return sum(self.verdicts.values())


@dataclass(frozen=True)
class Topic:
    """A topic's patch files, and which of them each release has."""

    name: str
    patches: tuple[Patch, ...]
    spans: tuple[tuple[str | None, int], ...]
    """Over the patched releases: first tag of the file, None without one, and how many in a
    row have it."""
    users: dict[str, str]
    """By first tag: the releases whose series list the file, as ranges."""


def render(workspace: Workspace) -> str:
    """The page.

    Raises:
        OverlayError: a matrix, a document, a series or a patch is missing or damaged.
    """
    versions = workspace.versions
    pairs, problems = _matrices(workspace.project.root, versions.patched)
    table = Grid(pairs, ran(workspace.project.root, versions.patched))
    topics = _topics(workspace)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters |= {
        "breakable": _breakable, "reference": _reference, "groupby_look": _groups,
    }  # fmt: skip
    environment.globals["later"] = later
    return environment.get_template("report.html").render(
        style=_inline("report.css"),
        script=_inline("report.js"),
        version=metadata.version("vllm-overlay"),
        versions=versions,
        updated=_updated(topics),
        grid=table,
        looks=grid.LOOKS,
        bases=BASES,
        names_of=grid.names_of,
        counts=_counts(pairs),
        problems=problems,
        known=later.load(workspace.project.root, versions),
        series={one.name: len(workspace.series(one)) for one in versions.patched},
        topics=topics,
        documents=[
            (anchor, title, document.read(workspace.project.root / "docs" / name))
            for anchor, name, title in DOCUMENTS
        ],
    )


def _matrices(
    root: Path, releases: Iterable[Release]
) -> tuple[tuple[grid.Pair, ...], tuple[str, ...]]:
    names = [release.name for release in releases]
    missing = [name for name in names if not all(_has(root, name))]
    if missing:
        raise OverlayError(
            f"no matrix of {', '.join(missing)}",
            f"{root / matrix.FOLDER} lacks RELEASE.stock.json or RELEASE.patched.json",
            f"Make them in a checkout: vllm-overlay matrix {' '.join(missing)} --stock",
            Exit.USAGE,
        )
    judged = [runnable.judge(root, name) for name in names]
    return (
        tuple(pair for pair, _ in judged),
        tuple(problem for _, problems in judged for problem in problems),
    )


def ran(root: Path, releases: Iterable[Release]) -> dict[tuple[str, matrix.Variant], Ran]:
    """What GPUs ran, by release and variant.

    Raises:
        OverlayError: what is kept of them is damaged.
    """
    return {
        (release.name, variant): Ran(
            tuple(run for run in found.runs if run.variant == variant),
            evidence.tree_of(release, variant),
        )
        for release in releases
        for found in (evidence.read(root, release.name),)
        for variant in get_args(matrix.Variant)
    }


def _has(root: Path, release: str) -> Iterable[bool]:
    return (matrix.path_of(root, release, one).is_file() for one in get_args(matrix.Variant))


def _counts(pairs: Iterable[grid.Pair]) -> list[Count]:
    """A line for every release and variant, then one for all releases and each variant."""
    found = [Count(one.release, one.variant, matrix.counts(one)) for pair in pairs for one in pair]
    for variant in get_args(matrix.Variant):
        total: Counter[matrix.Verdict] = Counter()
        for count in found:
            total.update(count.verdicts if count.variant == variant else {})
        found.append(Count("all", variant, total))
    return found


def _topics(workspace: Workspace) -> list[Topic]:
    series = {one.name: workspace.series(one) for one in workspace.versions.patched}
    names = topic_order(series.values())
    return [_topic(workspace, name, series) for name in names]


def _topic(workspace: Workspace, name: str, series: dict[str, tuple[PatchPath, ...]]) -> Topic:
    files = {
        release: next((path for path in paths if path.topic == name), None)
        for release, paths in series.items()
    }
    spans = [(path, [name for name, _ in same]) for path, same in groupby(files.items(), _path)]
    distinct = dict.fromkeys(path for path, _ in spans if path)
    return Topic(
        name,
        tuple(
            read_patch(workspace.store.git, workspace.project.patches, path) for path in distinct
        ),
        tuple((path.first_tag if path else None, len(releases)) for path, releases in spans),
        {
            path.first_tag: ranges([name for name, used in files.items() if used == path], files)
            for path in distinct
        },
    )


def _path(entry: tuple[str, PatchPath | None]) -> PatchPath | None:
    return entry[1]


def _updated(topics: Sequence[Topic]) -> str | None:
    dates = [patch.mail.trailer("Last-Update") for topic in topics for patch in topic.patches]
    return max((date for date in dates if date), default=None)


def _inline(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup((TEMPLATES / name).read_text("utf-8"))


def _groups(verdicts: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Verdicts by what the legend puts them under, in their order."""
    by_group = groupby(verdicts, lambda verdict: grid.LOOKS[verdict].group)
    return [(group, list(found)) for group, found in by_group]


def _breakable(name: str) -> Markup:
    """A name that may go on two lines: 0.8.5|.post1, fp8_|e5m2."""
    return Markup("").join(
        Markup("<wbr>") + part if place else part
        for place, part in enumerate(re.split(r"(?=\.post)|(?<=_)", name))
    )


def _reference(value: str) -> Markup | str:
    """A trailer's value, linked if it is an address: by the number that it ends with."""
    if not value.startswith(("https://", "http://")):
        return value
    number = value.rstrip("/").rpartition("/")[2]
    name = f"#{number}" if number.isdigit() else value
    return Markup('<a href="{}">{}</a>').format(value, name)
