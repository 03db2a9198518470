"""`python -m matrix FILE`: write what the installed release does in every cell, as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before anything imports vllm, transformers or Triton.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"

import torch

import run_document
from regress import fake_cuda, third_party
from regress.releases import V1_ALONE, installed_release
from run_progress import cpu_seconds, say

from . import driver, limits, measure, probe
from .cells import CAPABILITIES, DTYPES, KV_CACHE_DTYPES, UNSET, Cell, cells, rows
from .outcome import Outcome
from .probe import Found, Key

Model = str
PRELOADED = (
    "vllm.engine.arg_utils",
    "vllm.attention.layer",
    "vllm.attention.selector",
    "vllm.model_executor.models.llama4",
    "vllm.worker.worker",
    "vllm.v1.worker.gpu_worker",
)


@dataclass(frozen=True)
class Unit:
    """What one process does: the cells of one GPU, with or without FlashInfer."""

    folder: Path
    backends: tuple[str, ...]
    capability: tuple[int, int]
    flashinfer: bool

    def cells(self) -> list[Cell]:
        """Return its cells."""
        return [
            cell
            for row in rows(self.backends)
            if row.flashinfer == self.flashinfer
            for cell in cells(row)
            if cell.capability == self.capability
        ]


def exists(module: str) -> bool:
    """Return whether the release has a module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor has it the package
        return False


def set_up() -> None:
    """Install the fake GPU and load vLLM."""
    driver.install()
    torch.set_num_threads(1)
    for module in PRELOADED:
        if exists(module):
            third_party.import_untuned(module)
    if installed_release() in V1_ALONE:
        third_party.import_untuned(probe.LAST_ENGINE)
    driver.offer_flash_attention()


def flashinfer(is_installed: bool) -> AbstractContextManager[None]:
    """Have FlashInfer installed, or not."""
    return third_party.stubbed(("flashinfer",) if is_installed else ())


def select(unit: Unit) -> dict[tuple[Model, Cell], Found]:
    """Probe the cells of a unit, in a process of its own: nothing is remembered of other GPUs."""
    fake_cuda.Device.capability = unit.capability
    found: dict[tuple[Model, Cell], Found] = {}
    with flashinfer(unit.flashinfer):
        for cell in unit.cells():
            found["llama4", cell] = probe.probe(unit.folder, "llama4", cell)
            # Where the chunk ends is nothing to a model without one: both lengths are one cell.
            past = replace(cell, row=replace(cell.row, length="past"))
            if ("control", past) not in found:
                found["control", past] = probe.probe(unit.folder, "control", past)
            found["control", cell] = found["control", past]
    return found


def compute(task: tuple[Path, Key, Cell]) -> tuple[Key, Outcome]:
    """Compute what cells of one key answer, in a process of its own."""
    folder, key, cell = task
    with flashinfer(cell.row.flashinfer):
        return key, measure.measure(folder, key, cell)


def distinct(found: Iterable[tuple[Cell, Found]]) -> dict[Key, Cell]:
    """Return, by key, the first cell that has it."""
    keys: dict[Key, Cell] = {}
    for cell, one in found:
        if one.key is not None:
            keys.setdefault(one.key, cell)
    return keys


def run(folder: Path, backends: Sequence[str], jobs: int) -> dict[tuple[Model, Cell], Outcome]:
    """Probe all cells, compute what they select, and join the two."""
    probe.write_models(folder)
    units = [
        Unit(folder, tuple(backends), capability, flashinfer)
        for flashinfer in (False, True)
        for capability in CAPABILITIES
    ]
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        start = time.monotonic()
        found = {cell: one for part in pool.imap(select, units, 1) for cell, one in part.items()}
        say(f"{len(found)} cells selected after {time.monotonic() - start:.0f} s")
        keys = distinct((cell, one) for (_, cell), one in found.items())
        tasks = [(folder, key, cell) for key, cell in keys.items()]
        computed = dict(pool.imap(compute, tasks, 1))
        say(f"{len(keys)} computed after {time.monotonic() - start:.0f} s")
    return {
        (model, cell): one.outcome
        if one.key is None
        else limits.judge(cell, one.dtype, one.key.block_size, computed[one.key])
        for (model, cell), one in found.items()
    }


def document(backends: Sequence[str], found: dict[tuple[Model, Cell], Outcome]) -> dict[str, Any]:
    """Return the result: distinct outcomes, and their numbers cell by cell."""
    numbers: dict[Outcome, int] = {}
    table = []
    for row in rows(backends):
        line: dict[str, Any] = dataclasses.asdict(row)
        for model in probe.MODELS:
            outcomes = [found[model, cell] for cell in cells(row)]
            line[model] = [numbers.setdefault(one, len(numbers)) for one in outcomes]
        table.append(line)
    return run_document.table(DTYPES, KV_CACHE_DTYPES, CAPABILITIES, numbers, table)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="matrix", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--backend", action="append", help="only these names; for a quick look")
    options = parser.parse_args()
    start = time.monotonic()
    set_up()
    say(f"vLLM loaded after {time.monotonic() - start:.0f} s")
    probe.speed_up()
    backends = options.backend or [UNSET, *probe.backend_names()]
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        found = run(Path(folder), backends, options.jobs)
    say(f"{time.monotonic() - start:.0f} s in all, {cpu_seconds():.0f} s of CPU")
    options.file.write_text(json.dumps(document(backends, found)), "utf-8")


if __name__ == "__main__":
    main()
