"""The grid of the report: the matrices of all releases, joined into one table of outcomes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from overlay.answers import basis, gpus
from overlay.answers.basis import BASES
from overlay.answers.evidence import Run
from overlay.answers.matrix import (
    Axes,
    Cell,
    Matrix,
    Outcome,
    Row,
    Variant,
    compress,
    expand,
)

#: A release's results: stock, then patched.
Pair = tuple[Matrix, Matrix]
#: Verdict of cells that a release has no row for; number 0 of the outcomes.
NOT_RUN = "not-run"


@dataclass(frozen=True)
class Look:
    """How the page shows a verdict; its colour is in the style sheet."""

    glyph: str
    group: str
    """What the legend puts it under."""
    meaning: str


#: Every verdict, in the order of the legend.
LOOKS: Mapping[str, Look] = {
    "right": Look("✓", "Runs", "Its attention is right."),
    "wrong": Look("✗", "Runs", "Its attention is wrong."),
    "explained": Look("i", "Refused", "Before weights load, with a message that names a remedy."),
    "unexplained": Look("?", "Refused", "Before weights load, without a remedy."),
    "worker-refused": Look("W", "Refused", "Let in, then refused by a worker process."),
    "type-error": Look("T", "Dies", "Of a TypeError, while its layers are made."),
    "crash": Look("!", "Dies", "Of another error."),
    "cannot-run": Look("∅", "Cannot run", "No kernels for this GPU, or none that Triton compiles."),
    "selected": Look("S", "Not computed", "An engine and a backend are selected."),
    NOT_RUN: Look("·", "Not there", "This release does not have the setting."),
}


@dataclass(frozen=True)
class Ran:
    """What GPUs ran of a variant of a release."""

    runs: tuple[Run, ...] = ()
    tree: str = ""
    """Of its sources, as they are now."""

    def of(self, outcome: Outcome, cell: Cell) -> Ran:
        """What of it speaks for a cell."""
        return replace(self, runs=tuple(run for run in self.runs if run.speaks_for(outcome, cell)))


class Shown(Outcome):
    """An outcome as the page tells it: instead of the matrix' basis, what it rests on."""

    on: str = ""
    """Of `BASES`."""
    known: str = ""
    """What there is to say beyond the kind's meaning."""


#: What the page calls values that are no words of a setting.
LABELS: Mapping[str, Mapping[str, str]] = {
    "length": {"past": "past the chunk", "at": "one chunk"},
    "flashinfer": {"no": "not installed", "yes": "installed"},
}

#: They stand in messages for the cell's capability and its VLLM_ATTENTION_BACKEND, so that cells
#: that differ in these alone share an outcome. No message has such characters.
_CAPABILITY, _BACKEND = "\ue000", "\ue001"
#: Messages are kept as phrases, which many share: whole ones would be megabytes.
_BETWEEN_PHRASES = re.compile(r"(?<=[.;,:]) ")


class Outcomes:
    """Outcomes, each once; what is not run is number 0."""

    def __init__(self) -> None:
        self._numbers: dict[Shown, int] = {}

    def number(self, outcome: Outcome, row: Row, capability: str, ran: Ran) -> int:
        """The number of what a cell comes to; `ran` has the runs that speak for it."""
        told = outcome.message_beside(row.backend)
        message = told.replace(capability, _CAPABILITY).replace(row.backend, _BACKEND)
        general = Shown(
            **outcome.model_dump(exclude={"message", "basis"}),
            message=message,
            on=basis.name_of(outcome, ran.runs, ran.tree),
            known=basis.details(outcome, ran.runs, ran.tree),
        )
        return self._numbers.setdefault(general, len(self._numbers) + 1)

    @property
    def verdicts(self) -> list[str]:
        """By number."""
        return [NOT_RUN, *(outcome.verdict for outcome in self._numbers)]

    @property
    def bases(self) -> list[str]:
        """By number; of what is not run none."""
        return ["", *(outcome.on for outcome in self._numbers)]

    def data(self) -> dict[str, Any]:
        """For the page's script: of each outcome the number of its kind, which is all but the
        message, and those of the message's phrases."""
        kinds: dict[Shown, int] = {}
        phrases: dict[str, int] = {}
        listed = [[0]]
        for outcome in self._numbers:
            kind = outcome.model_copy(update={"message": ""})
            found = _BETWEEN_PHRASES.split(outcome.message) if outcome.message else []
            listed.append(
                [
                    kinds.setdefault(kind, len(kinds) + 1),
                    *(phrases.setdefault(phrase, len(phrases)) for phrase in found),
                ]
            )
        told = [kind.model_dump(exclude_defaults=True, exclude={"message"}) for kind in kinds]
        return {
            "outcomes": listed,
            "kinds": [{"verdict": NOT_RUN}, *told],
            "phrases": list(phrases),
            "places": {"capability": _CAPABILITY, "backend": _BACKEND},
        }


