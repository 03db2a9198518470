"""Run tests/matrix, compiled, weights and settings in a release's environment, on its wheels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay.answers import compiled, flags, weights
from overlay.answers.compiled import Compiled
from overlay.answers.matrix import Matrix, Variant, from_run, summary
from overlay.answers.weights import Weights
from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing.environment import Environment
from overlay.wheels.build import wheel_of

#: What the tests need beside the wheel.
NEEDS = ("pytest", "hypothesis")


@dataclass(frozen=True)
class Program:
    """One of the programs that look at an installed release: a package of tests/."""

    module: str
    timeout: float
    """Seconds."""


#: A whole release takes 4 minutes on two cores.
MATRIX = Program("matrix", 1200.0)
#: A whole release takes 5 to 8 minutes on two cores.
TRITON = Program("compiled", 3600.0)
#: A whole release takes 2 minutes on two cores.
WEIGHTS = Program("weights", 1200.0)
#: Stock or patched, a release takes 1 to 2 minutes on two cores.
SETTINGS = Program("settings", 1200.0)


def run(
    workspace: Workspace, release: Release, folder: Path, variants: Sequence[Variant], jobs: int
) -> list[Matrix]:
    """Run tests/matrix on the wheels of `release`, in an environment under `folder`.

    Raises:
        OverlayError: the wheel can't be built, the environment can't be made, or the run breaks.
    """
    with _runner(workspace, release, folder, MATRIX, jobs) as runner:
        return [runner.matrix(variant) for variant in variants]


def run_triton(
    workspace: Workspace, release: Release, folder: Path, jobs: int, known: Path | None = None
) -> Compiled:
    """Run tests/compiled on the official wheel of `release`, in an environment under `folder`.

    Kernels whose result is in the file `known` are not compiled; those of others are added to it.

    Raises:
        OverlayError: the environment can't be made, or the run breaks.
    """
    with _runner(workspace, release, folder, TRITON, jobs) as runner:
        return runner.compiled(("--known", str(known)) if known else ())


def run_weights(workspace: Workspace, release: Release, folder: Path, jobs: int) -> Weights:
    """Run tests/weights on the official wheel of `release`, in an environment under `folder`.

    Raises:
        OverlayError: the environment can't be made, or the run breaks.
    """
    with _runner(workspace, release, folder, WEIGHTS, jobs) as runner:
        return runner.weights()


def run_settings(workspace: Workspace, release: Release, folder: Path, jobs: int) -> flags.Kept:
    """Run tests/settings on both wheels of `release`, in an environment under `folder`.

    Raises:
        OverlayError: the wheel can't be built, the environment can't be made, or the run breaks.
    """
    with _runner(workspace, release, folder, SETTINGS, jobs) as runner:
        return runner.settings()


@dataclass(frozen=True)
class _Runner:
    """Runs a program on the wheels of a release, which take turns in one environment."""

    workspace: Workspace
    environment: Environment
    folder: Path
    program: Program
    tests: Path
    jobs: int

    def matrix(self, variant: Variant) -> Matrix:
        """The matrix of a wheel."""
        start = time.monotonic()
        matrix = from_run(self._result(variant, variant), variant)
        self._say(summary(matrix), start)
        return matrix

    def compiled(self, options: Sequence[str]) -> Compiled:
        """What Triton makes of the kernels."""
        start = time.monotonic()
        made = compiled.from_run(self._result("stock", "triton", options))
        self._say(compiled.summary(made), start)
        return made

    def weights(self) -> Weights:
        """What the release does with weights of every format."""
        start = time.monotonic()
        made = weights.from_run(self._result("stock", "weights"))
        self._say(weights.summary(made), start)
        return made

    def settings(self) -> flags.Kept:
        """What settings change, stock and patched."""
        start = time.monotonic()
        made = flags.from_runs(
            {variant: self._result(variant, f"settings-{variant}") for variant in flags.VARIANTS}
        )
        self._say(flags.summary(made), start)
        return made

    def _say(self, text: str, start: float) -> None:
        log = log_for(self.environment.release.name)
        log.info("%s after %.0f s", text, time.monotonic() - start)

    def _result(self, variant: Variant, label: str, options: Sequence[str] = ()) -> Any:
        """Run the program; its output and what it says stay in files named after `label`."""
        dist = self.folder / "dist"
        wheel = wheel_of(self.workspace, self.environment.release, variant == "stock", dist)
        self.environment.install(str(wheel), *NEEDS)
        result, log = self.folder / f"{label}.json", self.folder / f"{label}.log"
        result.unlink(missing_ok=True)
        arguments = ["-m", self.program.module, str(result), "--jobs", str(self.jobs), *options]
        timeout = self.program.timeout
        try:
            env = {"PYTHONPATH": str(self.tests)}
            done = self.environment.run(arguments, env, self.folder, timeout)
        except subprocess.TimeoutExpired as error:
            raise self._broken(f"no end after {timeout:.0f} s", variant, log) from error
        log.write_text(done.stdout + done.stderr, "utf-8")
        if done.returncode or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise self._broken(last, variant, log)
        return json.loads(result.read_text("utf-8"))

    def _broken(self, why: str, variant: Variant, log: Path) -> OverlayError:
        release, name = self.environment.release.name, self.program.module
        return OverlayError(
            f"{release}: tests/{name} broke on the {variant} wheel", re.sub(r"\s+", " ", why),
            f"Look into {log}", Exit.ENVIRONMENT,
        )  # fmt: skip


@contextmanager
def _runner(
    workspace: Workspace, release: Release, folder: Path, program: Program, jobs: int
) -> Iterator[_Runner]:
    """Make the environment, which goes at the end, as do wheels."""
    tests = workspace.project.root / "tests"
    if not (tests / program.module).is_dir():
        raise OverlayError(
            "no matrix to run here", f"{tests / program.module} does not exist",
            "Run it in a checkout of the overlay", Exit.USAGE,
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    cache = workspace.fetcher.cache.folder
    environment = Environment.create(folder / "venv", release, workspace.versions.python, cache)
    try:
        yield _Runner(workspace, environment, folder, program, tests, jobs)
    finally:
        for used in (environment.folder, folder / "dist"):
            shutil.rmtree(used, ignore_errors=True)
        environment.cache.forget(workspace.versions.upstream.project)
