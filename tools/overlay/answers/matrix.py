"""The matrix: how Llama 4 runs in every configuration of a release.

`tests/matrix` finds it out in the release's environment; this module has it run, keeps the result
in a form that is small and shows well in a diff, and compares the stock release with the patched.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from overlay.answers import gpus, kept
from overlay.base.errors import Exit, OverlayError

SCHEMA = 1
#: Value of a variable that nobody has set.
UNSET = "unset"
#: Folder of the results, in the project.
FOLDER = "matrix"

Variant = Literal["stock", "patched"]
Model = Literal["llama4", "control"]
Verdict = Literal[
    "right", "wrong", "selected", "type-error", "crash", "explained", "unexplained",
    "worker-refused", "cannot-run", "unasked",
]  # fmt: skip
#: What no cell of a patched release may come to.
FAULTS: tuple[Verdict, ...] = ("type-error", "crash", "wrong", "worker-refused", "unexplained")
#: Stand in a message for what the cell is.
SETTINGS, LENGTH, BACKEND = "{settings}", "--max-model-len {max_model_len}", "{backend}"
#: pydantic's dump of what it refuses, in a line: how many errors and of which model, each with its
#: type and input behind it, and a page to read.
_DUMP = re.compile(
    r"\b\d+ validation errors? for \S+ (?:Value error, )?(?P<error>.*?) \[type=.*input_type=.*$"
)
#: A cell's row and place in the row, in the order of the file.
Runs = Annotated[str, StringConstraints(pattern=r"^(\d+\*)?\d+( (\d+\*)?\d+)*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Model):
    """The outcome of a cell."""

    verdict: Verdict
    """right and wrong are of attention; explained and unexplained are refusals before weights
    load; worker-refused is one by a worker of what V1 let in; selected is of the control;
    cannot-run is in no file, but what `runnable` makes of right and wrong; nor is unasked, which is
    what `settings` makes of cells in which a setting was not asked."""
    engine: str = ""
    """v0 or v1, as far as it got."""
    backend: str = ""
    """Module and class of the impl of chunked layers."""
    stage: str = ""
    """Of a failure: config, worker, layers or kernel."""
    message: str = ""
    """What the user reads, or what is wrong; as recorded, which may be a dump of pydantic's."""
    basis: str = ""
    """Of right and wrong: `measured`, or what it is known from."""

    @property
    def shown(self) -> str:
        """The message, in place of a dump of pydantic's the first error in it."""
        return _DUMP.sub(lambda found: found["error"], self.message)

    def message_for(self, cell: Cell, max_model_len: int) -> str:
        """The message as somebody with the settings of `cell` reads it."""
        return self._filled(cell.settings, f"--max-model-len {max_model_len}", cell.backend)

    def message_beside(self, backend: str) -> str:
        """The message for somebody who sees the settings beside it, of which `backend` is one."""
        return self._filled("these settings", "this max_model_len", backend)

    def _filled(self, settings: str, length: str, backend: str) -> str:
        message = self.shown.replace(SETTINGS, settings).replace(LENGTH, length)
        return message.replace(BACKEND, backend)


class Axes(_Model):
    """What the cells of a row differ in, the last one fastest."""

    dtype: tuple[str, ...]
    kv_cache_dtype: tuple[str, ...]
    capability: tuple[str, ...]

    @property
    def size(self) -> int:
        """Cells of a row."""
        return len(self.dtype) * len(self.kv_cache_dtype) * len(self.capability)


class Row(_Model):
    """Cells that differ in the axes alone."""

    backend: str
    """VLLM_ATTENTION_BACKEND."""
    v1: str
    """VLLM_USE_V1."""
    length: Literal["past", "at"]
    """max_model_len: past the chunk or at it."""
    flashinfer: bool
    """Whether FlashInfer is installed."""
    llama4: Runs
    """Numbers of outcomes, cell by cell, equal neighbours as COUNT*NUMBER."""
    control: Runs
    """The same for a model without chunks."""

    @property
    def name(self) -> tuple[str, str, str, bool]:
        """What no two rows share."""
        return self.backend, self.v1, self.length, self.flashinfer


