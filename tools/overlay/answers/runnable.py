"""Whether a cell can run at all: there is code for its GPU, and Triton compiles what it launches.

The matrix has what selection does and what attention computes, on CPU stand-ins. This lays over it
what the binaries (`binaries`) and Triton (`compiled`) say of each GPU, and what the release does
with quantised weights (`weights`), on stock and patched alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from overlay.answers import binaries, compiled, flags, matrix, weights
from overlay.answers.binaries import Binaries
from overlay.answers.compiled import Compiled, Use
from overlay.answers.flags import NO_FLAGS, Flags
from overlay.answers.matrix import (
    Cell,
    Matrix,
    Outcome,
    Verdict,
    computed_dtype,
    expand,
)
from overlay.answers.weights import Asked, Held
from overlay.releases.platforms import Platform

#: How the experts are held in a checkpoint that is not quantised.
UNQUANTISED = "unquantised"
#: Attention that Triton compiles, by the impl that launches it.
ATTENTION: Mapping[str, Use] = {
    "v1.triton_attn.TritonAttentionImpl": "v1-triton",
    "v1.tree_attn.TreeAttentionImpl": "v1-tree",
}


def _launches(outcome: Outcome) -> bool:
    """Whether kernels are launched: all else stops before."""
    return outcome.verdict in ("right", "wrong") or outcome.stage == "kernel"


@dataclass(frozen=True)
class Place:
    """What a cell's kernels depend on, but for its backend."""

    dtype: str
    kv_cache_dtype: str
    capability: str


@dataclass(frozen=True)
class _Obstacle:
    """What is in a cell's way."""

    basis: str
    reason: str
    verdict: Verdict = "cannot-run"


@dataclass(frozen=True)
class Kernels:
    """What is known of a release's kernels; None where nothing is kept."""

    binaries: Binaries | None = None
    compiled: Compiled | None = None
    held: Held | None = None
    """The weights; None: unquantised."""
    flags: Flags = NO_FLAGS
    """What is set beside the matrix' settings."""

    def holding(self, root: Path, release: str, asked: Asked | None) -> Kernels:
        """The same, with weights that are asked for.

        Raises:
            OverlayError: what is kept of them is damaged.
        """
        return replace(self, held=weights.hold(root, release, asked))

    def with_any_torch(self) -> Kernels:
        """The same with a torch that is not known."""
        return replace(self, binaries=self.binaries and self.binaries.with_any_torch())

    def over(self, outcome: Outcome, place: Place) -> Outcome:
        """The outcome, or that it cannot run, with the reason."""
        if not _launches(outcome):
            return outcome
        found = (
            self._no_code(outcome.backend, place)
            or self._not_held(place)
            or self._no_parts(outcome, place)
            or self._not_compiled(outcome.backend, place)
        )
        if found is None:
            return outcome
        return outcome.model_copy(
            update={"verdict": found.verdict, "message": found.reason, "basis": found.basis,
                    "stage": "kernel"}
        )  # fmt: skip

    def unknown(self, place: Place) -> tuple[str, ...]:
        """What is not known of the weights, each in a few words."""
        if self.held is None:
            return ()
        return weights.unknown(
            self.held, self.binaries, self.compiled, place.dtype, place.kv_cache_dtype,
            place.capability,
        )  # fmt: skip

    def without_chunks(self, outcome: Outcome, place: Place) -> str:
        """Why V0's chunked prefill and prefix caching cannot run; nothing if they can, or are V1's.

        They take a kernel of Triton's in place of the backend's own.
        """
        if outcome.engine != "v0" or not _launches(outcome) or self.compiled is None:
            return ""
        dtype = computed_dtype(place.dtype, place.capability)
        answer = self.compiled.answer("v0-prefix", place.kv_cache_dtype, dtype, place.capability)
        return "" if answer is None or answer.runs else answer.reason

    def _no_parts(self, outcome: Outcome, place: Place) -> _Obstacle | None:
        """What is in the way of prompts in parts, if V0 is to compute them so."""
        if flags.IN_PARTS not in self.flags.names or outcome.backend != flags.BY_TRITON:
            return None
        reason = self.without_chunks(outcome, place)
        return _Obstacle("compiled", reason) if reason else None

    def _weights(self, place: Place) -> weights.Outcome | None:
        """What becomes of the weights; None if they are unquantised, or nothing is known."""
        if self.held is None:
            return None
        return self.held.outcome(place.dtype, place.kv_cache_dtype, place.capability)

    def _not_held(self, place: Place) -> _Obstacle | None:
        found = self._weights(place)
        if found is None or found.stage == "unknown":
            return None
        if found.stage == "wrong":
            return _Obstacle("layers", found.message, "wrong")
        if found.stage:
            return _Obstacle("layers", found.told)
        missing = ""
        if self.binaries:
            missing = weights.without_code(found, self.binaries, place.capability)
        return _Obstacle("binaries", missing) if missing else None

    def _no_code(self, backend: str, place: Place) -> _Obstacle | None:
        lacking = self.binaries.lacking(place.capability, backend) if self.binaries else ()
        if self.binaries is None or not lacking:
            return None
        has_none = f"has no code for capability {place.capability}"
        torch = self.binaries.torch
        if "torch" in lacking:
            code = "; ".join(map(str, torch.code))
            return _Obstacle("binaries", f"torch {torch.version} {has_none}, but for {code}")
        wheel = f"the wheel of {self.binaries.release}"
        reason = f"{wheel} {has_none} in its kernels for {', '.join(lacking)}"
        return _Obstacle("binaries", reason)

    def _not_compiled(self, backend: str, place: Place) -> _Obstacle | None:
        if self.compiled is None:
            return None
        dtype = computed_dtype(place.dtype, place.capability)
        found = self._weights(place)
        held = (UNQUANTISED,) if found is None else weights.kinds(found)
        launches: list[tuple[Use, str]] = [("fused_moe", kind) for kind in held]
        if backend in ATTENTION:
            launches.append((ATTENTION[backend], place.kv_cache_dtype))
        for use, kind in launches:
            answer = self.compiled.answer(use, kind, dtype, place.capability)
            if answer is None and kind in weights.SAME_TYPE:
                answer = self.compiled.answer(use, weights.SAME_TYPE[kind], dtype, place.capability)
            if answer is not None and not answer.runs:
                return _Obstacle("compiled", answer.reason)
        return None


