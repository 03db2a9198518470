"""What became of the pull requests and issues that the patches speak of.

`upstream.json` in the checkout is written by `.github/workflows/upstream.yml` once a week; nothing
here asks a network. How old it is is told with it, so that nobody takes an old state for today's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.models import first_problem
from overlay.patches.patch import Removal, read_patch
from overlay.patches.series import PatchPath
from overlay.patches.workspace import Workspace
from overlay.releases.versions import ranges

FILE = "upstream.json"
#: Days after which the file is too old to be believed: its workflow runs every week.
STALE = 14
_URL = r"https://[\w.-]+/[\w.-]+/[\w.-]+/(?:pull|issues)/\d+"
#: Trailers that name pull requests and issues.
_TRAILERS = ("Bug", "Forwarded", "Applied-Upstream", "Remove-When")

State = Literal["open", "closed", "merged"]


class Reference(BaseModel):
    """A pull request or an issue, as it was when it was asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=_URL)
    """As the patches have it: GitHub leads from an issue's address to a pull request's."""
    state: State
    title: str
    updated: datetime
    """Its last change of any kind."""
    ended: datetime | None
    """When it was closed or merged."""


class Upstream(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    checked: datetime
    """When GitHub was asked, UTC."""
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Named:
    """A pull request or issue that patches name."""

    url: str
    patches: Mapping[PatchPath, tuple[str, ...]]
    """With the trailers that name it."""


@dataclass(frozen=True)
class Condition:
    """When a patch is to go."""

    path: PatchPath
    removal: Removal
    releases: tuple[str, ...]
    """Those that list it."""
    met_in: tuple[str, ...]
    """Those among them that do without it, by its own words."""


def read(file: Path) -> Upstream | None:
    """The states; None if there is no file yet.

    Raises:
        OverlayError: it is damaged.
    """
    try:
        return Upstream.model_validate_json(plain_file.read(file))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise OverlayError(
            f"{file} can't be read", first_problem(error),
            "Take it from git again, or run the workflow upstream.yml", Exit.PROBLEMS,
        ) from error  # fmt: skip


def references(workspace: Workspace) -> list[Named]:
    """What the patches of all series name, in order of address."""
    found: dict[str, dict[PatchPath, tuple[str, ...]]] = {}
    for path in _listed(workspace):
        mail = read_patch(None, workspace.project.patches, path).mail
        for key, value in mail.trailers:
            for url in re.findall(_URL, value) if key in _TRAILERS else ():
                patches = found.setdefault(url, {})
                patches[path] = (*patches.get(path, ()), key)
    return [Named(url, found[url]) for url in sorted(found, key=_number)]


def _number(url: str) -> tuple[str, int]:
    place, _, number = url.rpartition("/")
    return place.rpartition("/")[0], int(number)


def _listed(workspace: Workspace) -> dict[PatchPath, tuple[str, ...]]:
    """Every patch that a series lists, with the releases."""
    found: dict[PatchPath, list[str]] = {}
    for release in workspace.versions.patched:
        for path in workspace.series(release):
            found.setdefault(path, []).append(release.name)
    return {path: tuple(names) for path, names in found.items()}


def conditions(workspace: Workspace) -> list[Condition]:
    """When each patch is to go, and the releases that list it all the same."""
    found = []
    for path, names in _listed(workspace).items():
        removal = read_patch(None, workspace.project.patches, path).mail.removal
        if removal:
            met = tuple(name for name in names if removal.is_met(Version(name)))
            found.append(Condition(path, removal, names, met))
    return found


def age(checked: datetime, today: date) -> int:
    """Days since GitHub was asked."""
    return (today - checked.date()).days


def age_told(known: Upstream, today: date) -> str:
    """How old the file is, for people."""
    days = age(known.checked, today)
    old = f"; older than {STALE} days: does its workflow still run?" if days > STALE else ""
    return f"{FILE} of {known.checked:%Y-%m-%d}, {days} d old{old}"


def absent(workspace: Workspace) -> str:
    """What to say where there is no file."""
    count = len(references(workspace))
    return (
        f"no file yet: {FILE} is written by .github/workflows/upstream.yml; "
        f"the states of {count} pull requests and issues are unknown"
    )


def verdict(named: Named, one: Reference | None) -> str:
    """What a state means for the patches that name it."""
    if one is None:
        return "not in the file"
    waits = any("Remove-When" in keys for keys in named.patches.values())
    if one.state == "open":
        return "keep the patch" if waits else ""
    if waits:
        return "removal condition met"
    forwarded = any("Forwarded" in keys for keys in named.patches.values())
    if forwarded:
        return "upstream took it" if one.state == "merged" else "upstream closed it: say why"
    return ""


def rows(
    named: Sequence[Named], known: Upstream | None, today: date
) -> Iterator[tuple[Named, Reference | None, int | None, str]]:
    """Each reference with its state, the days since its last change, and what that means."""
    states = {one.url: one for one in known.references} if known else {}
    for each in named:
        one = states.get(each.url)
        days = (today - (one.ended or one.updated).date()).days if one else None
        yield each, one, days, verdict(each, one) if known else ""


def as_json(workspace: Workspace, known: Upstream | None, today: date) -> dict[str, object]:
    """What `status --upstream --json` prints."""
    return {
        "checked": known.checked.isoformat() if known else None,
        "age_days": age(known.checked, today) if known else None,
        "references": [
            {
                "url": named.url,
                "state": one.state if one else None,
                "title": one.title if one else None,
                "age_days": days,
                "patches": {str(path): keys for path, keys in named.patches.items()},
                "verdict": told or None,
            }
            for named, one, days, told in rows(references(workspace), known, today)
        ],
        "conditions": [
            {
                "file": f"patches/{one.path}",
                "removal": str(one.removal),
                "releases": one.releases,
                "met_in": one.met_in,
            }
            for one in conditions(workspace)
        ],
    }


def condition_lines(workspace: Workspace) -> Iterator[tuple[str, str, str, str]]:
    """Topic, the releases that list it, when it is to go, and where that is met all the same."""
    order = [release.name for release in workspace.versions.patched]
    groups: dict[tuple[str, str], list[Condition]] = {}
    for one in conditions(workspace):
        groups.setdefault((one.path.topic, one.removal.value), []).append(one)
    for (topic, value), same in groups.items():
        names = [name for one in same for name in one.releases]
        met = [name for one in same for name in one.met_in]
        told = f"met in {ranges(met, order)}, which lists it" if met else ""
        yield topic, ranges(names, order), re.sub(_URL, _short, value), told


def _short(url: re.Match[str]) -> str:
    return f"#{url[0].rpartition('/')[2]}"
