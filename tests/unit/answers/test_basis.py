"""What a verdict rests on: by its own file, and by what GPUs ran."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from made_upstream import Upstream
from overlay.answers import basis, evidence, runnable
from overlay.answers.basis import BASES
from overlay.answers.evidence import Run
from overlay.answers.matrix import Outcome
from overlay.releases import versions

from ..made_gpu_run import gpu_case

ROOT = Path(__file__).parents[3]
RIGHT = Outcome(verdict="right", engine="v0", backend="xformers.XFormersImpl", basis="measured")
WRONG = RIGHT.model_copy(update={"verdict": "wrong", "message": "wrong attention"})


@pytest.fixture
def run(upstream: Upstream) -> Run:
    release = versions.load(upstream.root / "VERSIONS.toml").get("1.0")
    (found,) = evidence.runs_of([gpu_case()], "patched", release, date(2026, 11, 28))
    return found


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (RIGHT, "cpu stand-ins"),
        (RIGHT.model_copy(update={"basis": "constructed"}), "constructed"),
        (Outcome(verdict="explained", stage="config", message="Use --dtype half"), "start-up"),
        (Outcome(verdict="cannot-run", stage="kernel", basis="binaries"), "binaries"),
        (Outcome(verdict="cannot-run", stage="kernel", basis="compiled"), "compiled"),
        (Outcome(verdict="crash", stage="kernel", basis="flash_api.cpp, mha_fwd"), "sources"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_by_what_the_matrix_has(outcome: Outcome, name: str) -> None:
    assert basis.name_of(outcome) == name


def test_a_gpu_counts_if_it_came_to_the_same(run: Run) -> None:
    failed = run.model_copy(update={"outcome": "failed"})
    found = {
        (outcome.verdict, one.outcome): basis.name_of(outcome, [one], run.tree)
        for outcome in (RIGHT, WRONG)
        for one in (run, failed)
    }
    assert found == {
        ("right", "passed"): "gpu",
        ("right", "failed"): "cpu stand-ins",
        ("wrong", "passed"): "cpu stand-ins",
        ("wrong", "failed"): "gpu",
    }


def test_a_gpu_counts_for_what_it_ran(run: Run) -> None:
    """Not for other patches, which it says nothing of."""
    assert basis.name_of(RIGHT, [run], "another tree") == "cpu stand-ins"
    assert "with earlier patches" in basis.details(RIGHT, [run], "another tree")


def test_details(run: Run) -> None:
    assert basis.details(RIGHT, [run], run.tree) == (
        "Whole engines on an NVIDIA Made-up, 2026-11-28: 1 of 1 right."
    )
    assert basis.details(RIGHT, [], "") == "No GPU of this capability has run it."
    written = Outcome(verdict="crash", stage="kernel", basis="flash_api.cpp, mha_fwd")
    assert basis.details(written, [], "") == "flash_api.cpp, mha_fwd"
    assert basis.details(Outcome(verdict="explained"), [], "") == ""


def test_tags_are_short_and_each_its_own() -> None:
    tags = [one.tag for one in BASES.values()]
    assert len(set(tags)) == len(tags)
    assert {len(tag) for tag in tags} == {3}


def test_nothing_kept_rests_on_a_word_that_is_not_known() -> None:
    """What is neither of a kind nor names a source would be called one."""
    for release in versions.load(ROOT / "VERSIONS.toml").patched:
        for one in runnable.judge(ROOT, release.name)[0]:
            for outcome in set(one.llama4.values()):
                if basis.name_of(outcome) == "sources":
                    assert "." in outcome.basis or "issue" in outcome.basis, outcome
