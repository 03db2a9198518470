"""Make the matrix of a release: run tests/matrix in its environment, on its wheels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from overlay.answers.matrix import FOLDER, Matrix, Variant, from_run, summary
from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing.environment import Environment
from overlay.wheels.build import wheel_of

#: What tests/matrix needs beside the wheel.
NEEDS = ("pytest", "hypothesis")
#: Seconds; a whole release takes 4 minutes on two cores.
TIMEOUT = 1200.0


def run(
    workspace: Workspace, release: Release, folder: Path, variants: Sequence[Variant], jobs: int
) -> list[Matrix]:
    """Run tests/matrix on the wheels of `release`, in an environment under `folder`.

    Raises:
        OverlayError: the wheel can't be built, the environment can't be made, or the run breaks.
    """
    tests = workspace.project.root / "tests"
    if not (tests / FOLDER).is_dir():
        raise OverlayError(
            "no matrix to run here", f"{tests / FOLDER} does not exist",
            "Run it in a checkout of the overlay", Exit.USAGE,
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    cache = workspace.fetcher.cache.folder
    environment = Environment.create(folder / "venv", release, workspace.versions.python, cache)
    try:
        return [
            _run_one(workspace, environment, tests, folder, variant, jobs) for variant in variants
        ]
    finally:
        for used in (environment.folder, folder / "dist"):
            shutil.rmtree(used, ignore_errors=True)
        environment.cache.forget(workspace.versions.upstream.project)


def _run_one(
    workspace: Workspace,
    environment: Environment,
    tests: Path,
    folder: Path,
    variant: Variant,
    jobs: int,
) -> Matrix:
    release = environment.release
    log = log_for(release.name)
    wheel = wheel_of(workspace, release, variant == "stock", folder / "dist")
    environment.install(str(wheel), *NEEDS)
    result = folder / f"{variant}.json"
    result.unlink(missing_ok=True)
    arguments = ["-m", "matrix", str(result), "--jobs", str(jobs)]
    start = time.monotonic()
    try:
        done = environment.run(arguments, {"PYTHONPATH": str(tests)}, folder, TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise _broken(release, variant, f"no end after {TIMEOUT:.0f} s", folder) from error
    (folder / f"{variant}.log").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode or not result.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise _broken(release, variant, last, folder)
    matrix = from_run(json.loads(result.read_text("utf-8")), variant)
    log.info("%s after %.0f s", summary(matrix), time.monotonic() - start)
    return matrix


def _broken(release: Release, variant: Variant, why: str, folder: Path) -> OverlayError:
    return OverlayError(
        f"{release.name}: the matrix broke on the {variant} wheel", re.sub(r"\s+", " ", why),
        f"Look into {folder / f'{variant}.log'}", Exit.ENVIRONMENT,
    )  # fmt: skip
