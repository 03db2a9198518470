"""Title and body of a pull request, in the template of the tree that it is for.

Upstream's template is read from that tree, and filled in by its headings. One without headings
(0.8.3 to 0.9.0) gets the same sections in place of its call for a description.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from overlay.base.errors import Exit, OverlayError
from overlay.patches.patch import Mail
from overlay.patches.tree import Store
from overlay.releases.versions import Release
from overlay.testing.results import Record, command_of

TEMPLATE = ".github/PULL_REQUEST_TEMPLATE.md"
#: Suites whose results a pull request states.
SUITES = ("regress", "upstream")
#: Title of a branch with all topics.
TITLE = "[Bugfix] Chunked local attention for Llama 4 on every engine and backend"

_PREFIX = re.compile(r"\[[^]]+\]")
_HEADING = re.compile(r"^## (?P<name>.+)$", re.MULTILINE)
#: Lines of a template that speak to who fills it in.
_INSTRUCTION = re.compile(r"^(PLEASE )?FILL IN .*(HERE|CONSIDERED)\b.*\n+", re.MULTILINE)
_FIX = re.compile(r"^FIX #xxxx.*$", re.MULTILINE)
_BOX = re.compile(r"^- \[ \] (?=The )", re.MULTILINE)
_LIST = re.compile(r"\s*([-*+]|\d+\.|>|\|)\s|\s{4}|```|\t")


@dataclass(frozen=True)
class Change:
    """A commit of the branch, as the pull request tells of it."""

    mail: Mail
    """Of the patch."""
    tests: tuple[str, ...]
    """Tests that it adds or changes."""


@dataclass(frozen=True)
class Evidence:
    """What is known of tests and linters."""

    records: Mapping[str, Record]
    """By suite; empty: not run."""
    lint: str
    """What upstream's linters said, a sentence."""


def template(store: Store, commit: str) -> str:
    """The pull request template of a tree; one of ours if it has none."""
    found = store.show(commit, TEMPLATE)
    if found is not None:
        return found.decode("utf-8", "replace")
    return files("overlay.staging").joinpath("templates/pull_request.md").read_text("utf-8")


def require_results(release: Release, records: Mapping[str, Record]) -> Mapping[str, Record]:
    """The records of `SUITES`, all of the series as it is now.

    Raises:
        OverlayError: one is missing or of another tree.
    """
    for suite in SUITES:
        record = records.get(suite)
        if record is None or not record.is_of(release):
            why = (
                "it was never run, or its result is not in the work folder"
                if record is None
                else f"its result is of tree {record.tree[:12]}, and the series makes "
                f"{(release.tree or release.upstream_tree)[:12]}"
            )
            raise OverlayError(
                f"{release.name}: no result of {suite} to put into the pull request", why,
                f"Run 'vllm-overlay {command_of(suite, release.name)}', or pass --without-results "
                "to say that it was not run", Exit.UNAVAILABLE,
            )  # fmt: skip
    return {suite: records[suite] for suite in SUITES}


def title(subjects: Sequence[str]) -> str:
    """One title of some commits' subjects, with all their prefixes.

    >>> title(["[Bugfix] Fix this", "[Bugfix][Core] Fix that"])
    '[Bugfix][Core] Fix this; Fix that'
    """
    prefixes = [part for subject in subjects for part in _PREFIX.findall(_prefix(subject))]
    plain = [subject.removeprefix(_prefix(subject)).strip() for subject in subjects]
    return f"{''.join(dict.fromkeys(prefixes))} {'; '.join(plain)}".strip()


def _prefix(subject: str) -> str:
    found = re.match(rf"({_PREFIX.pattern})*", subject)
    return found[0] if found else ""