@dataclass(frozen=True, order=True)
class Cell:
    """One configuration."""

    backend: str
    v1: str
    length: str
    flashinfer: bool
    dtype: str
    kv_cache_dtype: str
    capability: str

    @property
    def settings(self) -> str:
        """The flags and variables that are set, as vLLM's users write them."""
        parts = [f"--kv-cache-dtype {self.kv_cache_dtype}", f"--dtype {self.dtype}"]
        variables = {"VLLM_USE_V1": self.v1, "VLLM_ATTENTION_BACKEND": self.backend}
        parts += [f"{name}={value}" for name, value in variables.items() if value != UNSET]
        return f"{', '.join(parts)} on compute capability {self.capability}"

    def __str__(self) -> str:
        """In the words of the settings."""
        length = "past the chunk" if self.length == "past" else "of a chunk"
        flashinfer = ", FlashInfer installed" if self.flashinfer else ""
        return (
            f"capability {self.capability}, KV cache {self.kv_cache_dtype}, {self.dtype}, "
            f"VLLM_ATTENTION_BACKEND {self.backend}, VLLM_USE_V1 {self.v1}, "
            f"max_model_len {length}{flashinfer}"
        )


def computed_dtype(dtype: str, capability: str) -> str:
    """What a model in bfloat16, as the released ones are, is computed in with `--dtype dtype`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpus.version(capability) >= gpus.version("8.0") else "float16"


class Matrix(_Model):
    """One release, stock or patched."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    """Version of this file's layout."""
    release: str
    variant: Variant
    axes: Axes
    outcomes: tuple[Outcome, ...]
    """Each once, in the order of their first cells."""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Matrix:
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError("two rows are of the same configuration")
        for row in self.rows:
            for runs in (row.llama4, row.control):
                numbers = expand(runs)
                if len(numbers) != self.axes.size:
                    raise ValueError(f"{row.name} has {len(numbers)} cells, not {self.axes.size}")
                if max(numbers) >= len(self.outcomes):
                    raise ValueError(f"{row.name} names an outcome that is not there")
        return self

    def cells(self, model: Model) -> Iterator[tuple[Cell, Outcome]]:
        """Every cell with its outcome, in the order of the file."""
        axes = (self.axes.dtype, self.axes.kv_cache_dtype, self.axes.capability)
        for row in self.rows:
            numbers = expand(row.llama4 if model == "llama4" else row.control)
            for place, number in zip(product(*axes), numbers, strict=True):
                yield Cell(*row.name, *place), self.outcomes[number]

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str, str, bool], list[int]]:
        """Of Llama 4's outcomes, by row."""
        return {row.name: expand(row.llama4) for row in self.rows}

    def outcome_of(self, cell: Cell) -> Outcome | None:
        """How Llama 4 runs in one cell; None if there is no such cell."""
        numbers = self._numbers.get((cell.backend, cell.v1, cell.length, cell.flashinfer))
        axes = self.axes
        try:
            dtype = axes.dtype.index(cell.dtype)
            kv_cache_dtype = axes.kv_cache_dtype.index(cell.kv_cache_dtype)
            capability = axes.capability.index(cell.capability)
        except ValueError:
            return None
        place = dtype * len(axes.kv_cache_dtype) + kv_cache_dtype
        index = place * len(axes.capability) + capability
        return None if numbers is None else self.outcomes[numbers[index]]

    def column(self, capability: str) -> Iterator[tuple[Cell, Outcome]]:
        """The cells of Llama 4 on GPUs of one capability."""
        start, step = self.axes.capability.index(capability), len(self.axes.capability)
        for name, numbers in self._numbers.items():
            places = product(self.axes.dtype, self.axes.kv_cache_dtype)
            for place, number in zip(places, numbers[start::step], strict=True):
                yield Cell(*name, *place, capability), self.outcomes[number]

    def changed(self, change: Callable[[Cell, Outcome], Outcome], columns: Iterable[str]) -> Matrix:
        """With other outcomes of Llama 4 on GPUs of some capabilities."""
        wanted = frozenset(columns)
        numbers = {outcome: number for number, outcome in enumerate(self.outcomes)}
        places = list(product(self.axes.dtype, self.axes.kv_cache_dtype, self.axes.capability))

        def number(name: tuple[str, str, str, bool], place: tuple[str, str, str], old: int) -> int:
            if place[-1] not in wanted:
                return old
            outcome = change(Cell(*name, *place), self.outcomes[old])
            return numbers.setdefault(outcome, len(numbers))

        rows = dict[tuple[str, str, str, bool], list[int]]()
        for row in self.rows:
            cells = zip(places, expand(row.llama4), strict=True)
            rows[row.name] = [number(row.name, place, old) for place, old in cells]
        return self.with_llama4(tuple(numbers), rows)

    def with_llama4(
        self, outcomes: tuple[Outcome, ...], numbers: Mapping[tuple[str, str, str, bool], list[int]]
    ) -> Matrix:
        """With other outcomes, and by row the numbers of those of Llama 4."""
        rows = tuple(
            row.model_copy(update={"llama4": compress(numbers[row.name])}) for row in self.rows
        )
        found = self.model_copy(update={"outcomes": outcomes, "rows": rows})
        # What was looked up of the rows before is copied too.
        for name, value in vars(Matrix).items():
            if isinstance(value, functools.cached_property):
                vars(found).pop(name, None)
        return found

    @functools.cached_property
    def llama4(self) -> dict[Cell, Outcome]:
        """The cells of Llama 4."""
        return dict(self.cells("llama4"))

    @functools.cached_property
    def control(self) -> dict[Cell, Outcome]:
        """The cells of the model without chunks."""
        return dict(self.cells("control"))