class Grid:
    """Cells of all releases, on axes that hold the values of every file."""

    def __init__(
        self, pairs: Iterable[Pair], ran: Mapping[tuple[str, Variant], Ran] | None = None
    ) -> None:
        self.pairs = tuple(pairs)
        self._ran = ran or {}
        self.outcomes = Outcomes()
        self.rows = tuple(self._rows(pair) for pair in self.pairs)
        """By release and row: the runs of numbers of outcomes, stock and patched."""

    @cached_property
    def cell_axes(self) -> Axes:
        """What the cells of a row differ in, over all files."""
        axes = [matrix.axes for pair in self.pairs for matrix in pair]
        capabilities = _union(one.capability for one in axes)
        return Axes(
            dtype=_union(one.dtype for one in axes),
            kv_cache_dtype=_union(one.kv_cache_dtype for one in axes),
            capability=tuple(sorted(capabilities, key=gpus.version)),
        )

    @cached_property
    def row_axes(self) -> dict[str, tuple[str, ...]]:
        """What rows differ in, over all files; the first value of each is the default."""
        names = [_name(row) for pair in self.pairs for matrix in pair for row in matrix.rows]
        return {
            axis: _union((name[place],) for name in names)
            for place, axis in enumerate(("backend", "v1", "length", "flashinfer"))
        }

    def _rows(self, pair: Pair) -> dict[str, tuple[str, str]]:
        stock, patched = (self._encoded(matrix) for matrix in pair)
        gone = compress([0] * self.cell_axes.size)
        names = dict.fromkeys([*stock, *patched])
        return {name: (stock.get(name, gone), patched.get(name, gone)) for name in names}

    def _encoded(self, matrix: Matrix) -> dict[str, str]:
        places = list(_places(self.cell_axes))
        own = {place: index for index, place in enumerate(_places(matrix.axes))}
        indexes = [(own.get(place), place) for place in places]
        ran = self._ran.get((matrix.release, matrix.variant), Ran())
        known: dict[tuple[int, str, tuple[str, str, str]], int] = {}

        def number(local: int, row: Row, place: tuple[str, str, str]) -> int:
            key = local, row.backend, place
            if key not in known:
                outcome = matrix.outcomes[local]
                here = ran.of(outcome, Cell(*row.name, *place))
                known[key] = self.outcomes.number(outcome, row, place[-1], here)
            return known[key]

        def encoded(row: Row) -> str:
            found = expand(row.llama4)
            return compress(
                0 if index is None else number(found[index], row, place) for index, place in indexes
            )

        return {"|".join(_name(row)): encoded(row) for row in matrix.rows}

    @cached_property
    def verdicts(self) -> list[str]:
        """Those that some cell comes to, in the order of the legend."""
        runs = {run for rows in self.rows for both in rows.values() for run in both}
        numbers = {number for run in runs for number in expand(run)}
        by_number = self.outcomes.verdicts
        found = {by_number[number] for number in numbers}
        # A release may lack a whole row, which is in no run.
        if len({frozenset(rows) for rows in self.rows}) > 1:
            found.add(NOT_RUN)
        return [name for name in LOOKS if name in found]

    @cached_property
    def bases(self) -> list[str]:
        """Those that some cell rests on, what weighs most first."""
        found = set(self.outcomes.bases)
        return [name for name in BASES if name in found]

    def default_cells(self, release: int) -> list[list[tuple[tuple[str, str], tuple[str, str]]]]:
        """What stock and patched come to with nothing set, each with what it rests on: by
        capability, then KV cache."""
        axes = self.cell_axes
        name = "|".join(values[0] for values in self.row_axes.values())
        gone = compress([0] * axes.size)
        stock, patched = (expand(runs) for runs in self.rows[release].get(name, (gone, gone)))
        cells = list(zip(self.outcomes.verdicts, self.outcomes.bases, strict=True))
        width = len(axes.capability)
        return [
            [
                (cells[stock[kv * width + gpu]], cells[patched[kv * width + gpu]])
                for kv in range(len(axes.kv_cache_dtype))
            ]
            for gpu in range(width)
        ]

    def data(self) -> dict[str, Any]:
        """What the page's script is given."""
        return {
            "axes": {**self.row_axes, **self.cell_axes.model_dump()},
            "labels": LABELS,
            "looks": {name: [look.glyph, look.meaning, look.group] for name, look in LOOKS.items()},
            "bases": {name: [one.tag, one.meaning] for name, one in BASES.items()},
            "gpus": {one: names_of(one) for one in self.cell_axes.capability},
            **self.outcomes.data(),
            "releases": [
                {"name": stock.release, "rows": rows}
                for (stock, _), rows in zip(self.pairs, self.rows, strict=True)
            ],
        }


def names_of(capability: str) -> list[str]:
    """The GPUs of a capability; the short names, which are those of data centres, first."""
    names = [gpu.name for gpu in gpus.GPUS if gpu.capability == capability]
    return sorted(names, key=len)


def _name(row: Row) -> tuple[str, str, str, str]:
    return row.backend, row.v1, row.length, "yes" if row.flashinfer else "no"


def _places(axes: Axes) -> Iterable[tuple[str, str, str]]:
    return product(axes.dtype, axes.kv_cache_dtype, axes.capability)


def _union(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for part in parts for value in part))
