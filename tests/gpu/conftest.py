"""Fixtures: the checkpoint, the reference, and engines, each run once and shared by all workers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from filelock import FileLock

import fail_to_pass
import llama4_checkpoint
from fail_to_pass import pytest_collection_modifyitems as pytest_collection_modifyitems
from regress.releases import installed_release

from . import quantised
from .cases import Case, Checkpoint
from .engine import Answers, Settings, start
from .reference import Reference

TIMEOUT = 400.0
"""Seconds for one engine, of which starting it takes most."""

ENGINES_PER_GPU = 4

OF_OTHERS = (
    "Error in memory profiling",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
)
"""What an engine dies of where others on the same GPU take or free memory meanwhile."""

ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Workers are asked for their backend by a function, not by a name.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engines",
        type=Path,
        help="Keep here what engines answered, and take from here what they answered before: GPU "
        "time is short, and answers can be judged without. One folder for each vLLM.",
    )


def pytest_configure(config: pytest.Config) -> None:
    fail_to_pass.add_marker(config)


def pytest_xdist_auto_num_workers() -> int:
    """Engines as small as these leave room for others on their GPU."""
    return ENGINES_PER_GPU * max(1, int(torch.cuda.device_count()))


def pytest_report_header() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"vllm: {installed_release()}, torch: {torch.__version__}, GPUs: {gpus or 'none'}"]


@pytest.fixture(autouse=True)
def _gpu(pytestconfig: pytest.Config) -> None:
    if not torch.cuda.is_available() and not pytestconfig.getoption("--engines"):
        pytest.skip("no NVIDIA GPU")


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one run of pytest have in common, or several runs."""
    kept: Path | None = pytestconfig.getoption("--engines")
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        return kept.resolve()
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Callable[[Checkpoint], Path]:
    """Return a function that gives the folder of a model."""

    def get(which: Checkpoint) -> Path:
        folder = shared / which.value
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = folder.with_suffix(".partial")
                partial.mkdir()
                if which is Checkpoint.AWQ:
                    quantised.write_awq(partial)
                else:
                    changes = llama4_checkpoint.DEEP if which is Checkpoint.DEEP else {}
                    llama4_checkpoint.write(partial, which.reads_images, **changes)
                partial.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[Checkpoint], Path]) -> Callable[[Checkpoint], Reference]:
    """Return a function that gives the reference of a model."""
    loaded: dict[Checkpoint, Reference] = {}

    def get(which: Checkpoint) -> Reference:
        if which not in loaded:
            folder = checkpoint(which)
            if which is Checkpoint.AWQ:
                folder = folder / quantised.EXACT
            loaded[which] = Reference(folder, which.reads_images)
        return loaded[which]

    return get


@pytest.fixture(scope="session")
def answers(shared: Path, checkpoint: Callable[[Checkpoint], Path]) -> Callable[[Case], Answers]:
    """Return a function that gives what an engine answers, from an earlier test if it was run."""

    def get(case: Case) -> Answers:
        settings = case.settings(checkpoint(case.checkpoint))
        folder = shared / f"engine-{_key(case, settings)}"
        with FileLock(f"{folder}.lock"):
            found, died = folder / "answers.json", folder / "died"
            if not found.is_file() and not died.is_file():
                if case.gpus > torch.cuda.device_count():
                    pytest.skip(f"needs {case.gpus} NVIDIA GPUs, or a kept answer")
                package = "ray" if case.executor == "ray" else case.needs
                if package and not importlib.util.find_spec(package):
                    pytest.skip(f"needs the package {package}, or a kept answer")
                folder.mkdir(exist_ok=True)
                _run_engine(folder, settings, case.env, case.gpus)
        if died.is_file():
            pytest.fail(died.read_text("utf-8"))
        return Answers.read(found)

    return get


def _key(case: Case, settings: Settings) -> str:
    """The same for the same question, wherever it is asked and however much memory there is."""
    asked = dataclasses.asdict(settings)
    asked["model"] = case.checkpoint.value
    del asked["engine_args"]["gpu_memory_utilization"]
    text = json.dumps([asked, case.env], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_engine(folder: Path, settings: Settings, env: Mapping[str, str], gpus: int) -> None:
    """Run `engine.py`, which leaves answers.json, or leave `died` with the error.

    Further tries are for engines that start on one GPU at the same time.
    """
    for _ in range(5):
        try:
            done = start(folder, settings, {**ENV, **env, **_visible(gpus)}, TIMEOUT)
        except subprocess.TimeoutExpired:
            (folder / "died").write_text(f"engine died: no answer after {TIMEOUT:.0f} s", "utf-8")
            return
        (folder / "log").write_text(done.stdout + done.stderr, "utf-8")
        if not any(error in done.stderr for error in OF_OTHERS):
            break
    if done.returncode:
        error = f"engine died: {_last_error(done.stderr)}\n{done.stderr[-4000:]}"
        (folder / "died").write_text(error, "utf-8")


def _visible(gpus: int) -> dict[str, str]:
    """Spread the workers over the GPUs."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    count = torch.cuda.device_count()
    return {"CUDA_VISIBLE_DEVICES": ",".join(str((worker + i) % count) for i in range(gpus))}


def _last_error(stderr: str) -> str:
    """The last line that names an exception."""
    named = [line for line in stderr.splitlines() if "Error" in line]
    return named[-1] if named else "it said nothing"
