"""tests/upstream as a runner: one process a file, whatever becomes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from overlay.testing import junit

TESTS = Path(__file__).parents[2]
#: The runner without what needs vLLM.
SCRIPT = """
import sys
from unittest import mock
from upstream import __main__ as runner
with mock.patch.object(runner, "prepare"):
    sys.exit(runner.main())
"""

ALONE = "import shared\ndef test_a(): shared.seen.append(1); assert shared.seen == [1]"
GONE = """
import os, pytest
def test_d(): pass
@pytest.mark.parametrize("value", ["a b"])
def test_e(value): os._exit(7)
class TestMore:
    def test_g(self): os.kill(os.getpid(), 9)
    def test_h(self): pass
"""
FILES = {
    "tests/test_good.py": ALONE,
    "tests/more/test_alike.py": ALONE,
    "tests/test_bad.py": "def test_c(): assert 1 == 2",
    "tests/test_gone.py": GONE,
    "tests/test_early.py": "import os; os._exit(3)",
    "tests/test_broken.py": "import nothing_of_that_name",
    "tests/test_none.py": "",
    "tests/helper.py": "raise SystemError('no test file')",
    "shared.py": "seen = []",
    "late/test_late.py": "import time\ndef test_f(): time.sleep(600)",
}


def run(folder: Path, *paths: str, timeout: int = 60) -> tuple[int, dict[str, junit.Case]]:
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--junitxml=out.xml", f"--timeout={timeout}", *paths],
        cwd=folder, env={"PYTHONPATH": f"{TESTS}:{folder}", "PATH": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (folder / "out.xml").is_file(), done.stderr
    return done.returncode, {case.name: case for case in junit.read(folder / "out.xml")}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, junit.Case]:
    status, cases = run(tmp_path_factory.mktemp("tree"), "tests")
    assert status == 1
    return cases


def test_each_file_is_alone(everything: dict[str, junit.Case]) -> None:
    assert everything["tests.test_good::test_a"].outcome == "passed"
    assert everything["tests.more.test_alike::test_a"].outcome == "passed"


def test_a_failure_is_one(everything: dict[str, junit.Case]) -> None:
    assert everything["tests.test_bad::test_c"].outcome == "failed"


def test_a_crash_is_a_result_and_ends_no_other_test(everything: dict[str, junit.Case]) -> None:
    assert everything["tests.test_gone::test_e[a b]"].message == "ended the process (7)"
    assert everything["tests.test_gone::test_d"].outcome == "passed"
    assert everything["tests.test_gone.TestMore::test_g"].message == "ended the process (-9)"
    assert everything["tests.test_gone.TestMore::test_h"].outcome == "passed"


def test_so_is_one_outside_of_a_test(everything: dict[str, junit.Case]) -> None:
    assert everything["::tests.test_early"].message == "ended the process (3)"


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    status, cases = run(tmp_path, "late", timeout=2)
    (case,) = cases.values()
    assert status == 1
    # pytest ends the test, or the runner its process where that is slow to begin.
    assert case.message.startswith(("Failed: Timeout", "does not end"))


def test_what_does_not_load_is_a_result(everything: dict[str, junit.Case]) -> None:
    assert "nothing_of_that_name" in everything["::tests.test_broken"].message


def test_nothing_else_is_there(everything: dict[str, junit.Case]) -> None:
    assert len(everything) == 9


def test_success_and_nothing_are_told_apart(tmp_path: Path) -> None:
    assert run(tmp_path, "tests/test_good.py")[0] == 0
    assert run(tmp_path, "tests/test_none.py") == (5, {})
