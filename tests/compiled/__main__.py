"""`python -m compiled FILE`: write what Triton makes of each kernel on each GPU, as JSON."""

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
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before anything imports vllm or Triton.
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"

from matrix import driver
from matrix.outcome import place_of
from regress import fake_cuda, third_party
from regress.releases import installed_release
from run_progress import cpu_seconds, say

from . import collect, launches
from .attempt import Result, attempt, message_of, one_line
from .cards import CARDS, Card
from .outcome import Outcome, worst

PRELOADED = ("vllm.attention.layer", launches.FUSED_MOE)
BY_CAPABILITY = "vllm.attention.ops."
"""Modules that ask for the GPU when they are imported, so that each process imports its own."""

SLOW = 20.0
"""Seconds from which on a compile is named in the log."""

Row = tuple[str, str, str]
"""Of a launch: use, kind and dtype."""
Results = dict[str, Result]
"""By all that went into a compile."""


def set_up() -> None:
    """Install the fake GPU, and load of vLLM and Triton what is the same for every GPU."""
    driver.install()
    fake_cuda.Device.properties = SimpleNamespace(gcnArchName=fake_cuda.Device.name)
    for module in PRELOADED:
        third_party.import_untuned(module)
    early = [name for name in sys.modules if name.startswith(BY_CAPABILITY)]
    assert not early, f"imported before there is a GPU: {early}"
    # Reads all of Triton's files, to tell its versions apart.
    importlib.import_module("triton.compiler.compiler").triton_key()


def compile_for(task: tuple[Card, Results]) -> tuple[dict[Row, Outcome], Results]:
    """Compile all that Llama 4 launches on a GPU, in a process that knows no other.

    Returns what decides, launch by launch, and the results of the kernels that were not known.
    """
    card, known = task
    fake_cuda.Device.capability = card.capability
    launches.install()
    collect.install(card)
    results = dict(known)
    outcomes = {
        (launch.use, launch.kind, launch.dtype): outcome_of(launch, card, results)
        for launch in launches.launches()
    }
    return outcomes, {key: result for key, result in results.items() if key not in known}


def outcome_of(launch: launches.Launch, card: Card, results: Results) -> Outcome:
    """Compile the kernels of a launch that have no result yet, and return what decides."""
    if refusal := launch.refusal(card.capability):
        return Outcome(message=refusal)
    with collect.collecting() as collected:
        try:
            launch.run()
        except Exception as error:
            said = message_of(error) if str(error) else f"{type(error).__name__}: {place_of(error)}"
            return Outcome(message=one_line(said))
    if not collected.kernels:
        raise RuntimeError(f"{launch.use} of {launch.kind} in {launch.dtype} launches nothing")
    return worst((one.name, result_of(one, card, results)) for one in collected.kernels)


def result_of(kernel: collect.Kernel, card: Card, results: Results) -> Result:
    """Compile a kernel, unless it is known what it comes to."""
    key = f"{metadata.version('triton')} {card.shared} {kernel.key}"
    if key not in results:
        start = time.monotonic()
        results[key] = attempt(kernel.compile)
        took = time.monotonic() - start
        if took > SLOW:
            say(f"{card.name}: {kernel.name} took {took:.0f} s")
    return results[key]


def run(cards: Sequence[Card], jobs: int, known: Results) -> dict[Card, dict[Row, Outcome]]:
    """Compile for each GPU, and add to what is known."""
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    found = {}
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        tasks = [(card, dict(known)) for card in cards]
        for card, (outcomes, new) in zip(cards, pool.imap(compile_for, tasks, 1), strict=True):
            found[card] = outcomes
            known.update(new)
            took = time.monotonic() - start
            say(f"{card.name}: {len(outcomes)} launches, {len(new)} compiled, {took:.0f} s")
    return found


def document(found: dict[Card, dict[Row, Outcome]]) -> dict[str, Any]:
    """Return the result: distinct outcomes, and their numbers row by row."""
    numbers: dict[Outcome, int] = {}
    rows = []
    for use, kind, dtype in dict.fromkeys(row for outcomes in found.values() for row in outcomes):
        results = [outcomes[use, kind, dtype] for outcomes in found.values()]
        places = [numbers.setdefault(one, len(numbers)) for one in results]
        rows.append({"use": use, "kind": kind, "dtype": dtype, "results": places})
    return {
        "release": installed_release(),
        "triton": metadata.version("triton"),
        "gpus": [{"capability": card.name, "shared": card.shared} for card in found],
        "outcomes": [dataclasses.asdict(outcome) for outcome in numbers],
        "rows": rows,
    }


def chosen(names: Iterable[str]) -> list[Card]:
    """Return the GPUs of these capabilities; all that the release has, if there are none."""
    wanted, release = set(names), installed_release()
    return [card for card in CARDS if (card.name in wanted if wanted else release in card.releases)]


def read_known(path: Path | None) -> Results:
    """Return the results of earlier runs."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text("utf-8"))
    return {key: Result(*result) for key, result in kept.items()}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="compiled", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--capability", action="append", default=[], help="only these GPUs")
    parser.add_argument(
        "--known", type=Path, help="keep results here; the next release compiles what is new"
    )
    options = parser.parse_args()
    start = time.monotonic()
    set_up()
    say(f"vLLM loaded after {time.monotonic() - start:.0f} s")
    known = read_known(options.known)
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        found = run(chosen(options.capability), options.jobs, known)
    say(f"{time.monotonic() - start:.0f} s in all, {cpu_seconds():.0f} s of CPU")
    if options.known:
        kept = {key: dataclasses.astuple(result) for key, result in known.items()}
        options.known.write_text(json.dumps(kept), "utf-8")
    options.file.write_text(json.dumps(document(found)), "utf-8")


if __name__ == "__main__":
    main()
