"""A patch file: a mail as `git format-patch` writes it, with DEP-3 fields as trailers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.version import InvalidVersion, Version

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git, GitError
from overlay.patches.hunks import FileDiff, parse_diff
from overlay.patches.series import PatchPath

#: How canonical text is exported; read back with `git am --keep-non-patch`.
FORMAT_PATCH = (
    "format-patch",
    "--stdout",
    "--zero-commit",
    "--no-signature",
    "--full-index",
    "--no-stat",
    "--keep-subject",
)

_URL = r"https?://[^\s,]+"
_TAG = r"v[0-9][0-9a-z.]*"
_PERSON = r"[^<>]+ <[^<>@\s]+@[^<>\s]+>"
#: Trailers that say when a patch is to go; every patch needs one of them. The first is DEP-3's:
#: upstream fixed the same fault in that release. The other names a release in which the fault is
#: no more for another reason, or the pull request or issue that will tell.
REMOVAL_TRAILERS = ("Applied-Upstream", "Remove-When")
#: Trailers every patch needs, and the form of each.
REQUIRED_TRAILERS: Mapping[str, str] = {
    "Origin": r"(upstream|backport|vendor|other)(, .+)?",
    "Bug": _URL,
    "Forwarded": rf"no \(.+\)|not-needed \(.+\)|{_URL}",
    "Last-Update": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "Signed-off-by": _PERSON,
}
#: Trailers a patch may have.
OPTIONAL_TRAILERS: Mapping[str, str] = {
    "Applied-Upstream": rf"{_TAG}, {_URL}",
    "Remove-When": rf"{_TAG} \(.+\)|{_URL}/(pull|issues)/\d+",
    "Co-authored-by": _PERSON,
    "Reviewed-by": _PERSON,
}
_TRAILER = re.compile(r"(?P<key>[A-Z][A-Za-z-]*): (?P<value>.*)")
_SUBJECT = re.compile(r"(\[[A-Za-z0-9/ ._-]+\])+ \S.*")
#: Characters of a header.
_MAX_FIELD = 1000
_MAIL_START = re.compile(rb"From [0-9a-f]{40} Mon Sep 17 00:00:00 2001\n")


@dataclass(frozen=True)
class Removal:
    """When a patch is to go."""

    trailer: str
    """One of `REMOVAL_TRAILERS`."""
    value: str

    def __str__(self) -> str:
        """The trailer's line."""
        return f"{self.trailer}: {self.value}"

    @property
    def release(self) -> Version | None:
        """The first release that does without it; None: that of a pull request or issue to come."""
        found = re.match(rf"({_TAG})(?:, | \()", self.value)
        try:
            return Version(found[1]) if found else None
        except InvalidVersion:
            return None

    @property
    def reference(self) -> str:
        """The pull request or issue; empty if there is none."""
        found = re.search(_URL, self.value)
        return found[0] if found else ""

    def is_met(self, release: Version) -> bool:
        """Whether `release` does without the patch."""
        return self.release is not None and self.release <= release


@dataclass(frozen=True)
class Mail:
    """What git reads out of a patch's mail header and body."""

    author: str
    email: str
    date: str
    """As in the header, RFC 2822."""
    subject: str
    body: str
    """The message after the subject, trailers included."""
    diff: str

    @property
    def message(self) -> str:
        """The commit message."""
        body = self.body.strip("\n")
        return f"{self.subject}\n\n{body}\n" if body else f"{self.subject}\n"

    @cached_property
    def trailers(self) -> tuple[tuple[str, str], ...]:
        """The `Key: value` lines of the last paragraph; empty if it holds anything else."""
        last = self.body.strip("\n").rpartition("\n\n")[2].split("\n")
        found = [_TRAILER.fullmatch(line) for line in last]
        return tuple((m["key"], m["value"].strip()) for m in found if m) if all(found) else ()

    def trailer(self, key: str) -> str | None:
        """The value of the first trailer called `key`."""
        return next((value for name, value in self.trailers if name == key), None)

    @property
    def removal(self) -> Removal | None:
        """When the patch is to go, as its trailers have it."""
        found = ((key, self.trailer(key)) for key in REMOVAL_TRAILERS)
        return next((Removal(key, value) for key, value in found if value), None)


@dataclass(frozen=True)
class Patch:
    """One patch file, read."""

    path: PatchPath
    data: bytes
    mail: Mail
    files: tuple[FileDiff, ...]


def read_patch(
    git: Git | None, patches: Path, path: PatchPath, known: dict[PatchPath, Patch] | None = None
) -> Patch:
    """Read and parse one patch; `known` are patches that were parsed already, and it is added.

    Without `git` it must be in canonical form, as `validate` has it.

    Raises:
        OverlayError: missing, unreadable, not a mail with one diff, or a diff refused by
            `hunks.parse_diff`.
    """
    data = read_data(patches, path)
    known = {} if known is None else known
    patch = known.get(path)
    if patch is None or patch.data != data:
        mail = parse_mail(git, data, str(path)) if git else parse_canonical(data, str(path))
        patch = known[path] = Patch(path, data, mail, parse_diff(mail.diff, str(path)))
    return patch


def read_data(patches: Path, path: PatchPath) -> bytes:
    """The bytes of one patch.

    Raises:
        OverlayError: missing or unreadable.
    """
    try:
        return plain_file.read(path.under(patches))
    except OSError as error:
        raise OverlayError(
            f"cannot read the patch {path}",
            error.strerror or str(error),
            "Restore it from git, or take its line out of the series",
            Exit.PATCH,
        ) from error


