from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from made_upstream import Ran
from overlay.testing import upstream
from overlay.testing.junit import Case
from overlay.testing.pytest_run import Runs
from overlay.testing.results import Verdict
from overlay.testing.upstream import Selected, judge, reason

Run = Callable[..., Ran]


def case(name: str, outcome: str = "passed", message: str = "") -> Case:
    return Case(name, outcome, message, "pass", "")


#: Enough others that pass.
OTHERS = [case(f"tests.test_many::test_{number}") for number in range(upstream.FLOOR)]


def selected(*brought: str, missing: tuple[str, ...] = ()) -> Selected:
    return Selected(
        Path(), ("tests/test_a.py",), (), (), missing, "key", lambda found: found.name in brought
    )


def verdict(stock: list[Case], patched: list[Case], *brought: str) -> Verdict:
    return judge("1.0", [*stock, *OTHERS], [*patched, *OTHERS], selected(*brought))


def test_what_passes_on_both_is_pass_to_pass() -> None:
    found = verdict([case("t::a")], [case("t::a")])
    assert "t::a" in found.pass_to_pass
    assert found.problems == ()


def test_a_lost_test_is_a_problem() -> None:
    found = verdict([case("t::a")], [case("t::a", "failed", "assert 1 == 2")])
    assert found.problems == ("1.0: t::a: passes on stock, failed (assert 1 == 2) on patched",)


def test_so_is_one_that_is_no_longer_there() -> None:
    found = verdict([case("t::a")], [])
    assert found.problems == ("1.0: t::a: passes on stock, is not there on patched",)


def test_a_test_that_the_patches_bring_is_fail_to_pass() -> None:
    # Stock can't even import its file.
    stock = [case("::tests.test_new", "error", "collection failure\nImportError: no such name")]
    found = verdict(stock, [case("tests.test_new::a")], "tests.test_new::a")
    assert found.fail_to_pass == ("tests.test_new::a",)
    assert found.skipped == {}
    assert found.problems == ()


def test_one_that_the_patches_bring_must_pass() -> None:
    found = verdict([], [case("t::new", "failed", "assert 0")], "t::new")
    assert len(found.problems) == 1
    assert "the patches bring it" in found.problems[0]


def test_or_be_skipped_with_a_reason() -> None:
    found = verdict([], [case("t::new", "skipped", "needs a GPU")], "t::new")
    assert found.problems == ()
    assert found.skipped == {"t::new": "skipped by itself: needs a GPU"}


def test_or_fail_for_want_of_a_gpu() -> None:
    found = verdict(
        [], [case("t::new", "failed", "RuntimeError: Found no NVIDIA driver")], "t::new"
    )
    assert found.problems == ()
    assert found.skipped == {"t::new": "needs a GPU"}


def test_what_passes_on_neither_is_listed() -> None:
    failed = case("t::gpu", "failed", "RuntimeError: Found no NVIDIA driver on your system.")
    assert verdict([failed], [failed]).skipped == {"t::gpu": "needs a GPU"}


def test_too_few_tests_prove_nothing() -> None:
    found = judge("1.0", [case("t::a")], [case("t::a")], selected())
    assert "fewer than 750 tests pass" in found.problems[0]


def test_files_that_a_release_has_not_are_listed() -> None:
    found = judge("1.0", OTHERS, OTHERS, selected(missing=("tests/v1/new",)))
    assert found.skipped == {"tests/v1/new": "this release has no such file"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("OSError: We couldn't connect to the server to load this file", "needs the model hub"),
        ("ModuleNotFoundError: No module named 'librosa'", "ask for: librosa"),
        ("AssertionError: Torch not compiled with CUDA enabled", "needs a GPU"),
        ("Failed: Timeout >120.0s", "does not end within"),
        ("assert 1 == 2", "fails here: assert 1 == 2"),
    ],
)
def test_reasons(message: str, expected: str) -> None:
    assert expected in reason(case("t::a", "failed", message))


def test_a_lost_test_gets_a_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").touch()
    tests = replace(selected(), folder=tmp_path)
    ran: list[list[str]] = []

    def fake(_runs: object, _label: str, _tests: object, files: list[str]) -> object:
        ran.append(files)
        return [case("tests.test_a::slow"), case("tests.test_a::bad", "failed"), case("t::new")]

    monkeypatch.setattr(upstream, "_pytest", fake)
    runs = SimpleNamespace(release=SimpleNamespace(name="1.0"))
    first = [case("tests.test_a::bad", "failed"), case("tests.test_b::c", "failed")]
    stock = [case("tests.test_a::slow"), case("tests.test_a::bad")]
    lost = upstream._lost(stock, first)
    found = upstream._again(cast("Runs", runs), tests, first, lost)
    assert ran == [["tests/test_a.py"]]
    assert [(one.name, one.outcome) for one in found] == [
        ("tests.test_a::bad", "failed"),
        ("tests.test_b::c", "failed"),
        ("tests.test_a::slow", "passed"),
    ]


def test_a_control_has_no_patches(run: Run) -> None:
    ran = run("upstream", "0.9")
    assert ran.status == 2
    assert "has no patches" in ran.err


def test_without_a_checkout_it_says_so(run: Run) -> None:
    ran = run("upstream", "1.0")
    assert ran.status == 2
    assert "Run it in a checkout" in ran.err
