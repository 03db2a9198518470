"""Each prefix of a series in an environment of its release: it imports, and breaks no test.

The stock wheel is installed once. Then each prefix's files are put in the place of stock's, one
prefix after the other, the modules that were changed so far are imported, and tests/regress is run
but for what takes long. Once a test passes it has to pass to the end of the series.

What a prefix gave is kept in the cache under its git tree id: a change of a patch costs only
what follows it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from overlay.base import atomic, plain_file
from overlay.base.console import log_for
from overlay.patches.changes import NOT_SHIPPED
from overlay.patches.prefixes import Prefix
from overlay.patches.tree import Result
from overlay.patches.workspace import Workspace
from overlay.releases.uv import choose_python
from overlay.testing import regress
from overlay.testing.junit import Case
from overlay.testing.pytest_run import Runs

#: Tests that start other processes, each of which imports torch again.
LEFT_OUT = ("engine_in_child", "workers")
#: Seconds for one prefix.
TIMEOUT = 600.0
#: Where the modules are named that are to be imported.
MODULES = "OVERLAY_MODULES"
_IMPORTS = "test_imports["
_BAD = ("failed", "error")


class Kept(BaseModel):
    """What the tests said of one tree."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcomes: Mapping[str, str]
    """passed, failed, error or skipped, by test."""
    messages: Mapping[str, str]
    """The first line of those that failed."""
    seconds: float
    """What it took."""


@dataclass(frozen=True)
class Outcome:
    """What became of the prefixes of a series, stock among them."""

    problems: tuple[str, ...]
    ran: int
    """Trees that were tested now."""
    kept: int
    """Trees whose result was kept."""
    missing: int
    """Trees that were not tested: nothing was to be run."""
    seconds: float
    """What those that were tested took, when they ran."""


@dataclass(frozen=True)
class Tree:
    """One of the trees to test."""

    label: str
    commit: str
    tree: str
    modules: tuple[str, ...]
    """The modules of the package that were changed so far, to be imported."""


