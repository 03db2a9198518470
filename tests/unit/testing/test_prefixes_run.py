"""Prefixes in an environment: the files of each in turn, each result once, and what breaks told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from made_upstream import Upstream, accept_use_irope, change, double, package
from overlay.patches import prefixes
from overlay.patches.prefixes import Prefix
from overlay.patches.series import PatchPath
from overlay.testing import prefixes_run
from overlay.testing.junit import Case
from overlay.testing.prefixes_run import Kept, Outcome, Trees, judge
from overlay.testing.pytest_run import Runs

FIRST, SCALE, NOTE = "attention-signatures/1.0.patch", "scale/1.0.patch", "note/1.0.patch"
ONE, TWO = (Prefix(PatchPath(name, "1.0"), "", "", ()) for name in ("one", "two"))


def kept(messages: Mapping[str, str] | None = None, **outcomes: str) -> Kept:
    return Kept(outcomes=outcomes, messages=messages or {}, seconds=1)


def test_what_passed_has_to_pass_from_there_on() -> None:
    stock = kept(a="passed", b="failed", c="skipped")
    one = kept(a="passed", b="passed", c="passed")
    two = kept({"b": "assert 1 == 2"}, a="passed", b="failed", c="skipped")
    assert list(judge("1.0", (ONE, TWO), (stock, one, two))) == [
        "1.0: after two/1.0.patch (2 of 2): b: assert 1 == 2",
        "1.0: after two/1.0.patch (2 of 2): c: skipped",
    ]


def test_tests_with_one_message_are_one_line() -> None:
    now = kept({"a": "TypeError: x", "b": "TypeError: x"}, a="error", b="failed")
    told = list(judge("1.0", (ONE,), (kept(a="passed", b="passed"), now)))
    assert told == ["1.0: after one/1.0.patch (1 of 1): a and 1 more: TypeError: x"]


def test_a_lost_test_and_one_that_was_not_run() -> None:
    told = list(judge("1.0", (ONE,), (kept(a="passed"), kept())))
    assert told == ["1.0: after one/1.0.patch (1 of 1): a: not there any more"]
    assert list(judge("1.0", (ONE, TWO), (kept(a="passed"), None, kept(a="failed")))) == []


def test_a_changed_module_has_to_import_from_the_first() -> None:
    now = kept({"t::test_imports[vllm.new]": "ImportError: no"}, **{})
    now = Kept(outcomes={"t::test_imports[vllm.new]": "failed"}, messages=now.messages, seconds=1)
    told = list(judge("1.0", (ONE,), (kept(), now)))
    assert told == ["1.0: after one/1.0.patch (1 of 1): t::test_imports[vllm.new]: ImportError: no"]


class Made:
    """An environment that was made up: each run says what is installed."""

    def __init__(self, upstream: Upstream, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.upstream = upstream
        self.site = folder / "site"
        self.labels: list[str] = []
        self.modules: list[list[str]] = []
        self.installs = 0
        for name, text in package("1.0").items():
            file = self.site / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (folder / "uv").mkdir()
        self.linked = folder / "uv/attention.py"
        os.link(self.site / "vllm/attention.py", self.linked)
        (upstream.root / "tests/regress").mkdir(parents=True)
        (upstream.root / "tests/wheels.ini").write_text("[pytest]\n")

        def make(_runs: Runs, trees: Trees) -> prefixes_run._Site:
            self.installs += 1
            now = {
                path: (self.site / path).read_bytes() if (self.site / path).exists() else None
                for path in trees.files
            }
            return prefixes_run._Site(self.site, now)

        def ran(
            _runs: Runs,
            label: str,
            _arguments: Sequence[str],
            _timeout: float,
            env: Mapping[str, str],
        ) -> list[Case]:
            self.labels.append(label)
            self.modules.append(json.loads(env[prefixes_run.MODULES]))
            text = (self.site / "vllm/attention.py").read_text()
            told = {
                "irope": "use_irope" in text,
                "scaled": "scale * 2" in text,
                "plain": "scale * 2" not in text,
            }
            return [
                Case(f"t::{name}", "passed" if good else "failed", "no", "pass", "")
                for name, good in told.items()
            ]

        monkeypatch.setattr(prefixes_run._Site, "make", make)
        monkeypatch.setattr(Runs, "run", ran)

    def check(self, folder: Path, *, to_run: bool = True) -> Outcome:
        workspace = self.upstream.workspace()
        result = workspace.apply(workspace.versions.get("1.0"))
        trees = Trees(workspace, result, prefixes.of_result(workspace, result))
        return prefixes_run.check(trees, folder, to_run=to_run, keep=True, done=lambda _: None)


@pytest.fixture
def made(bare_upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    def note(tree: Path) -> None:
        (tree / "vllm/note.py").write_text("NOTE = 1\n")

    bare_upstream.patch(FIRST, accept_use_irope, series=("1.0",))
    bare_upstream.patch(SCALE, double, series=("1.0",), before=(FIRST,))
    bare_upstream.patch(NOTE, note, series=("1.0",), before=(FIRST, SCALE))
    return Made(bare_upstream, tmp_path, monkeypatch)


def test_each_has_its_own_files_and_the_caches_stay_as_they_are(made: Made, tmp_path: Path) -> None:
    before = made.linked.read_bytes()
    found = made.check(tmp_path)
    assert made.labels == ["00-stock", "01-attention-signatures", "02-scale", "03-note"]
    assert made.modules == [
        [],
        ["vllm.attention"],
        ["vllm.attention"],
        ["vllm.attention", "vllm.note"],
    ]
    assert found.problems == ("1.0: after scale/1.0.patch (2 of 3): t::plain: no",)
    assert (found.ran, found.kept, found.missing) == (4, 0, 0)
    assert (made.site / "vllm/note.py").read_text() == "NOTE = 1\n"
    assert made.linked.read_bytes() == before


def test_a_change_costs_only_what_follows_it(made: Made, tmp_path: Path) -> None:
    assert made.check(tmp_path, to_run=False).missing == 4
    assert made.installs == 0
    made.check(tmp_path)
    again = made.check(tmp_path)
    assert (again.ran, again.kept, made.installs) == (0, 4, 1)
    assert again.problems == ("1.0: after scale/1.0.patch (2 of 3): t::plain: no",)
    made.labels.clear()
    change(made.upstream.patches / NOTE, "NOTE = 1", "NOTE = 2")
    later = made.check(tmp_path)
    assert made.labels == ["03-note"]
    assert (later.ran, later.kept) == (1, 3)
    # Other tests are other results.
    (made.upstream.root / "tests/regress/test_new.py").write_text("")
    assert made.check(tmp_path, to_run=False).missing == 4


def test_a_damaged_result_is_run_again(made: Made, tmp_path: Path) -> None:
    made.check(tmp_path)
    for file in (made.upstream.cache / "each").iterdir():
        file.write_text("{")
    made.labels.clear()
    assert made.check(tmp_path).ran == 4
