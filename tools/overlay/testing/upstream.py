"""Upstream's own tests of a release, on its stock wheel and on the patched one, test by test.

What a patched wheel is trusted for is that these say the same of it as of the stock wheel. The
tests come from the release's source with its series, so that what the patches add runs in
upstream's tree and in upstream's way; the package comes from the wheel. tests/upstream stands
in for what is not here: the model hub, and a GPU as far as it is only asked what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Plugin, Release
from overlay.testing import junit, results
from overlay.testing.junit import Case
from overlay.testing.pytest_run import Runs, Which
from overlay.testing.results import Verdict

#: What the tests need beside the wheel: upstream's runner and what its conftest imports.
NEEDS = ("pytest>=8.3,<9", "pytest-asyncio", "pytest-timeout", "httpx", "tblib")
#: Tests that must pass: fewer mean that the surroundings broke, and prove nothing. 0.11.0, whose V0
#: engine is gone with its tests, has 813; no other has fewer than 900.
FLOOR = 750
#: Seconds for one test, and for a whole run.
TEST_TIMEOUT, TIMEOUT = 120, 1800.0
#: Folders of the source that are not put beside the tests. The package must come from the wheel.
LEFT_OUT = ("vllm/", "csrc/", "docs/", "vllm.egg-info/")

#: What torch says where there is no GPU.
NO_GPU = r"Found no NVIDIA driver|Torch not compiled with CUDA"
#: Why a test can't pass here, by what it says; the first that matches.
REASONS = (
    (r"LocalEntryNotFound|OfflineMode|We couldn't connect|offline mode|ConnectionError|Name or "
     r"service|resolution|MaxRetry|is not a local folder|is not a valid model identifier|Repo id|"
     r"Invalid repository ID",
     "needs the model hub or a network"),
    (r"No module named '(?P<what>[\w.]+)'|requires? the (?P<what2>\w+) library",
     "needs a package that vLLM does not ask for: {what}"),
    (r"NVIDIA|CUDA|libcuda|cuda|GPU|'_OpNamespace'|driver", "needs a GPU"),
    (r"Timeout >|does not end", f"does not end within {TEST_TIMEOUT} s"),
    (r"ended the process \(", "ends the process that runs it"),
)  # fmt: skip


@dataclass(frozen=True)
class Selected:
    """The tests of a release with its series."""

    folder: Path
    """Where its source is, without the package."""
    chosen: tuple[str, ...]
    """Files and folders to run, relative to it."""
    packages: tuple[str, ...]
    """What they import, relative to it, to be built."""
    plugins: tuple[Plugin, ...]
    """Whose tests are run as well, each with its plugin."""
    missing: tuple[str, ...]
    """What VERSIONS.toml names and this release has not."""
    key: str
    """Digest of all that decides about the outcome on stock."""
    added: Callable[[Case], bool]
    """Whether the patches brought a test."""


def run(workspace: Workspace, release: Release, folder: Path, keep: bool, anew: bool) -> Verdict:
    """Run upstream's tests of `release` in a new environment under `folder`.

    What stock does is kept in the cache, under a digest of the wheel, the tests and what stands
    in for their surroundings; `anew` runs it again.

    Raises:
        OverlayError: the wheel can't be built, an environment can't be made, or pytest itself
            breaks. A test that is lost is no exception: it is in the verdict.
    """
    log = log_for(release.name)
    harness = _harness(workspace.project.root)
    runs = Runs(workspace, release, folder, NEEDS)
    with runs.kept(keep):
        python = runs.environment.version()
        tests = _check_out(workspace, release, folder / "tree", (python, *harness))
        log.info("%d of upstream's test files and folders", len(tests.chosen))
        stock = _stock(runs, tests, anew)
        patched = _both(runs, "patched", tests)
        if lost := _lost(stock, patched):
            patched = _again(runs, tests, patched, lost)
        verdict = judge(release.name, stock, patched, tests)
        results.keep(folder, release, "upstream", verdict, python)
        if not keep:
            shutil.rmtree(tests.folder, ignore_errors=True)
    log.info("%s", verdict.counts)
    return verdict


def _check_out(
    workspace: Workspace, release: Release, folder: Path, surroundings: Iterable[str]
) -> Selected:
    """Write the release's source with its series, without the package, to `folder`."""
    store, result = workspace.store, workspace.apply(release).require()
    shutil.rmtree(folder, ignore_errors=True)
    for path, _, data in store.files(result.head):
        if not path.startswith(LEFT_OUT):
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    touched = sorted(
        path
        for path, change in store.changed(result.base, result.head).items()
        if change != "D" and _is_test_file(path)
    )
    upstream = workspace.versions.upstream
    named = [f"tests/{name}" for name in upstream.tests]
    present = [path for path in named if (folder / path).exists()]
    packages = tuple(path for path in upstream.packages if (folder / "tests" / path).exists())
    plugins = tuple(one for one in upstream.plugins if (folder / "tests" / one.package).exists())
    inside = tuple(f"{path}/" for path in present)
    chosen = present + [p for p in touched if p not in present and not p.startswith(inside)]

    def added(case: Case) -> bool:
        file = next((p for p in touched if case.name.startswith(_dotted(p))), None)
        if file is None:
            return False
        before = store.show(result.base, file)
        function = case.name.rpartition("::")[2].partition("[")[0]
        return before is None or f"def {function}(".encode() not in before

    key = _digest(
        release.wheel.sha256, store.tree_of(result.head), *chosen, *packages, *NEEDS,
        *(one.model_dump_json() for one in plugins),
        *release.constraints, *release.overrides, *surroundings,
    )  # fmt: skip
    missing = tuple(sorted(set(named) - set(present)))
    return Selected(folder, tuple(chosen), packages, plugins, missing, key, added)