@dataclass(frozen=True)
class Trees:
    """The stock tree of a release and its prefixes."""

    workspace: Workspace
    result: Result
    prefixes: tuple[Prefix, ...]

    @cached_property
    def all(self) -> tuple[Tree, ...]:
        """Stock, then each prefix."""
        base = self.result.base
        found = [Tree("00-stock", base, self.workspace.store.tree_of(base), ())]
        changed = set[str]()
        for number, one in enumerate(self.prefixes, 1):
            changed |= {path for path in one.changed if not path.startswith(NOT_SHIPPED)}
            there = self.workspace.store.listing(one.commit)
            modules = (path for path in sorted(changed) if path in there)
            named = tuple(path.removesuffix(".py").replace("/", ".") for path in modules)
            found.append(Tree(f"{number:02}-{one.path.topic}", one.commit, one.tree, named))
        return tuple(found)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The files of the package that some patch changes."""
        store, base = self.workspace.store, self.result.base
        changed = {path for one in self.prefixes for path in store.changed(base, one.commit)}
        return tuple(sorted(path for path in changed if not path.startswith(NOT_SHIPPED)))

    @cached_property
    def _surroundings(self) -> tuple[str, ...]:
        """What decides about the outcome beside the tree."""
        release, tests = self.result.release, self.workspace.project.root / "tests"
        python = choose_python(self.workspace.versions.python)
        if python == sys.executable:
            python = ".".join(platform.python_version_tuple()[:2])
        sources = (*tests.glob("regress/*.py"), tests / "wheels.ini")
        return (
            release.name, release.wheel.sha256, python, *release.constraints, *release.overrides,
            *regress.NEEDS, *LEFT_OUT, *(file.read_text("utf-8") for file in sorted(sources)),
        )  # fmt: skip

    def kept_file(self, one: Tree) -> Path:
        """Where the result of a tree is kept."""
        parts = json.dumps((*self._surroundings, *one.modules))
        digest = hashlib.sha256(parts.encode()).hexdigest()
        folder = self.workspace.fetcher.cache.folder / "each"
        return folder / f"{one.tree}-{digest[:16]}.json"


def check(
    trees: Trees, folder: Path, *, to_run: bool, keep: bool, done: Callable[[str], None]
) -> Outcome:
    """Test what is not kept, if it is `to_run`, in an environment in `folder`; judge all.

    Raises:
        OverlayError: the wheel is unavailable, an environment can't be made, or pytest itself
            breaks.
    """
    release = trees.result.release
    if to_run:
        regress.require_tests(trees.workspace)
    elif not (trees.workspace.project.root / "tests" / "regress").is_dir():
        return Outcome((), 0, 0, len(trees.all), 0)  # as installed: there is nothing to have run
    found: list[Kept | None] = []
    ran = 0
    runs = Runs(trees.workspace, release, folder, regress.NEEDS)
    with runs.kept(keep):
        site: _Site | None = None
        for tree in trees.all:
            one = _read(trees.kept_file(tree))
            if one is None and to_run:
                site = site or _Site.make(runs, trees)
                one = _run(runs, site, trees, tree)
                _write(trees.kept_file(tree), one)
                ran += 1
            found.append(one)
            done(tree.label)
    whole = [one for one in found if one]
    problems = tuple(judge(release.name, trees.prefixes, found))
    took = sum(one.seconds for one in whole)
    return Outcome(problems, ran, len(whole) - ran, len(found) - len(whole), took)


def judge(release: str, prefixes: Sequence[Prefix], found: Sequence[Kept | None]) -> Iterator[str]:
    """What breaks: `found` has stock's result and that of each prefix, as far as there are any.

    A test that passed before a patch has to pass after it, and a module that it changed has to
    import.
    """
    for number, prefix in enumerate(prefixes, 1):
        before, now = found[number - 1], found[number]
        if before is None or now is None:
            continue
        where = f"{release}: after {prefix.path} ({number} of {len(prefixes)})"
        yield from _grouped(where, dict(_broken(before, now)))


def _broken(before: Kept, now: Kept) -> Iterator[tuple[str, str]]:
    """The tests that do not pass and have to, and why not."""
    for name, outcome in now.outcomes.items():
        was = before.outcomes.get(name, "passed" if _IMPORTS in name else "not there")
        if was == "passed" and outcome != "passed":
            yield name, now.messages.get(name, outcome)
    for name, outcome in before.outcomes.items():
        if outcome == "passed" and name not in now.outcomes and _IMPORTS not in name:
            yield name, "not there any more"


def _grouped(where: str, said: Mapping[str, str]) -> Iterator[str]:
    """A line for each message, with the tests that have it counted."""
    tests: dict[str, list[str]] = {}
    for name, message in said.items():
        tests.setdefault(message, []).append(name)
    for message, names in tests.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{where}: {names[0].removeprefix('tests.')}{more}: {message}"


@dataclass
class _Site:
    """The site-packages of an environment with the stock wheel, and what of it is changed."""

    folder: Path
    now: dict[str, bytes | None]
    """The files of the package that some patch changes, as they are."""

    @classmethod
    def make(cls, runs: Runs, trees: Trees) -> _Site:
        """Install the stock wheel."""
        runs.install("stock")
        script = "import sysconfig; print(sysconfig.get_path('platlib'))"
        out = runs.environment.run(["-c", script], {}, runs.folder, 60).stdout
        folder = Path(out.strip())
        now = {
            path: (folder / path).read_bytes() if (folder / path).is_file() else None
            for path in trees.files
        }
        return cls(folder, now)

    def switch(self, files: Mapping[str, bytes | None]) -> None:
        """Make the files these: by new ones, since the installed ones are links to uv's cache."""
        for path, data in files.items():
            if data == self.now[path]:
                continue
            file = self.folder / path
            file.unlink(missing_ok=True)
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
                compiled.unlink()
            if data is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            self.now[path] = data


def _run(runs: Runs, site: _Site, trees: Trees, tree: Tree) -> Kept:
    """Test one tree."""
    site.switch(trees.workspace.store.show_many(tree.commit, trees.files))
    tests = trees.workspace.project.root / "tests"
    arguments = [
        "-p", "no:cacheprovider", "-c", str(tests / "wheels.ini"), "--rootdir", str(tests),
        str(tests / "regress"), "-q", "-k", f"not ({' or '.join(LEFT_OUT)})",
    ]  # fmt: skip
    start = time.monotonic()
    cases = runs.run(tree.label, arguments, TIMEOUT, {MODULES: json.dumps(tree.modules)})
    return kept_of(cases, time.monotonic() - start)


def kept_of(cases: Sequence[Case], seconds: float) -> Kept:
    """What is kept of a run."""
    bad = {case.name: case.first_line for case in cases if case.outcome in _BAD}
    outcomes = {case.name: case.outcome for case in cases}
    return Kept(outcomes=outcomes, messages=bad, seconds=round(seconds, 1))


def _read(file: Path) -> Kept | None:
    """A result that is kept; None if there is none that can be read: it is run again then."""
    try:
        return Kept.model_validate_json(plain_file.read(file))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log_for("each").warning("%s can't be read, and counts for nothing: %s", file, error)
        return None


def _write(file: Path, one: Kept) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.put(file, one.model_dump_json().encode())
