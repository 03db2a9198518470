"""What settings beside the matrix' change in its answers: matrix/RELEASE.settings.json.

`tests/settings` asks the release itself, stock and patched: each setting alone, over some of the
matrix' cells. Kept is what it is where a setting makes it something else. Other cells are not
asked, and nothing is said of them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overlay.answers import kept, matrix
from overlay.answers.matrix import (
    FOLDER,
    Axes,
    Cell,
    Matrix,
    Outcome,
    Runs,
    Variant,
    Verdict,
    compress,
    expand,
    settle_text,
)

SCHEMA = 1
AGAIN = "Make it again: vllm-overlay matrix RELEASE --settings"
VARIANTS: tuple[Variant, Variant] = ("stock", "patched")

#: The settings, as `vllm serve` takes them.
WRITTEN: Mapping[str, str] = {
    "pipeline-parallel": "--pipeline-parallel-size above 1",
    "tensor-parallel": "--tensor-parallel-size above 1",
    "lora": "--enable-lora",
    "speculative-ngram": "--speculative-config of n-grams",
    "speculative-draft": "--speculative-config of a draft model",
    "speculative-eagle": "--speculative-config of EAGLE",
    "kv-connector": "--kv-transfer-config",
    "no-hybrid-kv-cache-manager": "--disable-hybrid-kv-cache-manager",
    "chunked-prefill-on": "--enable-chunked-prefill",
    "chunked-prefill-off": "--no-enable-chunked-prefill",
    "prefix-caching-on": "--enable-prefix-caching",
    "prefix-caching-off": "--no-enable-prefix-caching",
    **{f"block-size-{size}": f"--block-size {size}" for size in (8, 16, 32, 64, 128)},
    "cuda-graphs": "CUDA graphs",
    "eager": "--enforce-eager",
}
#: What is the matrix' own way, so that it is asked of the matrix.
OWN = {"block-size-16", "eager"}
#: Faults of stock that need CUDA graphs, or torch.compile, by the topic of their patch.
OF_GRAPHS = (
    "llama4-images-off", "moe-input-mutation", "v1-full-graph-local", "v1-flash-attn-buffers",
)  # fmt: skip
#: The settings that are the answer to a fault, by the topic of its patch.
SHOWN_BY = {
    "v1-hybrid-off-local": ("kv-connector", "speculative-eagle", "no-hybrid-kv-cache-manager")
}
#: The tests on a GPU that have had a setting, by a part of their name.
RUNS_WITH = {
    "tensor-parallel": "tensor-parallel",
    "chunked-prefill-on": "chunked-prefill",
    "prefix-caching-on": "prefix-caching",
    "eager": "eager",
}
#: V0 with it takes a kernel of Triton's for prompts, in the place of the backend's own.
IN_PARTS, BY_TRITON = "chunked-prefill-on", "xformers.XFormersImpl"

#: Of several settings, the answer is the first of these that is one's.
_WORST: tuple[Verdict, ...] = (
    "wrong", "type-error", "crash", "worker-refused", "unexplained", "explained", "unasked",
    "selected", "cannot-run", "right",
)  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


RowName = tuple[str, str, Literal["past", "at"], bool]
"""VLLM_ATTENTION_BACKEND, VLLM_USE_V1, max_model_len, and whether FlashInfer is installed."""


class Row(_Model):
    """Cells that a setting changes, in one or more rows alike."""

    setting: str
    variant: Variant
    rows: tuple[RowName, ...]
    results: Runs
    """Cell by cell: 0 where it changes nothing, else the number of the outcome, from 1 on."""


class Kept(_Model):
    """What settings change in a release."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    """Version of this file's layout."""
    release: str
    axes: Axes
    settings: tuple[str, ...]
    """Those that the release has."""
    asked: tuple[RowName, ...]
    """The rows in which each of them was asked."""
    outcomes: tuple[Outcome, ...]
    """What cells become, each once."""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Kept:
        seen = [(row.setting, row.variant, name) for row in self.rows for name in row.rows]
        if len(set(seen)) != len(seen):
            raise ValueError("two rows are of the same cells")
        for row in self.rows:
            numbers = expand(row.results)
            if len(numbers) != self.axes.size:
                raise ValueError(f"{row.setting} has {len(numbers)} cells, not {self.axes.size}")
            if max(numbers) > len(self.outcomes):
                raise ValueError(f"{row.setting} names an outcome that is not there")
            if row.setting not in self.settings or not set(row.rows) <= set(self.asked):
                raise ValueError(f"{row.setting} has rows that were not asked")
        return self

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, Variant, RowName], list[int]]:
        return {
            (row.setting, row.variant, name): expand(row.results)
            for row in self.rows
            for name in row.rows
        }

    def change(self, setting: str, variant: Variant, cell: Cell) -> Outcome | None:
        """What a setting makes of a cell; None if it leaves it as it is.

        Raises:
            LookupError: it was not asked there.
        """
        if setting in OWN:
            return None
        place = self._place(cell)
        name = (cell.backend, cell.v1, cell.length, cell.flashinfer)
        if setting not in self.settings or name not in self.asked or place is None:
            raise LookupError(f"{setting} was not asked there")
        numbers = self._numbers.get((setting, variant, name))
        number = numbers[place] if numbers else 0
        return self.outcomes[number - 1] if number else None

    def _place(self, cell: Cell) -> int | None:
        """Where in a row a cell is. The model is in bfloat16, which is auto where a GPU has it."""
        axes, dtype = self.axes, cell.dtype
        if dtype == "bfloat16" and matrix.computed_dtype("auto", cell.capability) == dtype:
            dtype = "auto"
        try:
            place = axes.dtype.index(dtype) * len(axes.kv_cache_dtype)
            place += axes.kv_cache_dtype.index(cell.kv_cache_dtype)
            return place * len(axes.capability) + axes.capability.index(cell.capability)
        except ValueError:
            return None