def _is_test_file(path: str) -> bool:
    return path.startswith("tests/") and Path(path).name.startswith("test_")


def _dotted(path: str) -> str:
    """A test file as junit XML names it."""
    return path.removesuffix(".py").replace("/", ".")


def _harness(root: Path) -> list[str]:
    """The files that stand in for a test's surroundings, as text."""
    folder = root / "tests"
    files = [*sorted(folder.glob("upstream/*.py")), folder / "regress" / "fake_cuda.py"]
    try:
        return [file.read_text("utf-8") for file in files]
    except OSError as error:
        raise OverlayError(
            "no tests here", f"{error.filename} can't be read",
            "Run it in a checkout of the overlay", Exit.USAGE,
        ) from error  # fmt: skip


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stock(runs: Runs, tests: Selected, anew: bool) -> list[Case]:
    """The stock wheel's runs: from the cache, or made and put there."""
    cache = runs.workspace.fetcher.cache.folder / "upstream"
    kept = cache / f"{runs.release.name}-{tests.key[:32]}"
    names = ["stock.xml", *(f"stock-{plugin.label}.xml" for plugin in tests.plugins)]
    if kept.is_dir() and not anew:
        shutil.copytree(kept, runs.folder, dirs_exist_ok=True)
        log_for(runs.release.name).info("stock: as it was run before (--anew runs it again)")
        return [case for name in names for case in junit.read(kept / name)]
    cases = _both(runs, "stock", tests)
    for old in cache.glob(f"{runs.release.name}-*"):
        shutil.rmtree(old)
    made = kept.with_name(f"{kept.name}.part")
    made.mkdir(parents=True)
    for name in names:
        shutil.copyfile(runs.folder / name, made / name)
    made.replace(kept)
    return cases


def _both(runs: Runs, which: Which, tests: Selected) -> list[Case]:
    """The tests on one of the wheels: all, and those of each plugin with it."""
    runs.install(which)
    cases = _pytest(runs, which, tests, tests.chosen)
    for plugin in tests.plugins:
        arguments = [f"--plugins={','.join(plugin.names)}", *(f"tests/{n}" for n in plugin.tests)]
        cases += _pytest(runs, f"{which}-{plugin.label}", tests, arguments, plugin.package)
    return cases


def _lost(stock: Iterable[Case], patched: Iterable[Case]) -> set[str]:
    """Tests that passed on stock and did not on patched."""
    passed = {case.name for case in patched if case.outcome == "passed"}
    return {case.name for case in stock if case.outcome == "passed"} - passed


