"""What Triton makes of the kernels that Llama 4 launches: matrix/RELEASE.triton.json.

`tests/compiled` finds it out in the release's environment, without a GPU. It is the same for stock
and patched: no patch changes a kernel or its launcher, and a test holds that.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overlay.answers import kept
from overlay.answers.matrix import FOLDER, Runs, compress, expand, settle_text

SCHEMA = 1
AGAIN = "Make it again: vllm-overlay matrix RELEASE --triton"

Use = Literal["fused_moe", "v0-prefix", "v1-triton", "v1-tree"]
Verdict = Literal["runs", "does not compile", "too much shared memory", "not launched"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Model):
    """What the kernel that decides over a launch comes to."""

    kernel: str = ""
    """Its module and function; nothing if none is launched."""
    shared: int = 0
    """Bytes of shared memory that a block needs."""
    message: str = ""
    """Why it does not compile, or is not launched; nothing if it compiles."""

    @property
    def name(self) -> str:
        """The function's."""
        return self.kernel.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The module's."""
        return self.kernel.rpartition(".")[0]


class Gpu(_Model):
    """A GPU, as far as Triton knows of it."""

    capability: str
    shared: int
    """Bytes of shared memory that it gives a block."""


class Row(_Model):
    """A launch on every GPU."""

    use: Use
    """What is computed."""
    kind: str
    """How the experts' weights are held, or the KV cache."""
    dtype: str
    """Of the model."""
    results: Runs
    """Numbers of outcomes, GPU by GPU, equal neighbours as COUNT*NUMBER."""

    @property
    def name(self) -> tuple[str, str, str]:
        """What no two rows share."""
        return self.use, self.kind, self.dtype


@dataclass(frozen=True)
class Answer:
    """What becomes of a launch on a GPU."""

    verdict: Verdict
    reason: str = ""
    """Why it cannot run, in a line."""

    @property
    def runs(self) -> bool:
        """Whether it can run."""
        return self.verdict == "runs"


class Compiled(_Model):
    """What Triton makes of a release's kernels."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    """Version of this file's layout."""
    release: str
    triton: str
    gpus: tuple[Gpu, ...]
    outcomes: tuple[Outcome, ...]
    """Each once, in the order of their first rows."""
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Compiled:
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError("two rows are of the same launch")
        for row in self.rows:
            numbers = expand(row.results)
            if len(numbers) != len(self.gpus):
                raise ValueError(f"{row.name} has {len(numbers)} GPUs, not {len(self.gpus)}")
            if max(numbers) >= len(self.outcomes):
                raise ValueError(f"{row.name} names an outcome that is not there")
        return self

    @functools.cached_property
    def _by_name(self) -> dict[tuple[str, str, str], list[int]]:
        return {row.name: expand(row.results) for row in self.rows}

    def answer(self, use: Use, kind: str, dtype: str, capability: str) -> Answer | None:
        """What becomes of a launch on a GPU; None if it was not compiled.

        `kind` is unquantised, fp8, fp8-channel, int8-w8a8, experts_int8, awq-int4, gptq-int4 or
        gptq-int8 of experts, and of attention the format of the KV cache: auto, fp8, fp8_e5m2.
        """
        numbers = self._by_name.get((use, kind, dtype))
        place = next((n for n, gpu in enumerate(self.gpus) if gpu.capability == capability), None)
        if numbers is None or place is None:
            return None
        return self._answer(self.outcomes[numbers[place]], self.gpus[place])

    def _answer(self, outcome: Outcome, gpu: Gpu) -> Answer:
        if not outcome.kernel:
            return Answer("not launched", outcome.message)
        if outcome.message:
            reason = f"Triton {self.triton} does not compile {outcome.name}: {outcome.message}"
            return Answer("does not compile", reason)
        if outcome.shared > gpu.shared:
            reason = (
                f"{outcome.name} needs {outcome.shared} bytes of shared memory in a block; "
                f"capability {gpu.capability} has {gpu.shared} (Triton {self.triton})"
            )
            return Answer("too much shared memory", reason)
        return Answer("runs")

    def answers(self) -> Iterator[tuple[Row, Gpu, Answer]]:
        """Every launch on every GPU, in the order of the file."""
        for row in self.rows:
            for gpu, number in zip(self.gpus, expand(row.results), strict=True):
                yield row, gpu, self._answer(self.outcomes[number], gpu)


def from_run(raw: dict[str, Any]) -> Compiled:
    """What is in what tests/compiled wrote.

    Raises:
        OverlayError: it is something else.
    """
    rows = [{**row, "results": compress(row["results"])} for row in raw["rows"]]
    return _validated({**raw, "schema": SCHEMA, "rows": rows}, "the run")


def read(root: Path, release: str) -> Compiled:
    """What is kept of a release.

    Raises:
        OverlayError: nothing is, or the file is damaged.
    """
    path = path_of(root, release)
    return _validated(kept.load(path, AGAIN), str(path))


def _validated(raw: object, where: str) -> Compiled:
    return kept.validated(Compiled, raw, f"{where} is not of Triton's kernels", AGAIN)


def dumps(compiled: Compiled) -> str:
    """The text of a file: a GPU, an outcome or a row a line."""
    head = {"schema": SCHEMA, **compiled.model_dump(include={"release", "triton"})}
    tables = {"gpus": compiled.gpus, "outcomes": compiled.outcomes, "rows": compiled.rows}
    return kept.dumps(head, tables)


def path_of(root: Path, release: str) -> Path:
    """Where the result of a release is kept in the project at `root`."""
    return root / FOLDER / f"{release}.triton.json"


def settle(root: Path, made: Compiled, check: bool) -> list[str]:
    """Keep a result, or with `check` compare it with the one that is kept. Returns problems."""
    return settle_text(path_of(root, made.release), dumps(made), made.release, check)


def counts(compiled: Compiled) -> dict[Verdict, int]:
    """Launches on all GPUs by verdict, the most frequent first."""
    return dict(Counter(answer.verdict for _, _, answer in compiled.answers()).most_common())


def summary(compiled: Compiled) -> str:
    """The counts in a line."""
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts(compiled).items())
    return (
        f"{compiled.release} Triton {compiled.triton}: {len(compiled.rows)} launches on "
        f"{len(compiled.gpus)} GPUs, {found}"
    )
