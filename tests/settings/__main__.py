"""`python -m settings FILE`: write where settings change what the release does, as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matrix.__main__ as whole
import run_document
from matrix import limits, probe
from matrix.cells import CAPABILITIES, UNSET, V1, Cell, Row, Setting
from matrix.outcome import Outcome, of_error
from matrix.probe import Found, Key
from regress import third_party
from run_progress import cpu_seconds, say

from . import asked, measure, workers
from .limits import LIMITS

BACKENDS = ("XFORMERS", "TRITON_ATTN_VLLM_V1", "TRITON_ATTN")
"""Names that users set, with VLLM_USE_V1 unset. The last one is what 0.11.0 calls the second."""
DTYPES = ("auto", "float16")
"""bfloat16 is what `auto` comes to where the GPU has it."""
KV_CACHE_DTYPES = ("auto", "fp8")
GPUS = 8
"""Of the machine: as many as the settings want."""
PRELOADED = ("vllm.executor.ray_utils", "vllm.v1.worker.gpu_model_runner", "xformers.ops")

Place = tuple[str, Cell]
"""A setting's name, or nothing, and the cell."""


def rows(backends: Sequence[str]) -> Iterator[Row]:
    """Return the rows that are asked, all of them without FlashInfer.

    Within a chunk all attention is right, so that there only the default is asked.
    """
    yield from (Row(UNSET, v1, "past", flashinfer=False) for v1 in V1)
    for backend in backends:
        yield Row(backend, UNSET, "past", flashinfer=False)
    yield Row(UNSET, UNSET, "at", flashinfer=False)


def cells(row: Row) -> list[Cell]:
    """Return the cells of a row in the order of the file."""
    places = product(DTYPES, KV_CACHE_DTYPES, CAPABILITIES)
    return [Cell(row, *place) for place in places]


@dataclass(frozen=True)
class Unit:
    """What one process does: the cells of one GPU."""

    folder: Path
    backends: tuple[str, ...]
    settings: tuple[Setting, ...]
    capability: tuple[int, int]

    def cells(self) -> Iterator[Cell]:
        """Return its cells, each without a setting and with every one."""
        for row in rows(self.backends):
            for cell in cells(row):
                if cell.capability == self.capability:
                    yield cell
                    yield from (replace(cell, setting=one) for one in self.settings)


def set_up() -> None:
    """Install the fake GPUs, and load vLLM."""
    whole.set_up()
    for name in PRELOADED:
        third_party.import_untuned(name)
    registry = importlib.import_module("vllm.model_executor.models.registry")
    # That of the models which propose tokens would see no GPU there, and take half a minute each.
    setattr(registry, "_run_in_subprocess", lambda look: look())  # noqa: B010
    for module in [one for name, one in sys.modules.items() if name.startswith("vllm.")]:
        if hasattr(module, "cuda_device_count_stateless"):
            setattr(module, "cuda_device_count_stateless", lambda: GPUS)  # noqa: B010


def select(unit: Unit) -> list[tuple[Cell, Found]]:
    """Probe the cells of a unit, in a process of its own: nothing is remembered of other GPUs."""

    @functools.cache
    def refusal(name: str, engine: str) -> Exception | None:
        return workers.refusal(unit.folder, examples[name, engine], engine)

    found, examples = [], dict[tuple[str, str], Cell]()
    for cell in unit.cells():
        one = probe.probe(unit.folder, "llama4", cell)
        if one.key is not None and cell.setting is not None:
            examples.setdefault((cell.setting.name, one.key.engine), cell)
            error = refusal(cell.setting.name, one.key.engine)
            if error is not None:
                outcome = of_error(error, "load", one.key.engine)
                one = Found(replace(outcome, backend=one.key.backend))
        found.append((cell, one))
    return found


def compute(task: tuple[Path, dict[Key, Cell]]) -> dict[Key, Outcome]:
    """Compute what cells of keys answer that are of one GPU, in a process of its own."""
    folder, cells_of = task
    return {key: measure.measure(folder, key, cell) for key, cell in cells_of.items()}


def judge(cell: Cell, found: Found, computed: dict[Key, Outcome]) -> Outcome:
    """Return what becomes of a cell on the GPU."""
    if found.key is None:
        return found.outcome
    size, outcome = found.key.block_size, computed[found.key]
    return limits.judge(cell, found.dtype, size, outcome, LIMITS)


def run(
    folder: Path, backends: Sequence[str], settings: Sequence[Setting], jobs: int
) -> dict[Place, Outcome]:
    """Probe all cells with every setting, compute what they select, and join the two."""
    units = [
        Unit(folder, tuple(backends), tuple(settings), capability) for capability in CAPABILITIES
    ]
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        start = time.monotonic()
        found = [one for part in pool.imap(select, units, 1) for one in part]
        say(f"{len(found)} cells selected after {time.monotonic() - start:.0f} s")
        tasks = dict[tuple[int, int], dict[Key, Cell]]()
        for key, cell in whole.distinct(found).items():
            tasks.setdefault(cell.capability, {})[key] = cell
        made = pool.imap(compute, [(folder, task) for task in tasks.values()], 1)
        computed = {key: outcome for part in made for key, outcome in part.items()}
        say(f"{len(computed)} computed after {time.monotonic() - start:.0f} s")
    return {
        (cell.setting.name if cell.setting else "", replace(cell, setting=None)): judge(
            cell, one, computed
        )
        for cell, one in found
    }


def document(
    backends: Sequence[str], known: Iterable[Setting], found: dict[Place, Outcome]
) -> dict[str, Any]:
    """Return the result: outcomes that a setting makes others, and their numbers cell by cell; none
    where it changes nothing."""
    numbers: dict[Outcome, int] = {}
    table = []
    for setting, row in product([one.name for one in known], rows(backends)):
        changed = [
            None
            if found[setting, cell] == found["", cell]
            else numbers.setdefault(found[setting, cell], len(numbers))
            for cell in cells(row)
        ]
        table.append({"setting": setting, **dataclasses.asdict(row), "results": changed})
    return run_document.table(DTYPES, KV_CACHE_DTYPES, CAPABILITIES, numbers, table)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="settings", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--setting", action="append", help="only these; for a quick look")
    options = parser.parse_args()
    start = time.monotonic()
    set_up()
    say(f"vLLM loaded after {time.monotonic() - start:.0f} s")
    probe.speed_up()
    names = probe.backend_names()
    backends = [name for name in BACKENDS if name in names]
    with tempfile.TemporaryDirectory(prefix="settings-") as name:
        folder = Path(name)
        probe.write_models(folder)
        asked.write_models(folder)
        chosen = [
            one
            for one in asked.SETTINGS
            if not options.setting or one.name in options.setting
            if not asked.absent(one, folder)
        ]
        found = run(folder, backends, chosen, options.jobs)
    say(f"{time.monotonic() - start:.0f} s in all, {cpu_seconds():.0f} s of CPU")
    options.file.write_text(json.dumps(document(backends, chosen, found)), "utf-8")


if __name__ == "__main__":
    main()
