"""Where the hunks of a diff match a file: the same place, another one, several, none.

Git and GNU patch agree on a hunk that matches in one place only. They may differ, and
either may be silently wrong, where it matches in several, so this module says which it
is before git is asked to apply anything. There is no fuzz: every context line counts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from io import StringIO

from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk as ParsedHunk
from unidiff.patch import PatchedFile, PatchSet

from overlay.base.errors import Exit, OverlayError
from overlay.base.paths import is_safe_path

#: Header lines of a git diff that the overlay refuses, and what each is.
_REFUSED = {
    "rename from": "a rename",
    "rename to": "a rename",
    "copy from": "a copy",
    "copy to": "a copy",
    "old mode": "a mode change",
    "new mode": "a mode change",
    "GIT binary patch": "a binary hunk",
    "Binary files": "a binary hunk",
}
_NEW_MODE = re.compile(r"(?:new|deleted) file mode (\d+)")
_DIFF = re.compile(r"diff --git a/(?P<old>.+) b/(?P<new>.+)")


class MatchKind(Enum):
    """What became of one hunk."""

    CLEAN = "clean"
    OFFSET = "offset"
    AMBIGUOUS = "ambiguous"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class HunkMatch:
    """One hunk against one file."""

    path: str
    number: int
    """1-based, in the file's hunks."""
    header: str
    """Its @@ line."""
    kind: MatchKind
    offset: int = 0
    """Lines between where the hunk says and where it matched."""
    line: int = 0
    """1-based line where it matched, or where it was expected."""
    expected: tuple[str, ...] = ()
    """The lines it needs (conflicts only)."""
    found: tuple[str, ...] = ()
    """The lines most like them in the file (conflicts only)."""
    earlier: tuple[str, ...] = ()
    """Which earlier patches touched these lines, and how: a phrase each (conflicts only)."""

    @property
    def is_good(self) -> bool:
        """Whether it matched in one place."""
        return self.kind in (MatchKind.CLEAN, MatchKind.OFFSET)