@dataclass(frozen=True)
class Flags:
    """Settings that a user has beside the matrix'."""

    names: tuple[str, ...] = ()
    """Of `WRITTEN`."""

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        """As they are written."""
        return " and ".join(WRITTEN[name] for name in self.names)

    def concerns(self, topic: str) -> bool:
        """Whether a fault of stock is still to be told of beside the answer."""
        if "eager" in self.names and topic in OF_GRAPHS:
            return False
        return not set(self.names) & set(SHOWN_BY.get(topic, ()))

    def had_by(self, test: str) -> bool:
        """Whether a test on a GPU has had all of them, going by its name."""
        return all(name in RUNS_WITH and RUNS_WITH[name] in test for name in self.names)


#: None.
NO_FLAGS = Flags()


def asked(
    *, pipeline_parallel_size: int = 1, tensor_parallel_size: int = 1, enable_lora: bool = False,
    speculative: str | None = None, kv_connector: bool = False,
    disable_hybrid_kv_cache_manager: bool = False, enable_chunked_prefill: bool | None = None,
    enable_prefix_caching: bool | None = None, block_size: str | None = None,
    enforce_eager: bool = False,
) -> Flags:  # fmt: skip
    """The settings that options name."""
    switches = {"chunked-prefill": enable_chunked_prefill, "prefix-caching": enable_prefix_caching}
    given = {
        "pipeline-parallel": pipeline_parallel_size > 1,
        "tensor-parallel": tensor_parallel_size > 1,
        "lora": enable_lora,
        f"speculative-{speculative}": speculative is not None,
        "kv-connector": kv_connector,
        "no-hybrid-kv-cache-manager": disable_hybrid_kv_cache_manager,
        **{
            f"{name}-{'on' if value else 'off'}": value is not None
            for name, value in switches.items()
        },
        f"block-size-{block_size}": block_size is not None,
        "eager": enforce_eager,
    }
    return Flags(tuple(name for name, is_given in given.items() if is_given))