def _again(runs: Runs, tests: Selected, patched: list[Case], lost: set[str]) -> list[Case]:
    """The run with the files of `lost` tests run once more: some depend on how busy a machine is.

    What the patches break fails twice.
    """
    files = sorted({path for name in lost if (path := _file_of(tests.folder, name))})
    if not files:
        return patched
    log_for(runs.release.name).warning("once more, for %d tests: %s", len(lost), " ".join(files))
    second = _pytest(runs, "patched-again", tests, files)
    found = {case.name: case for case in patched}
    found |= {case.name: case for case in second if case.name in lost}
    return list(found.values())


def _file_of(folder: Path, name: str) -> str | None:
    """The file that has a test, from its dotted name."""
    parts = name.partition("::")[0].split(".")
    for end in range(len(parts), 0, -1):
        path = f"{'/'.join(parts[:end])}.py"
        if (folder / path).is_file():
            return path
    return None


def _built(runs: Runs, tests: Selected, package: str) -> Path:
    """A package of upstream's tests, in a folder of its own: not all processes are to see it."""
    folder = runs.environment.folder / "packages" / Path(package).name
    if not folder.exists():
        runs.environment.build(tests.folder / "tests" / package, folder)
    return folder


def _pytest(
    runs: Runs, label: str, tests: Selected, arguments: Iterable[str], *packages: str
) -> list[Case]:
    """Run tests/upstream with the packages that all tests import, and `packages` as well."""
    built = (_built(runs, tests, package) for package in (*tests.packages, *packages))
    folders = (runs.workspace.project.root / "tests", *built)
    # The seed is for what depends on the order of a set: it is the same on both wheels.
    env = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONHASHSEED": "0"}
    arguments = (f"--timeout={TEST_TIMEOUT}", *arguments)
    return runs.run(label, arguments, TIMEOUT, env, tests.folder, module="upstream")


def judge(release: str, stock: Iterable[Case], patched: Iterable[Case], tests: Selected) -> Verdict:
    """Compare the two runs.

    A test that passes on stock must pass on patched. One that the patches bring must pass there,
    be skipped, or fail for want of a GPU. What passes on neither is listed with the reason.
    """
    before, after = ({case.name: case for case in run} for run in (stock, patched))
    fail_to_pass: list[str] = []
    pass_to_pass: list[str] = []
    skipped: dict[str, str] = {}
    problems: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if new and new.outcome == "passed":
            (pass_to_pass if old and old.outcome == "passed" else fail_to_pass).append(name)
        elif old and old.outcome == "passed":
            problems.append(f"{name}: passes on stock, {_said(new)} on patched")
        elif new and tests.added(new) and not _may_fail(new):
            problems.append(f"{name}: the patches bring it, and it {_said(new)} on patched")
        elif new:
            skipped[name] = reason(new)
        elif old and not _is_collection(old):
            skipped[name] = f"on stock only: {reason(old)}"
    skipped |= dict.fromkeys(tests.missing, "this release has no such file")
    if len(fail_to_pass) + len(pass_to_pass) < FLOOR:
        problems.append(f"fewer than {FLOOR} tests pass: the surroundings broke")
    return Verdict(
        release,
        tuple(fail_to_pass),
        tuple(pass_to_pass),
        skipped,
        tuple(f"{release}: {line}" for line in problems),
    )


def _may_fail(case: Case) -> bool:
    return case.outcome == "skipped" or bool(re.search(NO_GPU, case.message))


def _is_collection(case: Case) -> bool:
    """Whether it stands for a whole file that could not be imported."""
    return case.name.startswith("::")


def _said(case: Case | None) -> str:
    return f"{case.outcome} ({case.first_line})" if case else "is not there"


def reason(case: Case) -> str:
    """Why a test does not pass here, in a few words and its own first line."""
    if case.outcome == "skipped":
        return f"skipped by itself: {case.first_line}"
    for pattern, words in REASONS:
        if found := re.search(pattern, case.message):
            return words.format(what=_what(found.groupdict()))
    return f"fails here: {case.first_line}"


def _what(groups: Mapping[str, str | None]) -> str:
    return next((value for value in groups.values() if value), "")
