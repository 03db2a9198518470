"""Quilt series files and the patch paths they list.

The syntax is the part of quilt's that git-based tools agree on: one path a line,
relative to patches/; blank lines; comments on lines of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError

_TOPIC = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_TAG = re.compile(r"[0-9]+(\.[0-9]+)*(\.post[0-9]+)?")


class SeriesError(OverlayError):
    """A series file that can't be read, or a line of one."""


@dataclass(frozen=True, order=True)
class PatchPath:
    """A patch's place under patches/: `<topic>/<first-tag>.patch`.

    The topic is the patch's identity. Its text is the one valid from `first_tag` on.
    """

    topic: str
    first_tag: str

    def __str__(self) -> str:
        """Posix path relative to patches/."""
        return f"{self.topic}/{self.first_tag}.patch"

    def under(self, patches: Path) -> Path:
        """The file in the folder `patches`."""
        return patches / self.topic / f"{self.first_tag}.patch"


def is_topic(name: str) -> bool:
    """Whether `name` can be a topic's."""
    return _TOPIC.fullmatch(name) is not None


def parse_path(text: str) -> PatchPath | None:
    """The patch path that `text` spells, or None if it is not of the overlay's form.

    >>> parse_path("llama4-sampler/0.8.3.patch")
    PatchPath(topic='llama4-sampler', first_tag='0.8.3')
    >>> parse_path("../0.8.3.patch") is None
    True
    """
    topic, slash, name = text.partition("/")
    tag = name.removesuffix(".patch")
    if not slash or tag == name or not is_topic(topic) or not _TAG.fullmatch(tag):
        return None
    return PatchPath(topic, tag)


def parse(text: str, where: str) -> tuple[PatchPath, ...]:
    """The patches that a series lists, in order; `where` names it in errors.

    Raises:
        OverlayError: a line of another form, or a patch or a topic listed twice.
    """
    paths: list[PatchPath] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        path = parse_path(line)
        if path is None:
            raise _bad_line(where, number, f"{line!r} is not <topic>/<first-tag>.patch")
        if path.topic in {p.topic for p in paths}:
            raise _bad_line(where, number, f"topic {path.topic} is listed twice")
        paths.append(path)
    return tuple(paths)


def rewrite_series(text: str, paths: Sequence[PatchPath]) -> str:
    """The series `text` with `paths` for its patches.

    Comments stay above the patch that they were above; the first ones stay on top, and those of
    a patch that is gone go to the end.

    >>> new = PatchPath("b", "1.1")
    >>> rewrite_series("# All.\\na/1.0.patch\\n# Of b.\\nb/1.0.patch\\n", [new])
    '# All.\\n# Of b.\\nb/1.1.patch\\n'
    """
    lines: list[str] = []
    above: dict[str, list[str]] = {}
    pending: list[str] = []
    for line in text.removesuffix("\n").split("\n") if text else []:
        path = parse_path(line)
        if path is None:
            pending.append(line)
            continue
        if not above:
            lines, pending = pending, []
        above[path.topic], pending = pending, []
    for path in paths:
        lines += [*above.pop(path.topic, []), str(path)]
    lines += [line for left in above.values() for line in left] + pending
    return "".join(f"{line}\n" for line in lines)


def _bad_line(where: str, number: int, why: str) -> SeriesError:
    return SeriesError(
        f"{where} line {number}",
        why,
        "Write one path a line, relative to patches/, with no -p option, no '..', "
        "no spaces and comments on their own lines",
        Exit.PATCH,
    )


def read_series(patches: Path, series: str) -> tuple[PatchPath, ...]:
    """The patches of the series file `series` (relative to `patches`).

    Raises:
        OverlayError: no such file, or one that `parse` refuses.
    """
    file = patches / series
    try:
        text = plain_file.read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SeriesError(
            f"cannot read the series {file}",
            getattr(error, "strerror", None) or str(error),
            "Restore it from git or fix its name in VERSIONS.toml",
            Exit.PATCH,
        ) from error
    return parse(text, series)


def topic_order(series: Iterable[Sequence[PatchPath]]) -> list[str]:
    """The topics of several series, oldest release first: each after what its first one lists
    before it."""
    names: list[str] = []
    for paths in series:
        place = 0
        for path in paths:
            if path.topic in names:
                place = names.index(path.topic) + 1
            else:
                names.insert(place, path.topic)
                place += 1
    return names


def patch_files(patches: Path) -> Iterator[Path]:
    """Every file under `patches` that is no series file, relative to it, sorted."""
    for file in sorted(patches.rglob("*")):
        relative = file.relative_to(patches)
        if file.is_file() and relative.parts[0] != "series":
            yield relative
