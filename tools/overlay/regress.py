"""FAIL_TO_PASS: the regression tests on a release's stock wheel, then on the patched one.

Both are installed as a user would, one after the other in the same environment. The tests
never look at whether the wheel is patched; what stock is expected to fail, and with which
error, they state in junit properties (tests/regress/conftest.py), and `judge` compares.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from overlay import wheel
from overlay.console import log_for
from overlay.environment import Environment
from overlay.errors import Exit, OverlayError
from overlay.versions import Release
from overlay.workspace import Workspace

#: Suites of tests, by the folder in tests/ that holds them, with the seconds that one run may take:
#: a hang is an error and no wait.
SUITES = {"regress": 900.0, "gpu": 3600.0}
#: Properties of a test that say what is expected of it; any other is a measure.
EXPECTATION = ("expect_on_stock", "fail_to_pass_releases", "raises")
#: What the tests need beside the wheel.
NEEDS = ("pytest", "pytest-xdist", "hypothesis")


@dataclass(frozen=True)
class Case:
    """One test in one run."""

    name: str
    """Node id."""
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


@dataclass(frozen=True)
class Verdict:
    """A release's two runs, compared."""

    release: str
    fail_to_pass: tuple[str, ...]
    """Tests that failed on stock with the very error and passed on patched."""
    pass_to_pass: tuple[str, ...]
    """Tests that passed on both."""
    skipped: dict[str, str]
    """Tests that ran on neither, with the reason."""
    problems: tuple[str, ...]
    """What should not be so, a line each."""


def run(
    workspace: Workspace, release: Release, folder: Path, keep: bool, suite: str = "regress"
) -> Verdict:
    """Test `release` in a new environment under `folder`; it and the wheel go unless `keep`.

    `suite` is one of `SUITES`. A control has no patched wheel: its stock wheel must pass all.
    junit XML and pytest's output of both runs stay in `folder`.

    Raises:
        OverlayError: the wheel can't be built, an environment can't be made, or pytest itself
            breaks (a failing test is no exception: it is in the verdict).
    """
    log = log_for(release.name)
    tests = workspace.project.root / "tests"
    if not tests.is_dir():
        raise OverlayError(
            "no regression tests here", f"{tests} does not exist",
            "Run it in a checkout of the overlay", Exit.USAGE,
        )  # fmt: skip
    official = workspace.fetcher.fetch(release, "wheel", check=True)
    built = wheel.build(workspace, release, folder / "dist").path if release.is_patched else None
    environment = _environment(workspace, release, folder / "venv", official)
    try:
        stock = _pytest(environment, tests / suite, folder, "stock")
        patched = None
        if built:
            environment.install(str(built), *NEEDS)
            patched = _pytest(environment, tests / suite, folder, "patched")
    finally:
        if not keep:
            for used in (environment.folder, folder / "dist"):
                shutil.rmtree(used, ignore_errors=True)
            environment.cache.forget(workspace.versions.upstream.project)
    verdict = judge(release.name, stock, patched)
    log.info("%s", summary(verdict))
    return verdict