def compress(numbers: Iterable[int]) -> str:
    """Equal neighbours as COUNT*NUMBER.

    >>> compress([0, 0, 0, 7, 2, 2])
    '3*0 7 2*2'
    """
    runs = ((len(list(same)), number) for number, same in groupby(numbers))
    return " ".join(f"{count}*{number}" if count > 1 else f"{number}" for count, number in runs)


def expand(runs: str) -> list[int]:
    """What `compress` was given.

    >>> expand("3*0 7 2*2")
    [0, 0, 0, 7, 2, 2]
    """
    pairs = (run.rpartition("*") for run in runs.split())
    return [int(number) for count, _, number in pairs for _ in range(int(count or 1))]


def from_run(raw: dict[str, Any], variant: Variant) -> Matrix:
    """The matrix in what tests/matrix wrote.

    Raises:
        OverlayError: it is something else.
    """

    def compressed(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **{model: compress(row[model]) for model in ("llama4", "control")}}

    rows = [compressed(row) for row in raw["rows"]]
    return _validated({**raw, "schema": SCHEMA, "variant": variant, "rows": rows}, "the run")


def read(path: Path) -> Matrix:
    """The matrix in a file.

    Raises:
        OverlayError: there is none, or it is damaged.
    """
    raw = kept.load(path, "Make it: vllm-overlay matrix RELEASE --stock")
    return _validated(raw, str(path))


def _validated(raw: object, where: str) -> Matrix:
    again = "Make it again: vllm-overlay matrix RELEASE --stock"
    return kept.validated(Matrix, raw, f"{where} is no matrix", again)


def dumps(matrix: Matrix) -> str:
    """The text of a file: an outcome or a row a line."""
    head = {
        "schema": SCHEMA, "release": matrix.release, "variant": matrix.variant,
        "axes": matrix.axes.model_dump(),
    }  # fmt: skip
    return kept.dumps(head, {"outcomes": matrix.outcomes, "rows": matrix.rows})


def path_of(root: Path, release: str, variant: Variant) -> Path:
    """Where a result is kept in the project at `root`."""
    return root / FOLDER / f"{release}.{variant}.json"


def write(root: Path, matrix: Matrix) -> Path:
    """Keep a result. Returns its file.

    Raises:
        OverlayError: the folder can't be written.
    """
    return write_text(path_of(root, matrix.release, matrix.variant), dumps(matrix))