@dataclass(frozen=True)
class Hunk:
    """The two sides of a hunk, each line with its newline if it has one."""

    header: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    old_start: int
    """0-based line in the old file."""
    new_start: int
    """0-based line in the new file."""
    at_start: bool
    """It claims the first line, so git lets it match there alone."""
    at_end: bool
    """It has no context after its change, so git lets it match at the file's end alone."""

    def reversed(self) -> Hunk:
        """The hunk that takes this one back."""
        return replace(
            self, old=self.new, new=self.old, old_start=self.new_start, new_start=self.old_start
        )

    def places(self, image: Sequence[str]) -> list[int]:
        """0-based lines of `image` where the old side stands and git would accept it."""
        found = find_lines(image, self.old, self.new_start)
        if self.at_start:
            found = [at for at in found if at == 0]
        if self.at_end:
            found = [at for at in found if at + len(self.old) == len(image)]
        return found


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file."""

    path: str
    is_new: bool
    is_deleted: bool
    hunks: tuple[Hunk, ...]
    mode: str = "100644"
    """Of a file that is made or removed, as git writes it."""

    def reversed(self) -> FileDiff:
        """The diff that takes this one back."""
        hunks = tuple(hunk.reversed() for hunk in self.hunks)
        return FileDiff(self.path, self.is_deleted, self.is_new, hunks, self.mode)


def parse_diff(diff: str, where: str) -> tuple[FileDiff, ...]:
    """The files of a git diff; `where` names the patch in errors.

    Raises:
        OverlayError: it is malformed, or does what no patch here may: leave its root,
            rename, copy, change a mode, carry binary or CRLF hunks, touch a file twice.
    """
    _refuse_headers(diff, where)
    try:
        files = tuple(_file_diff(f, where) for f in PatchSet(StringIO(diff, newline="\n")))
    except (UnidiffParseError, ValueError, AttributeError) as error:
        raise _broken(where, f"the diff is malformed: {error}") from error
    paths = [f.path for f in files]
    if not paths:
        raise _broken(where, "there is no diff in it")
    if duplicates := sorted({p for p in paths if paths.count(p) > 1}):
        raise _broken(where, f"it touches {', '.join(duplicates)} twice")
    return files


def _refuse_headers(diff: str, where: str) -> None:
    named = ""  # the file of the diff --git line, up to its first hunk
    for line in diff.split("\n"):
        if line.startswith((" ", "+", "-", "@@", "\\")):
            if line.endswith("\r"):
                raise _broken(where, "it has CRLF lines")
            if line.startswith("@@"):
                named = ""
            # Git goes by these two lines, and the parser by the first.
            side, _, path = line.split("\t")[0].partition(" ")
            wanted = {"---": f"a/{named}", "+++": f"b/{named}"}.get(side, path)
            if named and path not in ("/dev/null", wanted):
                raise _broken(where, f"{path!r} is not {wanted}")
            continue
        for start, what in _REFUSED.items():
            if line.startswith(start):
                raise _broken(where, f"it has {what} ({line.strip()!r})")
        mode = _NEW_MODE.match(line)
        if mode and mode[1] not in ("100644", "100755"):
            raise _broken(where, f"it makes a file of mode {mode[1]}")
        names = _DIFF.fullmatch(line)
        if line.startswith("diff --git") and not (names and names["old"] == names["new"]):
            raise _broken(where, f"its two sides name different files ({line!r})")
        if names:
            named = names["new"]


def _file_diff(parsed: PatchedFile, where: str) -> FileDiff:
    path = str(parsed.path)
    if not is_safe_path(path):
        raise _broken(where, f"the path {path!r} leaves the source tree or is no plain path")
    for side, missing in ((parsed.source_file, "a/"), (parsed.target_file, "b/")):
        if side not in ("/dev/null", missing + path):
            raise _broken(where, f"{side!r} is not {missing}{path}")
    hunks = tuple(_hunk(h) for h in parsed)
    modes = [found[1] for line in parsed.patch_info or () if (found := _NEW_MODE.match(line))]
    is_new, is_deleted = bool(parsed.is_added_file), bool(parsed.is_removed_file)
    return FileDiff(path, is_new, is_deleted, hunks, *modes[:1])


def _hunk(parsed: ParsedHunk) -> Hunk:
    sides: dict[str, list[str]] = {"old": [], "new": []}
    last: tuple[str, ...] = ()
    for line in parsed:
        if line.line_type == "\\":  # "No newline at end of file" speaks of the line before
            for side in last:
                sides[side][-1] = sides[side][-1].removesuffix("\n")
            continue
        last = {" ": ("old", "new"), "-": ("old",), "+": ("new",)}.get(
            line.line_type, ("old", "new")
        )
        for side in last:
            sides[side].append(line.value)
    header = (
        f"@@ -{parsed.source_start},{parsed.source_length}"
        f" +{parsed.target_start},{parsed.target_length} @@"
    )
    return Hunk(
        header,
        tuple(sides["old"]),
        tuple(sides["new"]),
        _zero_based(parsed.source_start, parsed.source_length),
        _zero_based(parsed.target_start, parsed.target_length),
        at_start=parsed.source_start <= 1,
        at_end=not parsed or parsed[-1].line_type in "+-",
    )


def _zero_based(start: int, length: int) -> int:
    # "@@ -12,0": an empty side names the line before it.
    return max(start - 1, 0) if length else start


def to_text(data: bytes | None) -> str | None:
    """A file's bytes as hunks are matched with them; None stays None: no such file."""
    return None if data is None else data.decode("utf-8", "surrogateescape")


def to_bytes(text: str | None) -> bytes | None:
    """`to_text`, taken back."""
    return None if text is None else text.encode("utf-8", "surrogateescape")