@dataclass(frozen=True)
class Set:
    """Flags that are set, and what a release makes of each."""

    flags: Flags
    kept: Kept | None
    """None if nothing is kept of the release."""

    def each(self) -> Iterator[Set]:
        """Each of them alone."""
        return (replace(self, flags=Flags((name,))) for name in self.flags.names)

    def fewer(self) -> Iterator[tuple[tuple[str, ...], Set]]:
        """With one of them left out, and with all of them: what is changed for it, and the rest."""
        names = self.flags.names
        for left_out in [(name,) for name in names] + [names] * (len(names) > 1):
            rest = Flags(tuple(name for name in names if name not in left_out))
            changes = (f"unset {WRITTEN[name].partition(' ')[0]}" for name in left_out)
            yield tuple(changes), replace(self, flags=rest)

    def over(self, variant: Variant, cell: Cell, outcome: Outcome) -> Outcome:
        """The outcome of a cell with them: the worst of those that each alone comes to."""
        return min(
            (self._one(name, variant, cell) or outcome for name in self.flags.names),
            key=lambda one: (_WORST.index(one.verdict), one == outcome),
            default=outcome,
        )

    def _one(self, name: str, variant: Variant, cell: Cell) -> Outcome | None:
        """What one of them makes of a cell; None if nothing."""
        if name in OWN:
            return None
        if self.kept is None:
            return _unasked(f"no setting was asked of this release: {WRITTEN[name]}")
        if name not in self.kept.settings:
            return Outcome(
                verdict="explained", stage="config",
                message=f"{self.kept.release} has no {WRITTEN[name]}; leave it out",
            )  # fmt: skip
        try:
            return self.kept.change(name, variant, cell)
        except LookupError:
            return _unasked(f"{WRITTEN[name]} was not asked with {cell.settings}")

    def laid_over(self, plain: Matrix, columns: Iterable[str]) -> Matrix:
        """The matrix with them, in some capabilities' columns; the others stay as they are."""
        if not self.flags:
            return plain
        return plain.changed(lambda cell, outcome: self.over(plain.variant, cell, outcome), columns)

    def told(self, alike: Sequence[Set]) -> tuple[str, ...]:
        """What is to be said of them beside an answer, a line each; some of them leave it alike."""
        names, lines = [WRITTEN[name] for one in alike for name in one.flags.names], list[str]()
        if names:
            verb = "does" if len(names) == 1 else "do"
            lines.append(f"{', '.join(names)} {verb} not change this")
        if len(self.flags.names) - len(names) > 1:
            lines.append("each was asked alone, and this is the worst answer of them")
        elif len(self.flags.names) > 1:
            lines.append("each was asked alone")
        return tuple(lines)


def _unasked(why: str) -> Outcome:
    return Outcome(verdict="unasked", message=why)


def hold(root: Path, release: str, wanted: Flags) -> Set:
    """What a release makes of settings.

    Raises:
        OverlayError: the file is damaged.
    """
    is_kept = bool(wanted) and path_of(root, release).is_file()
    return Set(wanted, read(root, release) if is_kept else None)


def unknown(wanted: Flags, outcome: Outcome, is_text_only: bool) -> tuple[str, ...]:
    """What is not known of settings where they come to an outcome, each in a few words."""
    told = list[str]()
    sizes = [WRITTEN[name] for name in wanted.names if name.startswith("block-size-")]
    if sizes and outcome.backend.startswith("v1.triton_attn.") and sizes != ["--block-size 16"]:
        told.append(f"whether Triton's kernels fit this GPU with {sizes[0]}")
    if wanted and is_text_only:
        told.append(f"whether {wanted} does the same to a text-only checkpoint")
    return tuple(told)