def parse_mail(git: Git, data: bytes, where: str) -> Mail:
    """Split a patch mail with git's own mailinfo; `where` names it in errors.

    Raises:
        OverlayError: not UTF-8, or no author, subject or date in it.
        OSError: there is no room for temporary files.
        GitError: likewise.
    """
    if not data:
        raise _no_mail(where, "it is empty")
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        message, diff = Path(folder, "message"), Path(folder, "diff")
        # On a full disk mailinfo writes what fits, and exits 0: a lack of room is told here.
        message.write_bytes(data)
        diff.write_bytes(data)
        try:
            out = git.run(
                "mailinfo", "-b", "--encoding=UTF-8", "--no-scissors", str(message), str(diff),
                stdin=data,
            )  # fmt: skip
            info = dict(_info_lines(out.decode()))
            fields = [info.get(key, "") for key in ("Author", "Email", "Date", "Subject")]
            body, text = message.read_bytes().decode(), diff.read_bytes().decode()
        except GitError as error:
            if error.is_machine:
                raise
            raise _no_mail(where, error.stderr.strip()) from error
        except UnicodeDecodeError as error:
            raise _no_mail(where, f"it is not UTF-8 ({error.reason})") from error
    _require_fields(fields, where)
    author, email, date, subject = fields
    return Mail(author, email, date, subject, body, text)


def parse_canonical(data: bytes, where: str) -> Mail:
    """The same as `parse_mail` of a patch in canonical form, where there is no git to ask.

    Raises:
        OverlayError: it is not in canonical form.
    """
    # Commands that read no patch do without.
    from email import message_from_string, policy

    if not data:
        raise _no_mail(where, "it is empty")
    try:
        header, _, rest = data.decode().partition("\n\n")
        found = message_from_string(header, policy=policy.default)
        (sender,) = found["From"].addresses
        fields = [sender.display_name, sender.addr_spec, found["Date"], found["Subject"]]
    except UnicodeDecodeError as error:
        raise _no_mail(where, f"it is not UTF-8 ({error.reason})") from error
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise _no_mail(where, "its header can't be read") from error
    fields = [str(field or "") for field in fields]
    _require_fields(fields, where)
    body, start, diff = f"\n{rest}".partition("\ndiff --git ")
    author, address, date, subject = fields
    return Mail(author, address, date, subject, body.strip("\n") + "\n\n", start[1:] + diff)


def _require_fields(fields: Sequence[str], where: str) -> None:
    """Raise unless author, email, date and subject are there, and fit for git."""
    for name, value in zip(("From", "From", "Date", "Subject"), fields, strict=True):
        if not value:
            raise _no_mail(where, f"there is no {name}: header in it")
        # They go to git in its environment, which takes neither.
        if not value.isprintable() or len(value) > _MAX_FIELD:
            raise _no_mail(where, f"its {name}: header is no plain line of text")


def _info_lines(out: str) -> Iterator[tuple[str, str]]:
    for line in out.split("\n"):
        key, colon, value = line.partition(": ")
        if colon:
            yield key, value


def _no_mail(where: str, why: str) -> OverlayError:
    return OverlayError(
        f"patch {where} is no git mail", why, "Export it with git format-patch", Exit.PATCH
    )


def lint_patch(patch: Patch) -> list[str]:
    """What is wrong with a patch's header, a phrase each; empty if nothing is."""
    mail = patch.mail
    problems = []
    if not _MAIL_START.match(patch.data):
        problems.append("it does not start with format-patch's From line")
    if not _SUBJECT.fullmatch(mail.subject):
        problems.append(f"the subject {mail.subject!r} has no upstream prefix such as [Bugfix]")
    if not mail.trailers:
        return [*problems, "there are no trailers at the end of the message"]
    if not mail.body.strip("\n").rpartition("\n\n")[0].strip():
        problems.append("there is no justification between the subject and the trailers")
    return problems + list(_lint_trailers(mail.trailers))


def _lint_trailers(trailers: tuple[tuple[str, str], ...]) -> Iterator[str]:
    forms = {**REQUIRED_TRAILERS, **OPTIONAL_TRAILERS}
    for key, value in trailers:
        if key not in forms:
            yield f"unknown trailer {key}"
        elif not re.fullmatch(forms[key], value):
            yield f"trailer {key}: {value!r} is not of the form {forms[key]}"
    present = {key for key, _ in trailers}
    told = [key for key in REMOVAL_TRAILERS if key in present]
    if not told:
        yield f"no condition for its removal: trailer {' or '.join(REMOVAL_TRAILERS)}"
    elif len(told) > 1:
        yield f"{' and '.join(told)} are two conditions for its removal"
    for key in REQUIRED_TRAILERS:
        if key not in present:
            yield f"no trailer {key}"


def export_patch(git: Git, commit: str) -> bytes:
    """The canonical text of a commit."""
    return git.run(*FORMAT_PATCH, "-1", commit)


def content_of(mail: Mail) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Header and diff without what depends on the tree around: line numbers and blob ids."""
    lines = [
        "@@" if line.startswith("@@ ") else line
        for line in mail.diff.split("\n")
        if not line.startswith("index ")
    ]
    return (mail.author, mail.email, mail.date, mail.message), tuple(lines)


def with_date(text: bytes, date: str) -> bytes:
    """A patch's text with `date` (YYYY-MM-DD) in its Last-Update trailer."""
    header, start, diff = text.partition(b"\ndiff --git ")
    found = list(re.finditer(rb"^Last-Update: .*$", header, re.MULTILINE))
    if not found:
        return text  # lint_patch tells
    before, after = header[: found[-1].start()], header[found[-1].end() :]
    return before + f"Last-Update: {date}".encode() + after + start + diff
