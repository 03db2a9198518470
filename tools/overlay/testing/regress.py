"""FAIL_TO_PASS: the regression tests on a release's stock wheel, then on the patched one.

Both are installed as a user would, one after the other in the same environment. The tests
never look at whether the wheel is patched; what stock is expected to fail, and with which
error, they state in junit properties (tests/regress/conftest.py), and `judge` compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing import pytest_run, results
from overlay.testing.junit import Case
from overlay.testing.results import Verdict

#: Suites of tests, by the folder in tests/ that holds them, with the seconds that one run may take:
#: a hang is an error and no wait.
SUITES = {"regress": 900.0, "gpu": 3600.0}
#: What the tests need beside the wheel.
NEEDS = ("pytest", "pytest-xdist", "hypothesis")


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
    tests = require_tests(workspace)
    runs = pytest_run.Runs(workspace, release, folder, NEEDS)
    with runs.kept(keep):
        arguments = _arguments(tests / suite)
        runs.install("stock")
        stock = runs.run("stock", arguments, SUITES[suite])
        patched = None
        if release.is_patched:
            runs.install("patched")
            patched = runs.run("patched", arguments, SUITES[suite])
        verdict = judge(release.name, stock, patched)
        results.keep(folder, release, suite, verdict, runs.environment.version())
    log.info("%s", verdict.counts)
    return verdict


def require_tests(workspace: Workspace) -> Path:
    """The folder of the tests.

    Raises:
        OverlayError: there is none.
    """
    tests = workspace.project.root / "tests"
    if not (tests / "regress").is_dir():
        raise OverlayError(
            "no regression tests here", f"{tests} has none",
            "Run it in a checkout of the overlay", Exit.USAGE,
        )  # fmt: skip
    return tests


def _arguments(suite: Path) -> list[str]:
    """pytest's, for all of a suite."""
    return [
        "-p", "no:cacheprovider", "-c", str(suite.parent / "wheels.ini"), "--rootdir",
        str(suite.parent), str(suite), "-q", "-rs", "-n", "auto", "--dist", "worksteal",
    ]  # fmt: skip


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
            skipped[name] = old.first_line
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
            return f"{old.outcome} on stock, but not with {old.raises!r}: {old.first_line}"
    elif old.outcome != "passed":
        return f"{old.outcome} on stock: {old.first_line}"
    if new.outcome != "passed":
        return f"{new.outcome} on patched: {new.first_line}"
    return None


def markdown(stock: Iterable[Case], patched: Iterable[Case]) -> str:
    """A table of what the tests measured: on stock, if it got that far, and on patched."""
    before = {case.name: case for case in stock}
    after = sorted((case for case in patched if case.measures), key=lambda case: case.name)
    names = list(dict.fromkeys(name for case in after for name in case.measures))
    ran = ["what ran"] if any(case.about for case in after) else []
    header = ["", *ran, *(name.replace("_", " ") for name in names), "stock", "patched"]
    rows = [header, ["---"] * len(header)]
    for case in after:
        old = before[case.name]
        cells = [_change(old.measures.get(name), case.measures.get(name)) for name in names]
        label = case.name.rpartition("::")[2].removeprefix("test_")
        engine = [_engine(case.about)] if ran else []
        rows.append([label, *engine, *cells, old.outcome, case.outcome])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _engine(about: Mapping[str, str]) -> str:
    """The engine of a test in a table's cell."""
    if not about:
        return ""
    backend = about["backend"].rpartition(".")[2].removesuffix("Impl")
    parts = (f"{about['engine']} {backend}", about["dtype"], about["kv_cache_dtype"])
    return ", ".join((*parts, about["compilation"]))


def _change(old: str | None, new: str | None) -> str:
    return f"{old} → {new}" if old and new and old != new else new or ""
