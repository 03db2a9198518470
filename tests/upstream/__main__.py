"""Run upstream's test files, each in a fork of a process that has vLLM loaded already.

No file sees what another one left behind, one that crashes or hangs takes no other with it, and
vLLM is loaded once. What the tests run in stands in for what is not here: a hub in a folder, and a
made-up GPU with a capability and no kernels. It changes no test: one that computes on the GPU
fails, and is listed with that reason.

    python -m upstream --junitxml=FILE [--timeout=SECONDS] [--plugins=NAMES] PATH...
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest

#: Seconds for one file, as a multiple of what one test may take.
FILE_FACTOR = 4
#: What of junit XML makes pytest exit with 1.
BAD = ("failure", "error")
#: What pytest -v adds to a test's line when the test is over.
OUTCOME = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


@dataclass(frozen=True)
class Child:
    """A process that runs one file."""

    path: str
    without: tuple[str, ...]
    """Node ids of its tests that ended such a process before."""
    folder: Path
    deadline: float
    """By the monotonic clock."""

    @property
    def xml(self) -> Path:
        return self.folder / "junit.xml"

    @property
    def output(self) -> Path:
        return self.folder / "output"


def main() -> int:
    """Exit status of pytest: 0 all passed, 1 some failed, 5 there are none."""
    parser = argparse.ArgumentParser(prog="python -m upstream")
    parser.add_argument("--junitxml", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--plugins", default="", help="the value of VLLM_PLUGINS")
    parser.add_argument("paths", nargs="+", metavar="PATH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
        prepare(Path(folder, "hub"), options.plugins)
        suites = run(sorted(files(options.paths)), options.timeout, Path(folder))
    root = ElementTree.Element("testsuites")
    root.extend(suites)
    ElementTree.ElementTree(root).write(options.junitxml, "utf-8", xml_declaration=True)
    if root.find(".//testcase") is None:
        return 5
    return int(any(root.find(f".//{bad}") is not None for bad in BAD))


def prepare(hub_folder: Path, plugins: str) -> None:
    """Set up what the tests run in, and load what nearly all of them import."""
    os.environ |= {
        "HF_HOME": str(hub_folder),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import numpy
    import torch

    from regress import fake_cuda

    from . import hub

    hub.write(hub_folder)
    if plugins:  # one of them is the platform
        fake_cuda.hide_gpu()
        os.environ["VLLM_PLUGINS"] = plugins
    else:
        fake_cuda.install()
    for load in (
        partial(importlib.import_module, "tests.conftest"),
        partial(importlib.import_module, "vllm.v1.core.sched.scheduler"),
        partial(inspect_models, hub.CONFIGS.values()),
    ):
        try:
            load()
        except Exception as error:
            # Not ours to judge: each test that needs it will say so.
            print(f"{load} failed: {error!r}")
    # Some tests draw numbers without a seed; the two wheels are to draw the same.
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    gc.collect()
    # Upstream collects garbage after each test: of what is loaded by now, there is none.
    gc.freeze()


def inspect_models(configs: Iterable[dict[str, Any]]) -> None:
    """Let vLLM find out what the hub's models are, which it remembers.

    It does so in a process of its own, to keep clear of CUDA, and takes seconds for each.
    """
    from vllm.model_executor.models import ModelRegistry, registry

    with mock.patch.object(registry, "_run_in_subprocess", lambda function: function()):
        for name in {name for config in configs for name in config["architectures"]}:
            registry._try_inspect_model_cls(name, ModelRegistry.models[name])


def files(paths: Iterable[str]) -> set[str]:
    """The test files that `paths` are or hold."""
    found: set[str] = set()
    for path in map(Path, paths):
        inside = path.rglob("test_*.py") if path.is_dir() else [path]
        found.update(file.as_posix() for file in inside)
    return found


def run(paths: list[str], timeout: float, folder: Path) -> list[ElementTree.Element]:
    """Run the files, as many at once as there are cores. Returns the junit suites."""
    suites: list[ElementTree.Element] = []
    running: dict[int, Child] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [(path, ()) for path in paths]
    cores = len(os.sched_getaffinity(0))
    started = 0
    while waiting or running:
        while waiting and len(running) < cores:
            started += 1
            deadline = time.monotonic() + FILE_FACTOR * timeout
            child = Child(*waiting.pop(0), folder / str(started), deadline)
            running[start(child, timeout)] = child
        pid, status = wait(running)
        child = running.pop(pid)
        print(child.output.read_text("utf-8", errors="replace"))
        print(f"{child.path}: exit status {status}, {len(waiting)} files wait", flush=True)
        if child.xml.is_file():
            suites += ElementTree.parse(child.xml).getroot().iter("testsuite")
            continue
        late = time.monotonic() > child.deadline
        node = last_started(child)
        suites.append(ended(node, "does not end" if late else f"ended the process ({status})"))
        if not late and node not in (child.path, *child.without):
            waiting.append((child.path, (*child.without, node)))
    return suites


def start(child: Child, timeout: float) -> int:
    """Fork a process that runs pytest on the file; its id is its process group's too."""
    child.folder.mkdir()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with child.output.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = pytest.main([
        "-p", "no:cacheprovider", "-v", "--tb=short", f"--timeout={timeout}",
        f"--basetemp={child.folder / 'tmp'}", f"--junitxml={child.xml}", child.path,
        *(f"--deselect={node}" for node in child.without),
    ])  # fmt: skip
    sys.stdout.flush()
    os._exit(status)  # without the exit handlers of all that is loaded


def wait(running: dict[int, Child]) -> tuple[int, int]:
    """Wait until one of them ends, and kill those past their deadline. Returns id and status."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            kill(pid)  # what it has left running
            return pid, os.waitstatus_to_exitcode(status)
        for late in (pid for pid, child in running.items() if time.monotonic() > child.deadline):
            kill(late)
        time.sleep(0.02)


def kill(group: int) -> None:
    """Kill a process group, if there is anything of it."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def last_started(child: Child) -> str:
    """The node id of the test that ended its process; the file, if it was in none."""
    lines = child.output.read_text("utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.startswith(f"{child.path}::")), "")
    return child.path if not last or OUTCOME.search(last) else last.strip()


def ended(node: str, how: str) -> ElementTree.Element:
    """A junit suite for a test that has none."""
    path, *inside = node.split("::")
    names = [path.removesuffix(".py").replace("/", "."), *inside]
    suite = ElementTree.Element("testsuite")
    where = {"classname": ".".join(names[:-1]), "name": names[-1]}
    case = ElementTree.SubElement(suite, "testcase", where)
    ElementTree.SubElement(case, "error", message=how)
    return suite


if __name__ == "__main__":
    sys.exit(main())