def body(text: str, changes: Sequence[Change], evidence: Evidence, repository: str) -> str:
    """The template `text`, filled in. `repository` is upstream's URL."""
    fix = _fixes(changes, repository)
    sections = {
        "Purpose": "\n\n".join(part for part in (purpose(changes), fix) if part),
        "Test Plan": test_plan(changes, evidence),
        "Test Result": test_result(evidence),
        "(Optional) Documentation Update": "None.",
    }
    text = _INSTRUCTION.sub("", text)
    names = [found["name"].strip() for found in _HEADING.finditer(text)]
    if "Purpose" in names:
        filled = _HEADING.sub(lambda found: _fill(found, sections), text)
    else:
        sections["Purpose"] = purpose(changes)
        told = "\n\n".join(
            f"## {name}\n\n{sections[name]}" for name in ("Purpose", "Test Plan", "Test Result")
        )
        rest = _FIX.sub(lambda _: fix, text)
        filled = f"{told}\n\n{rest.lstrip()}"
    if evidence.records:
        filled = _BOX.sub("- [x] ", filled)
    else:  # the boxes of plan and results stay empty
        filled = re.sub(r"^- \[ \] (?=The purpose)", "- [x] ", filled, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"


def _fill(found: re.Match[str], sections: Mapping[str, str]) -> str:
    text = sections.get(found["name"].strip())
    return f"{found[0]}\n\n{text}\n" if text else found[0]


def purpose(changes: Sequence[Change]) -> str:
    """What the commits are for: their messages, unwrapped."""
    if len(changes) == 1:
        return unwrap(_prose(changes[0].mail))
    parts = ["One commit a change, in the order in which they build on one another:"]
    for number, change in enumerate(changes, 1):
        parts.append(f"### {number}. {change.mail.subject}\n\n{unwrap(_prose(change.mail))}")
    return "\n\n".join(parts)


def _prose(mail: Mail) -> str:
    return mail.body.strip("\n").rpartition("\n\n")[0]


def unwrap(text: str) -> str:
    """Each paragraph in one line: GitHub breaks lines where a pull request's body has a newline.

    >>> unwrap("One\\ntwo.\\n\\n- a\\n- b")
    'One two.\\n\\n- a\\n- b'
    """
    paragraphs = (part.split("\n") for part in text.strip("\n").split("\n\n"))
    return "\n\n".join(
        "\n".join(lines) if any(_LIST.match(line) for line in lines) else " ".join(lines)
        for lines in paragraphs
    )


def _fixes(changes: Sequence[Change], repository: str) -> str:
    """`FIX #n` for upstream's issues, which closes them on merge, and a mention of other bugs.

    An issue that upstream has fixed in its own way is closed already: it is mentioned, with what
    fixed it.
    """
    lines: dict[str, set[str]] = {}
    for change in changes:
        if bug := change.mail.trailer("Bug"):
            fixed = change.mail.trailer("Applied-Upstream")
            is_issue = bug.startswith(f"{repository}/issues/")
            word = "FIX" if is_issue and not fixed else "Related to"
            notes = lines.setdefault(f"{word} {_short(bug, repository)}", set())
            if fixed and is_issue:
                tag, _, url = fixed.partition(", ")
                notes.add(f"{_short(url, repository)} in {tag}")
    return "\n".join(
        line + (f" (upstream's own change: {', '.join(sorted(notes))})" if notes else "")
        for line, notes in sorted(lines.items())
    )


def _short(url: str, repository: str) -> str:
    """`#n` for an issue or pull request of upstream's; else the URL."""
    kind, _, number = url.removeprefix(f"{repository}/").partition("/")
    return f"#{number}" if kind in ("issues", "pull") and number.isdigit() else url


def test_plan(changes: Sequence[Change], evidence: Evidence) -> str:
    """The commands that were run."""
    tests = sorted({test for change in changes for test in change.tests})
    parts = []
    if tests:
        listed = " \\\n  ".join(tests)
        parts.append(f"Tests that this adds or changes:\n\n```sh\npytest {listed}\n```")
    if evidence.records:
        commands = "\n".join(record.command for record in evidence.records.values())
        parts.append(
            "Each suite was run on the release's official wheel, and on that wheel with the "
            "whole series of changes in it, with the commands of the patch overlay that these "
            f"changes come from:\n\n```sh\n{commands}\n```"
        )
    return "\n\n".join(parts) or "No tests are added or changed."


def test_result(evidence: Evidence) -> str:
    """What the runs found, before and after."""
    if not evidence.records:
        return f"Not run.\n\n{evidence.lint}"
    rows = [
        "| Suite | fails before, passes after | passes on both | passes on neither | problems |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for suite, record in evidence.records.items():
        found = record.verdict
        counts = (found.fail_to_pass, found.pass_to_pass, found.skipped, found.problems)
        rows.append(f"| {suite} | {' | '.join(str(len(count)) for count in counts)} |")
        notes.append(f"{suite}: Python {record.python}, {record.date:%Y-%m-%d}.")
        notes += [f"- Problem: {problem}" for problem in found.problems]
    return "\n".join(rows) + "\n\n" + "\n".join(notes) + f"\n\n{evidence.lint}"


def command(repository: str, base: str, branch: str, text: str, file: str) -> str:
    """The gh command that opens the pull request; it is printed and never run."""
    words = [
        "gh", "pr", "create", "--repo", repository.removeprefix("https://github.com/"),
        "--base", base, "--head", branch, "--title", text, "--body-file", file,
    ]  # fmt: skip
    return shlex.join(words)
