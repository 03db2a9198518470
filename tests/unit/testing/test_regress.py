"""Judging the stock and the patched run: only the very error counts as FAIL_TO_PASS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from made_upstream import Upstream
from overlay.releases.uv import KEEP, UvCache
from overlay.testing.junit import Case, parse
from overlay.testing.regress import judge, markdown

JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="f2p"><properties>
  <property name="expect_on_stock" value="fail"/>
  <property name="raises" value="TypeError: .*use_irope"/>
</properties><failure message="TypeError: X() got 'use_irope'">traceback</failure></testcase>
<testcase classname="t" name="p2p"><properties>
  <property name="expect_on_stock" value="pass"/>
  <property name="past_chunk" value="0.066"/></properties></testcase>
<testcase classname="t" name="off"><skipped message="no GPU">where</skipped></testcase>
<testcase classname="t" name="broken"><error message="fixture died">where</error></testcase>
</testsuite></testsuites>"""


def case(
    outcome: str, message: str = "", expect: str = "pass", raises: str = "", name: str = "t::x"
) -> Case:
    return Case(name, outcome, message, expect, raises)


F2P = {"expect": "fail", "raises": r"TypeError: .*'use_irope'"}
VERY_ERROR = "TypeError: XFormersImpl.__init__() got an unexpected keyword argument 'use_irope'"


def test_junit() -> None:
    cases = {c.name: c for c in parse(JUNIT)}
    assert cases["t::f2p"].outcome == "failed"
    assert cases["t::f2p"].raises == "TypeError: .*use_irope"
    assert cases["t::p2p"].outcome == "passed"
    assert cases["t::off"].message.startswith("no GPU")
    assert cases["t::broken"].outcome == "error"


def test_measures_as_table() -> None:
    """What a test measured on patched stands after what it measured on stock, if anything."""
    stock = [
        case("failed", VERY_ERROR, name="gpu::test_b"),
        Case("gpu::test_a", "failed", "", "fail", "", {"past_chunk": "10.9", "within": "0.1"}),
        case("passed", name="gpu::test_c"),
    ]
    patched = [
        Case("gpu::test_b", "passed", "", "fail", "", {"past_chunk": "0.066"}),
        Case("gpu::test_a", "passed", "", "fail", "", {"past_chunk": "0.069", "within": "0.1"}),
        case("passed", name="gpu::test_c"),
    ]
    assert markdown(stock, patched).splitlines() == [
        "|  | past chunk | within | stock | patched |",
        "| --- | --- | --- | --- | --- |",
        "| a | 10.9 → 0.069 | 0.1 | failed | passed |",
        "| b | 0.066 |  | failed | passed |",
    ]
    assert {c.name: c.measures for c in parse(JUNIT)}["t::p2p"] == {"past_chunk": "0.066"}


def test_fail_to_pass() -> None:
    verdict = judge("1.0", [case("failed", VERY_ERROR, **F2P)], [case("passed", **F2P)])
    assert (verdict.fail_to_pass, verdict.problems) == (("t::x",), ())


@pytest.mark.parametrize(
    ("stock", "patched", "problem"),
    [
        (case("passed", **F2P), case("passed", **F2P), "passes on stock, where it should fail"),
        (case("failed", "OSError", **F2P), case("passed", **F2P), "but not with"),
        (case("skipped", "why", **F2P), case("passed", **F2P), "skipped on stock, but not"),
        (case("failed", VERY_ERROR, **F2P), case("failed", VERY_ERROR, **F2P), "on patched"),
        (case("failed", VERY_ERROR), case("passed"), "failed on stock"),
        (case("passed"), case("error", "boom"), "error on patched: boom"),
        (case("passed"), case("skipped", "why"), "skipped on patched"),
        (case("passed"), case("passed", name="t::y"), "ran on one wheel only"),
        (case("skipped", "why"), case("skipped", "why"), "no test ran"),
    ],
)
def test_what_is_no_pass(stock: Case, patched: Case, problem: str) -> None:
    verdict = judge("1.0", [stock], [patched])
    assert any(problem in line for line in verdict.problems)
    assert verdict.fail_to_pass == ()


def test_the_same_problem_of_many_tests_is_one_line() -> None:
    stock = [case("error", "boom", name=f"t::{n}") for n in range(100)]
    (line,) = judge("1.0", stock, stock).problems
    assert line == "1.0: t::0 and 99 more: error on stock: boom"


def test_a_control_is_judged_by_its_stock_wheel() -> None:
    assert judge("0.9", [case("passed")], None).problems == ()
    assert judge("0.9", [case("failed", "boom")], None).problems != ()


def test_only_the_latest_uv_caches_stay(upstream: Upstream, tmp_path: Path) -> None:
    release = upstream.workspace().versions.get("1.0")
    for age, torch in enumerate(("2.4.0", "2.5.0", "2.6.0"), 1):
        cache = UvCache.open(tmp_path, release.model_copy(update={"torch": torch}))
        os.utime(cache.folder, (age, age))
    UvCache.open(tmp_path, release.model_copy(update={"torch": "2.7.0"}))
    left = sorted(path.name for path in (tmp_path / "uv").iterdir())
    assert len(left) == KEEP
    assert left == ["torch-2.6.0", "torch-2.7.0"]
