"""What a verdict rests on: what a GPU ran, CPUs computed, binaries have, Triton compiles, or else.

`explain` says it in words and the report marks each cell with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from overlay.answers.evidence import Run
from overlay.answers.matrix import Outcome

Name = Literal["gpu", "cpu stand-ins", "constructed", "start-up", "binaries", "compiled", "sources"]


@dataclass(frozen=True)
class Basis:
    """A kind of evidence."""

    tag: str
    """Three letters, for a cell."""
    meaning: str
    """A sentence."""


#: Every kind, what weighs most first.
BASES: Mapping[Name, Basis] = {
    "gpu": Basis("gpu", "A GPU of this capability ran whole engines, against Transformers."),
    "cpu stand-ins": Basis(
        "cpu", "One layer was computed on a CPU, against a reference, with stand-ins for kernels."
    ),
    "constructed": Basis("lay", "The layers were constructed, and not computed."),
    "start-up": Basis(
        "cfg", "The release's own start-up was run on a made-up GPU, and came to this."
    ),
    "binaries": Basis("bin", "Read from the fat binaries of the official wheels."),
    "compiled": Basis("tri", "Triton's kernels were compiled ahead of time, without a GPU."),
    "sources": Basis("src", "Not computed; written in the sources of what is launched, or seen."),
}
#: What the matrix calls some of them.
_OF_MATRIX: Mapping[str, Name] = {
    "measured": "cpu stand-ins",
    "constructed": "constructed",
    "binaries": "binaries",
    "compiled": "compiled",
    "": "start-up",
}


def name_of(outcome: Outcome, runs: Sequence[Run] = (), tree: str = "") -> Name:
    """What an outcome rests on; what weighs most, if there is more than one thing.

    `runs` are those that speak for it, and `tree` is that of the sources as they are now: a GPU
    counts if it ran these very sources, and came to the same.
    """
    is_right = outcome.verdict == "right"
    if any(run.tree == tree and (run.outcome == "passed") is is_right for run in runs):
        return "gpu"
    return _OF_MATRIX.get(outcome.basis, "sources")


def known_from(outcome: Outcome) -> str:
    """How the matrix knows an outcome."""
    known = {
        "measured": "measured on CPU stand-ins: one layer, against a reference",
        "constructed": "the layers were constructed, not computed",
        "binaries": "read from the fat binaries of the official wheels",
        "compiled": "compiled ahead of time, without a GPU",
        "layers": "the release's own layers, constructed and run without a GPU up to the kernels",
    }
    return known.get(outcome.basis, f"not computed; known from {outcome.basis}")


def on_gpus(outcome: Outcome, runs: Sequence[Run], tree: str) -> list[str]:
    """What whole engines say of it: a part of a sentence, or none."""
    if not runs:
        is_known = outcome.verdict in ("right", "wrong")
        return ["no GPU of this capability has run it"] if is_known else []
    last = max(runs, key=lambda run: run.date)
    is_of_now = all(run.tree == tree for run in runs)
    earlier = "" if is_of_now else ", with earlier patches"
    wrong = [run.test for run in runs if run.outcome == "failed"]
    right = f"{len(runs) - len(wrong)} of {len(runs)} right"
    but = f", wrong in {', '.join(wrong)}" if wrong else ""
    return [f"whole engines on an {last.device}, {last.date}{earlier}: {right}{but}"]


def told(outcome: Outcome, runs: Sequence[Run], tree: str) -> str:
    """How an outcome is known, in words; nothing of what start-up says itself."""
    if not outcome.basis:
        return ""
    return "; ".join((known_from(outcome), *on_gpus(outcome, runs, tree)))


def details(outcome: Outcome, runs: Sequence[Run], tree: str) -> str:
    """What is known beyond the kind's meaning: which sources, and what GPUs ran."""
    ran = "".join(on_gpus(outcome, runs, tree))
    parts = (
        outcome.basis if name_of(outcome) == "sources" else "",
        f"{ran[0].upper()}{ran[1:]}." if ran else "",
    )
    return "\n".join(part for part in parts if part)