def known(root: Path, release: str, platform: Platform = "x86_64") -> Kernels:
    """What is kept of a release's kernels.

    Raises:
        OverlayError: a file is damaged.
    """
    has_code = binaries.path_of(root, release, platform).is_file()
    has_triton = compiled.path_of(root, release).is_file()
    return Kernels(
        binaries.read(root, release, platform) if has_code else None,
        compiled.read(root, release) if has_triton else None,
    )


def laid_over(
    kept: Matrix, kernels: Kernels, stands_for: Mapping[str, str] | None = None
) -> Matrix:
    """The matrix, with what cannot run said to be so.

    `stands_for`: the columns that are asked for, and the capability of the GPU that each answers
    for; the others stay as they are. Without, each column answers for itself.
    """
    if stands_for is None:
        stands_for = {column: column for column in kept.axes.capability}
    numbers = {outcome: number for number, outcome in enumerate(kept.outcomes)}
    axes = product(kept.axes.dtype, kept.axes.kv_cache_dtype, kept.axes.capability)
    places = [
        Place(dtype, kv, stands_for[column]) if column in stands_for else None
        for dtype, kv, column in axes
    ]

    @functools.cache
    def number(old: int, place: Place | None) -> int:
        if place is None:
            return old
        return numbers.setdefault(kernels.over(kept.outcomes[old], place), len(numbers))

    rows = {
        row.name: [number(old, at) for old, at in zip(expand(row.llama4), places, strict=True)]
        for row in kept.rows
    }
    return kept.with_llama4(tuple(numbers), rows)


def judge(root: Path, release: str) -> tuple[tuple[Matrix, Matrix], tuple[str, ...]]:
    """What is kept of a release, stock and patched, with what cannot run, and the problems of the
    latter: what `matrix.compare` finds, given what stock can run, and where it cannot run alone.

    Raises:
        OverlayError: a file is missing or damaged.
    """
    stock, patched = (
        matrix.read(matrix.path_of(root, release, variant)) for variant in ("stock", "patched")
    )
    kernels = known(root, release)
    laid = laid_over(stock, kernels), laid_over(patched, kernels)
    return laid, (*matrix.compare(laid[0], patched), *compare(*laid))


def compare(stock: Matrix, patched: Matrix) -> tuple[str, ...]:
    """Where stock runs, and is right, the patched release has to run too: a line each kind."""
    problems: dict[str, list[Cell]] = {}
    for cell, new in patched.llama4.items():
        if new.verdict == "cannot-run" and stock.llama4[cell].verdict == "right":
            problem = f"right on stock, cannot run here: {new.message}"
            problems.setdefault(problem, []).append(cell)
    return matrix.lines_of(patched.release, problems)


def judge_flags(root: Path, made: flags.Kept) -> tuple[str, ...]:
    """The problems of a patched release with settings: what `flags.compare` finds, given what can
    run.

    Raises:
        OverlayError: a file is missing or damaged.
    """
    kernels = known(root, made.release)
    plain = {
        variant: matrix.read(matrix.path_of(root, made.release, variant))
        for variant in flags.VARIANTS
    }

    def over(setting: str, outcome: Outcome, cell: Cell) -> Outcome:
        place = Place(cell.dtype, cell.kv_cache_dtype, cell.capability)
        return replace(kernels, flags=Flags((setting,))).over(outcome, place)

    return flags.compare(made, plain, over)
