"""A port that is under way: what was asked for, and what was decided so far.

`work/port/RELEASE/state.json` holds no more than that. All else is worked out anew from it and
the checkout by each command, so there is nothing that a crash could leave half done.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from overlay.base import atomic, plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.models import first_problem
from overlay.base.project import Project
from overlay.probes.probing import Probed
from overlay.releases.versions import Release

FOLDER = Path("work", "port")
_FILE = "state.json"


class Decision(BaseModel):
    """What the maintainer decided on one topic: a text, to leave it out, or to keep it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    """The patch as it was solved."""
    reason: str | None = None
    """Why it is left out."""
    keep: bool = False
    """It is wanted although upstream has a fix of its own."""


class State(BaseModel):
    """A port under way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = 1
    release: Release
    """As it will be listed, but for the tree after its series."""
    origin: str
    """The release whose series is ported."""
    date: str
    """For Last-Update of new texts, YYYY-MM-DD."""
    decisions: Mapping[str, Decision] = {}
    """By topic."""
    probes: Mapping[str, Probed] = {}
    """What each topic's probe says of the release as upstream has it, if they were run."""
    stopped: str | None = None
    """The topic that waits for a decision, as last told; for people."""

    @property
    def name(self) -> str:
        """The release's version."""
        return self.release.name

    def unneeded(self, topic: str) -> str:
        """Why a topic is no longer needed, by its probe; empty if it is, or nothing tells."""
        said = self.probes.get(topic)
        return said.of_stock(self.name) if said and said.is_needed is False else ""

    def deciding(self, topic: str, decision: Decision) -> State:
        """This state with a decision more."""
        decisions = {**self.decisions, topic: decision}
        return self.model_copy(update={"decisions": decisions, "stopped": None})


def folder(project: Project, release: str) -> Path:
    """Where the port to `release` has its files."""
    return project.root / FOLDER / release


def file(release: str) -> Path:
    """The state's path below the checkout's root."""
    return FOLDER / release / _FILE


def find(project: Project) -> State | None:
    """The port under way, if there is one.

    Raises:
        OverlayError: its state can't be read.
    """
    found = sorted((project.root / FOLDER).glob(f"*/{_FILE}"))
    if not found:
        return None
    try:
        return State.model_validate_json(plain_file.read(found[0]))
    except (OSError, ValidationError) as error:
        raise OverlayError(
            f"cannot read {found[0]}",
            first_problem(error),
            "Restore it, or delete it to give the port up: nothing of it is in patches/ yet",
            Exit.PROBLEMS,
        ) from error


def tidy(project: Project) -> None:
    """Delete what ports that ended left behind: their work trees."""
    for left in (project.root / FOLDER).glob("*/"):
        if not (left / _FILE).exists():
            shutil.rmtree(left, ignore_errors=True)


def save(project: Project, state: State) -> None:
    """Write the state; it is the old one or the new one, whatever happens.

    Raises:
        OverlayError: it can't be written.
    """
    target = project.root / file(state.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.put(target, state.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise OverlayError(
            f"cannot write {target}", error.strerror or str(error),
            "Make the checkout writable, and run it again", Exit.ENVIRONMENT,
        ) from error  # fmt: skip
