"""pytest on a release's stock wheel, then on the patched one, both installed as a user would.

They take turns in one environment, which is made when the first of them is needed.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from overlay.base.console import log_for
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.testing import junit
from overlay.testing.environment import Environment
from overlay.testing.junit import Case
from overlay.wheels.build import wheel_of

Which = Literal["stock", "patched"]


@dataclass(frozen=True)
class Runs:
    """The runs of one suite on one release; junit XML and pytest's output stay in `folder`."""

    workspace: Workspace
    release: Release
    folder: Path
    needs: tuple[str, ...]
    """Requirements of the tests beside the wheel."""

    @contextmanager
    def kept(self, keep: bool) -> Iterator[None]:
        """The environment and the patched wheel go at the end, unless `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if not keep:
                for used in (self.folder / "venv", self.folder / "dist"):
                    shutil.rmtree(used, ignore_errors=True)
                if "environment" in vars(self):  # else it was never made
                    self.environment.cache.forget(self.workspace.versions.upstream.project)

    @cached_property
    def environment(self) -> Environment:
        """A new environment for the release, with nothing in it."""
        return Environment.create(
            self.folder / "venv",
            self.release,
            self.workspace.versions.python,
            self.workspace.fetcher.cache.folder,
        )

    def wheel(self, which: Which) -> Path:
        """The official wheel, checked, or the patched one, built."""
        return wheel_of(self.workspace, self.release, which == "stock", self.folder / "dist")

    def install(self, which: Which) -> None:
        """Install a wheel, in place of the other one.

        Raises:
            OverlayError: it is unavailable, or uv refuses.
        """
        start = time.monotonic()
        self.environment.install(str(self.wheel(which)), *self.needs)
        took = time.monotonic() - start
        log_for(self.release.name).info("%s: installed after %.0f s", which, took)

    def run(
        self,
        label: str,
        arguments: Sequence[str],
        timeout: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        module: str = "pytest",
    ) -> list[Case]:
        """Run pytest with `arguments` for at most `timeout` seconds, on what is installed.

        `label` names the run in the log and in its files; `module` is what to run as pytest.

        Raises:
            OverlayError: pytest itself breaks. A failing test is no exception: it is among the
                cases.
        """
        log = log_for(self.release.name)
        xml, output = self.folder / f"{label}.xml", self.folder / f"{label}.log"
        xml.unlink(missing_ok=True)
        command = ["-m", module, *arguments, f"--junitxml={xml}"]
        start = time.monotonic()
        try:
            done = self.environment.run(command, env or {}, cwd or self.folder, timeout)
        except subprocess.TimeoutExpired as error:
            raise self._broken(label, f"no end after {timeout:.0f} s") from error
        said = done.stdout + done.stderr
        output.write_text(said, "utf-8")
        if done.returncode not in (0, 1) or not xml.is_file():
            last = said.strip().splitlines()[-1:] or ["it said nothing"]
            raise self._broken(label, f"exit status {done.returncode}: {last[0]}; see {output}")
        cases = junit.read(xml)
        bad = sum(case.outcome in ("failed", "error") for case in cases)
        took = time.monotonic() - start
        log.info("%s: %d tests, %d failed, %.0f s", label, len(cases), bad, took)
        return cases

    def _broken(self, label: str, why: str) -> OverlayError:
        return OverlayError(
            f"{self.release.name}: pytest broke in the run {label}", why,
            "Run it again with --keep and look into the environment", Exit.ENVIRONMENT,
        )  # fmt: skip
