"""`python -m weights FILE`: write what the release does with every checkpoint, as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before anything imports vllm, transformers or Triton.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"

import torch

import run_document
from matrix import driver
from matrix.cells import CAPABILITIES, DTYPES, KV_CACHE_DTYPES
from regress import fake_cuda, third_party
from run_progress import cpu_seconds, say

from . import checkpoints, launches, probe
from .checkpoints import Weights
from .probe import Outcome, Place

PRELOADED = "vllm.engine.arg_utils"
BY_CAPABILITY = "vllm.model_executor.layers.quantization.utils.w8a8_utils"
"""A module that asks for the GPU when it is imported, so that each process imports its own."""
MODULES = (
    "vllm.model_executor.layers.fused_moe.fused_moe",
    "vllm.attention.layer",
    "vllm.model_executor.models.mllama4",
)

Cell = tuple[Weights, Place]
AUTO = "auto"
EXPLICIT = tuple(dtype for dtype in DTYPES if dtype != AUTO)
GPU = "made-up"


def set_up() -> None:
    """Install the fake GPU, and load of vLLM what is the same for every GPU."""
    driver.install()
    torch.set_num_threads(1)
    launches.prepare()
    third_party.import_untuned(PRELOADED)
    if BY_CAPABILITY in sys.modules:
        raise RuntimeError(f"{BY_CAPABILITY} is imported before there is a GPU")


def become(capability: tuple[int, int]) -> None:
    """Have this process see a GPU of that capability, for good, and load the rest of vLLM."""
    fake_cuda.Device.capability = capability
    major, minor = capability
    fake_cuda.Device.properties = SimpleNamespace(
        name=GPU, gcnArchName=GPU, total_memory=fake_cuda.Device.total_memory,
        major=major, minor=minor, multi_processor_count=100,
    )  # fmt: skip
    for module in (*MODULES, probe.attention().module):
        third_party.import_untuned(module)
    driver.offer_flash_attention()
    offer_bitsandbytes()
    launches.install()
    probe.set_up()


_installed = ExitStack()


def offer_bitsandbytes() -> None:
    """Have bitsandbytes count as installed, as it is for those who ask for it."""
    _installed.enter_context(third_party.stubbed(("bitsandbytes",)))
    package = importlib.import_module("bitsandbytes")
    vars(package).setdefault("__version__", "999")


def look(task: tuple[Path, tuple[int, int], list[Weights]]) -> dict[Cell, Outcome]:
    """Probe checkpoints on a GPU, in a process that knows no other."""
    folder, capability, chosen = task
    become(capability)
    probe.write_checkpoints(folder)
    found: dict[Cell, Outcome] = {}
    for weights, dtype in product(chosen, (*EXPLICIT, AUTO)):
        if dtype == AUTO:
            found |= look_at_default(folder, weights, capability, found)
            continue
        for kv_cache_dtype in KV_CACHE_DTYPES:
            place = Place(dtype, kv_cache_dtype, capability)
            if kv_cache_dtype == "auto":
                plain = found[weights, place] = probe.probe(folder, weights, place)
            else:
                refused = probe.probe_cache(folder, weights, place)
                found[weights, place] = plain if not refused.message or plain.message else refused
    return found


def look_at_default(
    folder: Path, weights: Weights, capability: tuple[int, int], found: dict[Cell, Outcome]
) -> dict[Cell, Outcome]:
    """Have the release choose a dtype, and return what is known with that."""
    place = Place(AUTO, "auto", capability)
    dtype = probe.default_dtype(folder, weights, place)
    return {
        (weights, replace(place, kv_cache_dtype=name)): dtype
        if isinstance(dtype, Outcome)
        else found[weights, Place(dtype, name, capability)]
        for name in KV_CACHE_DTYPES
    }


def run(folder: Path, chosen: list[Weights], jobs: int) -> dict[Cell, Outcome]:
    """Probe all cells."""
    context = multiprocessing.get_context("fork")
    start, found = time.monotonic(), dict[Cell, Outcome]()
    tasks = []
    for capability in CAPABILITIES:
        place = folder / "{}.{}".format(*capability)
        place.mkdir()
        tasks.append((place, capability, chosen))
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        for (_, capability, _), part in zip(tasks, pool.imap(look, tasks, 1), strict=True):
            found |= part
            say(f"{capability}: {len(part)} cells after {time.monotonic() - start:.0f} s")
    return found


def document(chosen: list[Weights], found: dict[Cell, Outcome]) -> dict[str, Any]:
    """Return the result: distinct outcomes, and their numbers row by row."""
    numbers: dict[Outcome, int] = {}
    rows = []
    for weights in chosen:
        places = (Place(*place) for place in product(DTYPES, KV_CACHE_DTYPES, CAPABILITIES))
        outcomes = [found[weights, place] for place in places]
        results = [numbers.setdefault(one, len(numbers)) for one in outcomes]
        rows.append({**dataclasses.asdict(weights), "results": results})
    return run_document.table(DTYPES, KV_CACHE_DTYPES, CAPABILITIES, numbers, rows)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="weights", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpoint", action="append", help="only these; for a quick look")
    options = parser.parse_args()
    chosen = [
        one
        for one in checkpoints.weights()
        if not options.checkpoint or one.checkpoint in options.checkpoint
    ]
    start = time.monotonic()
    set_up()
    say(f"vLLM loaded after {time.monotonic() - start:.0f} s")
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        found = run(Path(folder), chosen, options.jobs)
    say(f"{time.monotonic() - start:.0f} s in all, {cpu_seconds():.0f} s of CPU")
    options.file.write_text(json.dumps(document(chosen, found)), "utf-8")


if __name__ == "__main__":
    main()