def from_runs(runs: Mapping[Variant, dict[str, Any]]) -> Kept:
    """What is in what tests/settings wrote, of stock and of patched.

    Raises:
        OverlayError: it is something else.
    """
    first = runs[VARIANTS[0]]
    numbers: dict[str, int] = {}
    outcomes, alike = list[Any](), dict[tuple[str, Variant, str], list[RowName]]()
    names, settings = dict[RowName, None](), dict[str, None]()
    for variant, raw in runs.items():
        for row in raw["rows"]:
            name = (row["backend"], row["v1"], row["length"], row["flashinfer"])
            names[name], settings[row["setting"]] = None, None
            changed = [None if n is None else raw["outcomes"][n] for n in row["results"]]
            for one in changed:
                if one is not None and repr(one) not in numbers:
                    outcomes.append(one)
                    numbers[repr(one)] = len(outcomes)
            if any(changed):
                results = compress(0 if one is None else numbers[repr(one)] for one in changed)
                alike.setdefault((row["setting"], variant, results), []).append(name)
    made = {
        "schema": SCHEMA,
        "release": first["release"],
        "axes": first["axes"],
        "settings": list(settings),
        "asked": list(names),
        "outcomes": outcomes,
        "rows": [
            {"setting": setting, "variant": variant, "rows": rows, "results": results}
            for (setting, variant, results), rows in alike.items()
        ],
    }
    return kept.validated(Kept, made, "the run is not of settings", AGAIN)


def read(root: Path, release: str) -> Kept:
    """What is kept of a release.

    Raises:
        OverlayError: nothing is, or the file is damaged.
    """
    path = path_of(root, release)
    return kept.validated(Kept, kept.load(path, AGAIN), f"{path} is not of settings", AGAIN)


def dumps(made: Kept) -> str:
    """The text of a file: an outcome or a row a line."""
    head = {
        "schema": SCHEMA, "release": made.release, "axes": made.axes.model_dump(),
        "settings": made.settings, "asked": made.asked,
    }  # fmt: skip
    return kept.dumps(head, {"outcomes": made.outcomes, "rows": made.rows})


def path_of(root: Path, release: str) -> Path:
    """Where the result of a release is kept in the project at `root`."""
    return root / FOLDER / f"{release}.settings.json"


def settle(root: Path, made: Kept, check: bool) -> list[str]:
    """Keep a result, or with `check` compare it with the one that is kept. Returns problems."""
    return settle_text(path_of(root, made.release), dumps(made), made.release, check)


def compare(
    made: Kept,
    plain: Mapping[Variant, Matrix],
    over: Callable[[str, Outcome, Cell], Outcome] = lambda _setting, outcome, _cell: outcome,
) -> tuple[str, ...]:
    """Where a patched release is wrong with a setting, or no longer right where stock is: a line
    each kind. `over` tells what of an outcome can run with a setting."""
    problems: dict[str, list[Cell]] = {}
    for setting, name in product(made.settings, made.asked):
        for place in product(made.axes.dtype, made.axes.kv_cache_dtype, made.axes.capability):
            cell = Cell(*name, *place)
            then = {
                variant: over(
                    setting, made.change(setting, variant, cell) or _outcome(one, cell), cell
                )
                for variant, one in plain.items()
            }
            old, new = then["stock"].verdict, then["patched"].verdict
            if new == "wrong" or old == "right" != new:
                problem = f"with {WRITTEN[setting]}, {old} on stock, {new} here"
                problems.setdefault(problem, []).append(cell)
    return matrix.lines_of(made.release, problems)


def _outcome(plain: Matrix, cell: Cell) -> Outcome:
    """What the matrix has of a cell; it has rows without FlashInfer for what that is nothing to."""
    found = plain.outcome_of(cell) or plain.outcome_of(replace(cell, flashinfer=False))
    assert found is not None
    return found


def counts(made: Kept) -> dict[str, int]:
    """Cells that are changed, stock and patched, by setting."""
    found = Counter[str]()
    for row in made.rows:
        found[row.setting] += len(row.rows) * sum(1 for number in expand(row.results) if number)
    return {setting: found[setting] for setting in made.settings}


def summary(made: Kept) -> str:
    """The counts in a line."""
    asked_of = len(made.asked) * made.axes.size * len(VARIANTS)
    told = ", ".join(f"{count} {name}" for name, count in counts(made).items() if count)
    return f"{made.release} settings: changed of {asked_of} cells each: {told or 'none'}"