def write_text(path: Path, text: str) -> Path:
    """Write one of the folder's files. Returns it.

    Raises:
        OverlayError: the folder can't be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OverlayError(
            f"cannot write {path}", error.strerror or str(error), "Make its folder writable",
            Exit.ENVIRONMENT,
        ) from error  # fmt: skip
    return path


def settle(root: Path, made: Matrix, check: bool) -> list[str]:
    """Keep a result, or with `check` compare it with the one that is kept. Returns problems."""
    path = path_of(root, made.release, made.variant)
    return settle_text(path, dumps(made), made.release, check)


def settle_text(path: Path, text: str, release: str, check: bool) -> list[str]:
    """Write one of the folder's files, or with `check` compare it. Returns problems.

    Raises:
        OverlayError: the folder can't be written.
    """
    if not check:
        write_text(path, text)
        return []
    if path.is_file() and path.read_text("utf-8") == text:
        return []
    return [f"{release}: {path.name} is not what a run gives; run it without --check"]


def counts(matrix: Matrix) -> dict[Verdict, int]:
    """Cells of Llama 4 by verdict, the most frequent first."""
    found = Counter(outcome.verdict for outcome in matrix.llama4.values())
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def summary(matrix: Matrix) -> str:
    """The counts in a line."""
    by_verdict = ", ".join(f"{count} {verdict}" for verdict, count in counts(matrix).items())
    return f"{matrix.release} {matrix.variant}: {len(matrix.llama4)} cells, {by_verdict}"


def remedies(cell: Cell, outcome: Outcome) -> Iterator[tuple[str, str, Cell]]:
    """What a refusal of the overlay says works instead: its words, the engine, and the cell."""
    found = _WORKS.search(outcome.message)
    for words, engine in _REMEDY.findall(found[1]) if found else ():
        changed: dict[str, Any] = {}
        for change in words.split(" and "):
            name, _, value = change.removesuffix(" or less").rpartition(" ")
            changed.update(_CHANGES[name](value))
        yield words, engine.lower(), dataclasses.replace(cell, **changed)


#: From the words of a remedy to the outcome of a cell.
_CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "unset": lambda name: {{"VLLM_USE_V1": "v1", "VLLM_ATTENTION_BACKEND": "backend"}[name]: UNSET},
    "--kv-cache-dtype": lambda value: {"kv_cache_dtype": "fp8" if value == "fp8_e4m3" else value},
    "--dtype": lambda value: {"dtype": value},
    "--max-model-len": lambda _: {"length": "at"},
    # It is the default that it is told of, or of a backend in whose place the default is taken.
    "install": lambda _: {"flashinfer": True, "backend": UNSET},
}
_WORKS = re.compile(r"What works instead: (.*)\.$")
_REMEDY = re.compile(r"(?:^|, or )(.*?) \((V[01]) \w+\)")


def compare(stock: Matrix, patched: Matrix) -> tuple[str, ...]:
    """What a patched release should not do, given what stock does: a line each kind.

    No cell may come to one of `FAULTS`; what stock got right stays right; what a refusal says to do
    instead is right; and a model without chunks is treated as by stock, to the letter.
    """
    if stock.llama4.keys() != patched.llama4.keys():
        return (f"{stock.release}: stock and patched have different cells; run both again",)
    problems: dict[str, list[Cell]] = {}
    for cell, new in patched.llama4.items():
        old = stock.llama4[cell]
        if new.verdict in FAULTS:
            problems.setdefault(f"{new.verdict}: {new.shown}", []).append(cell)
        elif old.verdict == "right" != new.verdict:
            problems.setdefault(f"right on stock, {_told(new)} here", []).append(cell)
        for words, engine, remedied in remedies(cell, new):
            then = patched.llama4[remedied]
            if (then.verdict, then.engine) != ("right", engine):
                problem = f"told to try {words} ({engine}), which is {_told(then)}"
                problems.setdefault(problem, []).append(cell)
    for cell, new in patched.control.items():
        if new != stock.control[cell]:
            change = f"without chunks, {_told(stock.control[cell])} became {_told(new)}"
            problems.setdefault(change, []).append(cell)
    return lines_of(patched.release, problems)


def lines_of(release: str, problems: Mapping[str, Sequence[Cell]]) -> tuple[str, ...]:
    """A line a problem: of how many cells, and the first of them."""
    return tuple(
        f"{release}: {problem} ({len(cells)} cells; {cells[0]})"
        for problem, cells in problems.items()
    )


def _told(outcome: Outcome) -> str:
    parts = (outcome.engine, outcome.backend, outcome.shown)
    detail = " ".join(part for part in parts if part)
    return f"{outcome.verdict} ({detail})" if detail else outcome.verdict
