"""Whether an installed vLLM behaves as patched: its probes, as `doctor` tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overlay.answers import advice
from overlay.answers.doctor import Report
from overlay.answers.probe import Python
from overlay.patches.workspace import Workspace
from overlay.probes.probing import Probing, Verdict, in_environment


@dataclass(frozen=True)
class Behaviour:
    """What the probes say, and what to change for it."""

    probing: Probing | None
    """None where there is nothing to probe."""
    is_patched: bool
    release: str
    to_change: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any] | None:
        """For scripts."""
        return self.probing.as_json() if self.probing else None

    def lines(self) -> list[tuple[str, str]]:
        """For people: labels and texts."""
        if self.probing is None:
            return [("probe", "there is no vLLM here that is patched, or could be")]
        if self.probing.problem:
            return [("probe", f"not probed: {self.probing.problem}")]
        found, took = self.probing, f"{self.probing.seconds:.1f} s"
        torch = f"torch {found.torch}" if found.torch else "without torch"
        told = str(found)
        if not self.is_patched:
            count = len(found.of(Verdict.WRONG))
            told = f"{count} of {len(found.probed)} topics do what stock does"
        lines = [("probe", f"{told} ({torch}, {took})")]
        for one in found.probed:
            if self.is_patched and one.verdict is not Verdict.RIGHT:
                lines.append(("", f"{one.topic}: {one.why}"))
            elif not self.is_patched and one.verdict is not Verdict.WRONG:
                lines.append(("", f"{one.topic}: {one.of_stock(self.release)}"))
        return lines


def examine(workspace: Workspace, python: Python, report: Report) -> Behaviour:
    """Probe the vLLM of a report, if there are patches for its release."""
    installed, identity = report.installed, report.identity
    release, is_patched = identity.release, identity.kind == "patched"
    if installed is None or release is None or not release.is_patched:
        return Behaviour(None, is_patched, release.name if release else "")
    topics = [path.topic for path in workspace.series(release)]
    found = in_environment(python.executable, installed.folder, topics)
    changes: tuple[str, ...] = ()
    heals = any(change.startswith(("repair it", "install", "end ")) for change in report.to_change)
    if is_patched and found.failed and not heals:
        names = ", ".join(one.topic for one in found.failed)
        how = advice.wheel(release, identity.label)
        if installed.is_in_place:
            how = advice.anew(python, release, identity.label)
        changes = (f"install it again: {names} do not behave as patched; {how}",)
    return Behaviour(found, is_patched, release.name, changes)
