"""What pytest writes of a run: its junit XML."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from xml.etree import ElementTree

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError

#: Properties of a test that say what is expected of it; any other is a measure, or says what ran.
EXPECTATION = ("expect_on_stock", "fail_to_pass_releases", "raises")
#: How properties begin that say what ran: the engine, its backend, the device.
ABOUT = "about_"


@dataclass(frozen=True)
class Case:
    """One test in one run."""

    name: str
    """Node id, with dots for the folders and the module."""
    outcome: str
    """passed, failed, error or skipped."""
    message: str
    """Why it failed or was skipped."""
    expect_on_stock: str
    """pass or fail."""
    raises: str
    """Regex that a failure on stock must match."""
    measures: dict[str, str] = field(default_factory=dict)
    """What the test measured, by name."""
    about: dict[str, str] = field(default_factory=dict)
    """What ran, by name."""

    @property
    def first_line(self) -> str:
        """The first line of the message."""
        return self.message.split("\n")[0]


def read(file: Path) -> list[Case]:
    """The tests of a run whose junit XML is in `file`.

    Raises:
        OverlayError: it is no junit XML.
    """
    try:
        return parse(plain_file.read_text(file))
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise OverlayError(
            f"{file} can't be read", getattr(error, "strerror", None) or f"it is no XML: {error}",
            "Pass the file that pytest --junitxml=FILE wrote", Exit.USAGE,
        ) from error  # fmt: skip


def day_of(file: Path) -> date:
    """The day on which pytest wrote `file`, which `read` has read.

    Raises:
        OverlayError: it does not say.
    """
    suite = ElementTree.fromstring(plain_file.read_text(file)).find("testsuite")
    stamp = suite.get("timestamp", "") if suite is not None else ""
    try:
        return datetime.fromisoformat(stamp).date()
    except ValueError as error:
        raise OverlayError(
            f"{file} has no date", f"its testsuite has the timestamp {stamp!r}",
            "Pass the file that pytest --junitxml=FILE wrote", Exit.USAGE,
        ) from error  # fmt: skip


def parse(xml: str) -> list[Case]:
    """The tests of a junit XML file that pytest wrote."""
    return [_case(node) for node in ElementTree.fromstring(xml).iter("testcase")]


def _case(node: ElementTree.Element) -> Case:
    properties = {p.get("name", ""): p.get("value", "") for p in node.iter("property")}
    outcome, message = "passed", ""
    for child, found in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
        result = node.find(child)
        if result is not None:
            outcome, message = found, f"{result.get('message', '')}\n{result.text or ''}"
    name = f"{node.get('classname', '')}::{node.get('name', '')}"
    measures = {
        name: value
        for name, value in properties.items()
        if name not in EXPECTATION and not name.startswith(ABOUT)
    }
    about = {
        name.removeprefix(ABOUT): value
        for name, value in properties.items()
        if name.startswith(ABOUT)
    }
    return Case(
        name,
        outcome,
        message.strip(),
        properties.get("expect_on_stock", "pass"),
        properties.get("raises", ""),
        measures,
        about,
    )