def _environment(
    workspace: Workspace, release: Release, folder: Path, official: Path
) -> Environment:
    log = log_for(release.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = Environment.create(
        folder, release, workspace.versions.python, workspace.fetcher.cache.folder
    )
    environment.install(str(official), *NEEDS)
    log.info("environment with stock %s after %.0f s", release.name, time.monotonic() - start)
    return environment


def _pytest(environment: Environment, suite: Path, folder: Path, which: str) -> list[Case]:
    log = log_for(environment.release.name)
    xml = folder / f"{which}.xml"
    xml.unlink(missing_ok=True)
    arguments = [
        "-m", "pytest", "-p", "no:cacheprovider", "-c", str(suite.parent / "pytest.ini"),
        "--rootdir", str(suite.parent), str(suite), "-q", "-rs", f"--junitxml={xml}",
        "-n", "auto", "--dist", "worksteal",
    ]  # fmt: skip
    start = time.monotonic()
    timeout = SUITES[suite.name]
    try:
        done = environment.run(arguments, {}, folder, timeout)
    except subprocess.TimeoutExpired as error:
        raise _broken(environment, which, f"no end after {timeout:.0f} s") from error
    output = folder / f"{which}.log"
    output.write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode not in (0, 1) or not xml.is_file():
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it said nothing"]
        raise _broken(environment, which, f"exit status {done.returncode}: {last[0]}; see {output}")
    cases = read_run(xml)
    failed = sum(c.outcome in ("failed", "error") for c in cases)
    log.info("%s: %d tests, %d failed, %.0f s", which, len(cases), failed, time.monotonic() - start)
    return cases


def _broken(environment: Environment, which: str, why: str) -> OverlayError:
    return OverlayError(
        f"{environment.release.name}: pytest broke on the {which} wheel", why,
        "Run it again with --keep and look into the environment", Exit.ENVIRONMENT,
    )  # fmt: skip


def read_run(file: Path) -> list[Case]:
    """The tests of a run whose junit XML is in `file`.

    Raises:
        OverlayError: it is no junit XML.
    """
    try:
        return read_junit(file.read_text("utf-8"))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise OverlayError(
            f"{file} can't be read", f"it is no XML: {error}",
            "Pass the file that pytest --junitxml=FILE wrote", Exit.USAGE,
        ) from error  # fmt: skip


def read_junit(xml: str) -> list[Case]:
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
    return Case(
        name,
        outcome,
        message.strip(),
        properties.get("expect_on_stock", "pass"),
        properties.get("raises", ""),
        {name: value for name, value in properties.items() if name not in EXPECTATION},
    )


def judge(release: str, stock: Iterable[Case], patched: Iterable[Case] | None) -> Verdict:
    """Compare the two runs; `patched` is None for a control.

    A test expected to fail on stock must fail there with an error that its regex matches, and
    pass on patched. Any other must pass on both, or be skipped on both.
    """
    before = {case.name: case for case in stock}
    after = before if patched is None else {case.name: case for case in patched}
    problems = dict.fromkeys(before.keys() ^ after.keys(), "ran on one wheel only")
    fail_to_pass, pass_to_pass, skipped = [], [], {}
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old.outcome == new.outcome == "skipped":
            skipped[name] = old.message.split("\n")[0]
        elif found := _problem(old, new):
            problems[name] = found
        elif old.expect_on_stock == "fail":
            fail_to_pass.append(name)
        else:
            pass_to_pass.append(name)
    if not (fail_to_pass or pass_to_pass or problems):
        problems["all"] = "no test ran"
    return Verdict(
        release,
        tuple(sorted(fail_to_pass)),
        tuple(sorted(pass_to_pass)),
        dict(sorted(skipped.items())),
        tuple(f"{release}: {line}" for line in _grouped(problems)),
    )


def _grouped(problems: dict[str, str]) -> list[str]:
    """A line for each distinct problem, with the tests that have it counted."""
    tests: dict[str, list[str]] = {}
    for name in sorted(problems):
        tests.setdefault(problems[name], []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}"
        for problem, names in tests.items()
    ]


def _problem(old: Case, new: Case) -> str | None:
    """What is wrong with a pair, or None."""
    if old.expect_on_stock == "fail":
        if old.outcome == "passed":
            return "passes on stock, where it should fail"
        if old.outcome == "skipped" or not re.search(old.raises, old.message):
            return f"{old.outcome} on stock, but not with {old.raises!r}: {_last_line(old)}"
    elif old.outcome != "passed":
        return f"{old.outcome} on stock: {_last_line(old)}"
    if new.outcome != "passed":
        return f"{new.outcome} on patched: {_last_line(new)}"
    return None


def _last_line(case: Case) -> str:
    return case.message.split("\n")[0]


def markdown(stock: Iterable[Case], patched: Iterable[Case]) -> str:
    """A table of what the tests measured: on stock, if it got that far, and on patched."""
    before = {case.name: case for case in stock}
    after = sorted((case for case in patched if case.measures), key=lambda case: case.name)
    names = list(dict.fromkeys(name for case in after for name in case.measures))
    header = ["", *(name.replace("_", " ") for name in names), "stock", "patched"]
    rows = [header, ["---"] * len(header)]
    for case in after:
        old = before[case.name]
        cells = [_change(old.measures.get(name), case.measures.get(name)) for name in names]
        label = case.name.rpartition("::")[2].removeprefix("test_")
        rows.append([label, *cells, old.outcome, case.outcome])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _change(old: str | None, new: str | None) -> str:
    return f"{old} → {new}" if old and new and old != new else new or ""


def summary(verdict: Verdict) -> str:
    """The verdict in a line."""
    return (
        f"{len(verdict.fail_to_pass)} FAIL_TO_PASS, {len(verdict.pass_to_pass)} PASS_TO_PASS, "
        f"{len(verdict.skipped)} skipped, {len(verdict.problems)} problems"
    )