def split_lines(text: str) -> list[str]:
    """Lines with their newlines; only \\n ends one, as git sees it."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def apply_hunks(file: FileDiff, before: str | None) -> tuple[str | None, tuple[HunkMatch, ...]]:
    """Apply the hunks of `file` to the text `before` (None: no such file).

    Returns:
        The text after (None: deleted, or some hunk did not match) and one match a hunk.
    """
    if (before is None) != file.is_new:
        return None, (_wrong_existence(file, before),)
    image = split_lines(before or "")
    matches = []
    for number, hunk in enumerate(file.hunks, 1):
        match = _locate(file.path, number, hunk, image)
        matches.append(match)
        if match.is_good:
            at = match.line - 1
            image[at : at + len(hunk.old)] = hunk.new
    matches = _require_unique(file, split_lines(before or ""), matches)
    good = all(match.is_good for match in matches)
    return ("".join(image) if good and not file.is_deleted else None), tuple(matches)


def _wrong_existence(file: FileDiff, before: str | None) -> HunkMatch:
    found = "no such file in this release" if before is None else "the file exists already"
    hunk = file.hunks[0] if file.hunks else None
    return HunkMatch(
        file.path,
        1,
        hunk.header if hunk else "",
        MatchKind.CONFLICT,
        expected=hunk.old if hunk else (),
        found=(found,),
    )


def _locate(path: str, number: int, hunk: Hunk, image: Sequence[str]) -> HunkMatch:
    places = hunk.places(image)
    wanted = hunk.new_start
    if wanted in places:
        return HunkMatch(path, number, hunk.header, MatchKind.CLEAN, 0, wanted + 1)
    if len(places) == 1:
        offset = places[0] - wanted
        return HunkMatch(path, number, hunk.header, MatchKind.OFFSET, offset, places[0] + 1)
    if places:
        lines = tuple(f"line {place + 1}" for place in places)
        return HunkMatch(path, number, hunk.header, MatchKind.AMBIGUOUS, 0, wanted + 1, (), lines)
    near = _nearest(image, hunk.old, wanted)
    return HunkMatch(
        path,
        number,
        hunk.header,
        MatchKind.CONFLICT,
        line=near + 1,
        expected=hunk.old,
        found=tuple(image[near : near + len(hunk.old)]),
    )


def _require_unique(
    file: FileDiff, image: Sequence[str], matches: list[HunkMatch]
) -> list[HunkMatch]:
    """Once one hunk of a file has moved, each must match in one place only.

    GNU patch carries an offset on to the next hunk and git does not, so a hunk that also
    matches elsewhere could land in different places.
    """
    if not any(m.kind is MatchKind.OFFSET for m in matches):
        return matches
    checked = []
    for hunk, match in zip(file.hunks, matches, strict=True):
        places = hunk.places(image)
        if match.kind is MatchKind.CLEAN and len(places) > 1:
            lines = tuple(f"line {place + 1}" for place in places)
            match = HunkMatch(
                file.path, match.number, match.header, MatchKind.AMBIGUOUS, 0, match.line, (), lines
            )
        checked.append(match)
    return checked


def find_lines(image: Sequence[str], wanted: Sequence[str], empty_at: int) -> list[int]:
    """0-based places where the run `wanted` stands in `image`.

    An empty run (a hunk with no context) stands at `empty_at` alone.
    """
    if not wanted:
        return [empty_at] if empty_at <= len(image) else []
    size, first = len(wanted), wanted[0]
    run = list(wanted)
    return [
        at for at, line in enumerate(image) if line == first and list(image[at : at + size]) == run
    ]


def _nearest(image: Sequence[str], wanted: Sequence[str], around: int) -> int:
    """The place where `image` is most like `wanted`; the closest to `around` on a tie."""
    size = max(len(wanted), 1)
    lines = set(wanted)

    def score(at: int) -> tuple[int, int]:
        window = image[at : at + size]
        return sum(line in lines and bool(line.strip()) for line in window), -abs(at - around)

    starts = range(max(len(image) - size + 1, 1))
    best = sorted(starts, key=score, reverse=True)[:5]
    matcher = difflib.SequenceMatcher(b=list(wanted), autojunk=False)

    def ratio(at: int) -> float:
        matcher.set_seq1(list(image[at : at + size]))
        return matcher.ratio()

    return max(best, key=ratio)


def is_applied(files: Sequence[FileDiff], texts: dict[str, str | None]) -> bool:
    """Whether the reverse of every hunk matches: the change is there already."""
    for file in files:
        _, matches = apply_hunks(file.reversed(), texts[file.path])
        if not all(match.is_good for match in matches):
            return False
    return True


def _broken(where: str, why: str) -> OverlayError:
    return OverlayError(
        f"patch {where} is broken",
        why,
        "Export it again with git format-patch, or try 'vllm-overlay normalize'",
        Exit.PATCH,
    )


def describe_mismatch(match: HunkMatch) -> str:
    """One hunk that did not match, for people: which, the lines expected and found, and whose."""
    return "; ".join((_mismatch(match), *match.earlier))


def _mismatch(match: HunkMatch) -> str:
    place = f"{match.path} hunk {match.number} ({match.header})"
    if match.kind is MatchKind.AMBIGUOUS:
        return f"{place} matches in several places: {', '.join(match.found)}"
    if not match.line:  # the file is missing, or there where it should not be
        return f"{match.path}: {', '.join(match.found)}"
    width = max(len(match.expected), len(match.found))
    rows = zip(
        [*match.expected, *[""] * width], [*match.found, *[""] * width], range(width), strict=False
    )
    differing = [(e.rstrip("\n"), f.rstrip("\n"), n) for e, f, n in rows if e != f]
    if not differing:
        return f"{place} does not match"
    expected, found, number = differing[0]
    more = f" ({len(differing)} lines differ)" if len(differing) > 1 else ""
    return f"{place} expects {expected!r} and finds {found!r} at line {match.line + number}{more}"
