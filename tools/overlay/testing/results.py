"""What a suite of tests found out about a release, kept beside its run.

`regress` and `upstream` write it to ``work/<suite>/<release>/``, `verdict.json` for programs and
`summary.md` for people; `status` and `stage` read it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.models import first_problem
from overlay.releases.versions import Release

FILE = "verdict.json"
SUMMARY = "summary.md"


@dataclass(frozen=True)
class Verdict:
    """A release's two runs, compared."""

    release: str
    fail_to_pass: tuple[str, ...]
    """Tests that failed on stock, as they should, and passed on patched."""
    pass_to_pass: tuple[str, ...]
    """Tests that passed on both."""
    skipped: dict[str, str]
    """Tests that passed on neither and need not, with the reason."""
    problems: tuple[str, ...]
    """What should not be so, a line each."""

    @property
    def counts(self) -> str:
        """How many there are of each, in a line."""
        return (
            f"{len(self.fail_to_pass)} FAIL_TO_PASS, {len(self.pass_to_pass)} PASS_TO_PASS, "
            f"{len(self.skipped)} skipped, {len(self.problems)} problems"
        )


class Record(BaseModel):
    """A verdict, and what it is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str
    """regress, upstream or gpu: a folder of tests/."""
    command: str
    """What to type to get it again."""
    date: datetime
    """When the run ended, UTC."""
    python: str
    """Version of the Python that ran the tests."""
    tree: str
    """Git tree id of the release's source with its series: it is out of date for any other."""
    verdict: Verdict

    def is_of(self, release: Release) -> bool:
        """Whether it is of `release` with the series it has now."""
        return self.tree == (release.tree or release.upstream_tree)


def keep(folder: Path, release: Release, suite: str, verdict: Verdict, python: str) -> Record:
    """Write `verdict` of `release`, as it is now, into `folder`; `python` is the version."""
    record = Record(
        suite=suite,
        command=f"vllm-overlay {command_of(suite, release.name)}",
        date=datetime.now(timezone.utc).replace(microsecond=0),
        python=python or platform.python_version(),
        tree=release.tree or release.upstream_tree,
        verdict=verdict,
    )
    (folder / FILE).write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
    (folder / SUMMARY).write_text(markdown(record), "utf-8")
    return record


def command_of(suite: str, release: str) -> str:
    """The words after ``vllm-overlay`` that run `suite` on `release`."""
    if suite == "gpu":
        return f"regress {release} --suite gpu"
    return f"{suite} {release}"


def load(work: Path, release: str) -> Mapping[str, Record]:
    """The last record of each suite of `release`, from the folders under `work`.

    Raises:
        OverlayError: one of them is damaged.
    """
    return {
        file.parent.parent.name: _read(file) for file in sorted(work.glob(f"*/{release}/{FILE}"))
    }


def _read(file: Path) -> Record:
    try:
        return Record.model_validate_json(plain_file.read(file))
    except (ValidationError, OSError) as error:
        raise OverlayError(
            f"{file} can't be read", first_problem(error),
            "Delete it, and run that suite again", Exit.USAGE,
        ) from error  # fmt: skip


def markdown(record: Record) -> str:
    """A summary for a pull request or a CI job."""
    verdict = record.verdict
    lines = [
        f"## {verdict.release}: {record.suite}",
        "",
        "| FAIL_TO_PASS | PASS_TO_PASS | passed on neither | problems |",
        "|---|---|---|---|",
        f"| {len(verdict.fail_to_pass)} | {len(verdict.pass_to_pass)} | {len(verdict.skipped)} "
        f"| {len(verdict.problems)} |",
        "",
        f"`{record.command}`, Python {record.python}, {record.date:%Y-%m-%d}, "
        f"tree {record.tree[:12]}",
        "",
    ]
    for problem in verdict.problems:
        lines.append(f"- **problem** {problem}")
    lines += _reasons(verdict.skipped)
    return "\n".join(lines).rstrip("\n") + "\n"


def _reasons(skipped: Mapping[str, str]) -> list[str]:
    """The reasons of tests that passed on neither wheel, most frequent first, with their number."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    if not by_reason:
        return []
    table = ["| Passed on neither | because |", "|---|---|"]
    for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        table.append(f"| {len(names)} | {reason.replace('|', chr(92) + '|')} |")
    return table
