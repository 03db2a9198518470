"""What GPUs measured: from junit XML to matrix/RELEASE.gpu.json, and which cells it speaks for."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from made_upstream import Upstream
from overlay.answers import evidence
from overlay.answers.matrix import Cell, Outcome
from overlay.base.errors import OverlayError
from overlay.releases import versions
from overlay.testing import junit
from overlay.testing.regress import markdown

from ..cli.test_cli import Run
from ..made_gpu_run import ABOUT, gpu_case, xml

DAY = date(2026, 11, 28)
CELL = Cell("unset", "unset", "past", False, "float16", "auto", "7.5")
RIGHT = Outcome(verdict="right", engine="v0", backend="xformers.XFormersImpl", basis="measured")


@pytest.fixture
def run_of_xformers(upstream: Upstream) -> evidence.Run:
    release = versions.load(upstream.root / "VERSIONS.toml").get("1.0")
    (found,) = evidence.runs_of([gpu_case()], "patched", release, DAY)
    return found


def test_only_what_was_compared_counts(upstream: Upstream) -> None:
    """An engine that died, and a test that was skipped, measured nothing."""
    release = versions.load(upstream.root / "VERSIONS.toml").get("1.0")
    died = replace(gpu_case("died", "failed"), measures={})
    assert evidence.runs_of([died], "patched", release, DAY) == []
    (stock,) = evidence.runs_of([gpu_case(outcome="failed")], "stock", release, DAY)
    assert (stock.outcome, stock.tree) == ("failed", release.upstream_tree)


def test_speaks_for_its_own_cell_alone(run_of_xformers: evidence.Run) -> None:
    assert run_of_xformers.speaks_for(RIGHT, CELL)
    assert run_of_xformers.speaks_for(RIGHT, replace(CELL, dtype="auto"))
    for other in (
        replace(CELL, capability="7.0"),
        replace(CELL, dtype="float32"),
        replace(CELL, kv_cache_dtype="fp8"),
        replace(CELL, dtype="auto", capability="8.0"),  # bfloat16
    ):
        assert not run_of_xformers.speaks_for(RIGHT, other)
    for outcome in (
        RIGHT.model_copy(update={"engine": "v1"}),
        RIGHT.model_copy(update={"backend": "flash_attn.FlashAttentionImpl"}),
    ):
        assert not run_of_xformers.speaks_for(outcome, CELL)


def test_the_last_run_of_a_test_stays(tmp_path: Path, run_of_xformers: evidence.Run) -> None:
    later = run_of_xformers.model_copy(update={"outcome": "failed", "date": date(2026, 12, 1)})
    elsewhere = later.model_copy(update={"capability": "8.0"})
    kept = evidence.Evidence(release="1.0").merged([run_of_xformers]).merged([later, elsewhere])
    assert kept.runs == (later, elsewhere)
    file = evidence.write(tmp_path, kept)
    assert evidence.read(tmp_path, "1.0") == kept
    assert evidence.read(tmp_path, "1.1").runs == ()
    whole = file.read_text()
    for text, why in {
        whole.replace('"schema": 1', '"schema": 2'): "another schema",
        whole.replace('"release"', '"realese"'): "release: Field required",
        "[1]": "can't be read",
        "[" * 100_000: "can't be read",
        "\x00": "can't be read",
    }.items():
        file.write_text(text)
        with pytest.raises(OverlayError, match=why):
            evidence.read(tmp_path, "1.0")


def test_kept_by_the_command(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    stock, patched = tmp_path / "stock.xml", tmp_path / "patched.xml"
    stock.write_text(xml(gpu_case(outcome="failed")))
    patched.write_text(xml(gpu_case()))
    ran = run("judge", "1.0", str(stock), str(patched), "--keep")
    assert "matrix/1.0.gpu.json: 2 runs" in ran.err
    kept = evidence.read(upstream.root, "1.0").runs
    assert [(each.variant, each.outcome, each.date) for each in kept] == [
        ("patched", "passed", DAY),
        ("stock", "failed", DAY),
    ]
    patched.write_text(xml(gpu_case(), timestamp=""))
    ran = run("judge", "1.0", str(stock), str(patched), "--keep")
    assert (ran.status, "patched.xml has no date" in ran.err) == (2, True)


def test_what_ran_is_in_the_table(tmp_path: Path) -> None:
    file = tmp_path / "one.xml"
    file.write_text(xml(gpu_case()))
    cases = junit.read(file)
    assert cases[0].about == ABOUT
    assert markdown(cases, cases).splitlines()[2] == (
        "| v0[xformers-graphs] | V0 XFormers, float16, auto, level 0, graphs True "
        "| 0.195 | 0.063 | 319 of 320 | passed | passed |"
    )
