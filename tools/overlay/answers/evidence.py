"""What whole engines did on real GPUs, kept beside what CPUs tell: matrix/RELEASE.gpu.json.

Made from the junit XML of tests/gpu, read by `explain`. A run speaks for the engine, backend,
dtype, KV cache and capability that it had, and for no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from overlay.answers.matrix import FOLDER, Cell, Outcome, Variant, computed_dtype, write_text
from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError
from overlay.base.models import first_problem
from overlay.releases.versions import Release
from overlay.testing import junit

SCHEMA = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(_Model):
    """One engine on one GPU, and how far its answers were from the reference."""

    variant: Variant
    test: str
    """The test's name, with its case in brackets."""
    outcome: Literal["passed", "failed"]
    engine: str
    """v0 or v1."""
    backend: str
    """Module and class of the attention impl, as in `matrix.Outcome`."""
    dtype: str
    kv_cache_dtype: str
    compilation: str
    """Level of torch.compile, and which CUDA graphs."""
    within_chunk: str
    """Largest difference of a token's log-probability, in the first chunk."""
    past_chunk: str
    agreement: str
    """Generated tokens that are the reference's choice, of how many."""
    device: str
    capability: str
    torch: str
    workers: int = 1
    """GPUs that it was spread over, a process each."""
    date: date
    tree: str
    """Git tree id of the sources that ran: it speaks of no other patches."""

    def speaks_for(self, outcome: Outcome, cell: Cell) -> bool:
        """Whether it is a run of that outcome in that cell of the matrix."""
        return (
            self.engine == outcome.engine
            and self.backend == outcome.backend
            and self.capability == cell.capability
            and self.dtype == computed_dtype(cell.dtype, cell.capability)
            and self.kv_cache_dtype == cell.kv_cache_dtype
        )


class Evidence(_Model):
    """The runs of a release, the last one of each test."""

    release: str
    runs: tuple[Run, ...] = ()

    def merged(self, new: Iterable[Run]) -> Evidence:
        """With `new` in place of earlier runs of the same test, variant and capability."""
        runs = {_key(run): run for run in (*self.runs, *new)}
        return Evidence(release=self.release, runs=tuple(runs[key] for key in sorted(runs)))


def _key(run: Run) -> tuple[str, str, str]:
    return run.test, run.variant, run.capability


def tree_of(release: Release, variant: Variant) -> str:
    """The git tree id of a variant's sources."""
    return release.upstream_tree if variant == "stock" else release.tree or release.upstream_tree


def runs_of(
    cases: Iterable[junit.Case], variant: Variant, release: Release, day: date
) -> list[Run]:
    """The engines that a run of tests/gpu on `day` measured: those whose answers were compared."""
    measured = [case for case in cases if "past_chunk" in case.measures]
    return [_run(case, variant, tree_of(release, variant), day) for case in measured]


def _run(case: junit.Case, variant: Variant, tree: str, day: date) -> Run:
    about, measures = case.about, case.measures
    return Run(
        variant=variant,
        test=case.name.rpartition("::")[2].removeprefix("test_"),
        outcome="passed" if case.outcome == "passed" else "failed",
        engine=about["engine"].lower(),
        backend=about["backend"].removeprefix("vllm.").replace("attention.backends.", ""),
        dtype=about["dtype"],
        kv_cache_dtype=about["kv_cache_dtype"],
        compilation=about["compilation"],
        within_chunk=measures["within_chunk"],
        past_chunk=measures["past_chunk"],
        agreement=measures["agreement"],
        device=about["device"],
        capability=about["capability"],
        torch=about["torch"],
        workers=int(about.get("workers", "1")),
        date=day,
        tree=tree,
    )


def path_of(root: Path, release: str) -> Path:
    """Where the runs of a release are kept in the project at `root`."""
    return root / FOLDER / f"{release}.gpu.json"


def read(root: Path, release: str) -> Evidence:
    """What is kept of a release; nothing, if no GPU ran it.

    Raises:
        OverlayError: the file is damaged.
    """
    path = path_of(root, release)
    if not path.is_file():
        return Evidence(release=release)
    try:
        kept = json.loads(plain_file.read(path))
        if kept.pop("schema") != SCHEMA:
            raise ValueError("it has another schema")
        return Evidence.model_validate(kept)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise OverlayError(
            f"{path} can't be read", first_problem(error),
            f"Put it back: git checkout {path}", Exit.USAGE,
        ) from error  # fmt: skip


def dumps(evidence: Evidence) -> str:
    """The text of a file: a run a line."""
    runs = ",\n  ".join(run.model_dump_json() for run in evidence.runs)
    head = f'"schema": {SCHEMA},\n"release": {json.dumps(evidence.release)}'
    return f'{{\n{head},\n"runs": [\n  {runs}\n]\n}}\n'


def write(root: Path, evidence: Evidence) -> Path:
    """Keep the runs of a release. Returns their file.

    Raises:
        OverlayError: the folder can't be written.
    """
    return write_text(path_of(root, evidence.release), dumps(evidence))
