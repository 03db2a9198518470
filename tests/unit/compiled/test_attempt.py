"""Compiles that end in every way: what they come to is a result, and never the runner's end."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiled.attempt import Result, SharedMemoryError, attempt, message_of, one_line, told
from compiled.outcome import Outcome, worst


def test_what_compiles() -> None:
    assert attempt(lambda: 49152) == Result(shared=49152)


def test_what_needs_more_than_there_is() -> None:
    def compile_kernel() -> int:
        raise SharedMemoryError(98304)

    assert attempt(compile_kernel) == Result(shared=98304)


def failing(error: BaseException, words: str = "") -> Callable[[], int]:
    """A compiler that says `words` on stderr and raises."""

    def compile_kernel() -> int:
        os.write(2, words.encode())
        raise error

    return compile_kernel


def test_what_triton_refuses() -> None:
    """Triton quotes the source, points at it, and has the cause as text."""
    text = "at 3:7:\n    x = tl.load(p)\n    ^\nValueError(\"type 'fp8e4nv' not supported\")"
    assert attempt(failing(RuntimeError(text))) == Result(
        message="ValueError: type 'fp8e4nv' not supported"
    )


def test_what_mlir_refuses() -> None:
    """The message is on stderr, and the exception says nothing."""
    words = "/a/b/moe.py:9:4: error: Unsupported conversion from f16 to f16\nnote: see IR\n"
    assert attempt(failing(RuntimeError("PassManager::run failed"), words)) == Result(
        message="Unsupported conversion from f16 to f16"
    )


def test_what_ptxas_refuses() -> None:
    text = (
        "Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas /tmp/tmpab12cd34.ptx, line 7; "
        "error   : Feature '.bf16' requires .target sm_80 or higher\nptxas fatal   : aborted\n"
    )
    assert attempt(failing(RuntimeError(text))) == Result(
        message="Feature '.bf16' requires .target sm_80 or higher"
    )


def die_of(number: int) -> int:
    """Be killed by a signal, of which pytest would print where."""
    faulthandler.disable()
    os.kill(os.getpid(), number)
    raise AssertionError("still alive")


def test_what_llvm_aborts() -> None:
    def compile_kernel() -> int:
        os.write(2, b"some IR\nLLVM ERROR: Cannot select: intrinsic %llvm.nvvm.wgmma\n")
        return die_of(signal.SIGABRT)

    assert attempt(compile_kernel) == Result(
        message="SIGABRT: LLVM ERROR: Cannot select: intrinsic %llvm.nvvm.wgmma"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("Unsupported conversion from f16 to f16\nLLVM ERROR: Unsupported rounding mode.\n",
         "Unsupported conversion from f16 to f16 LLVM ERROR: Unsupported rounding mode."),
        ("python3.12: /src/AccelerateMatmul.cpp:36: int f(int): Assertion `no' failed.\n",
         "Assertion `no' failed."),
        ("ptxas fatal   : Value 'sm_100' is not defined\nRepro command: ptxas\n",
         "Value 'sm_100' is not defined"),
        ("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : no\n",
         "no"),
    ],
)  # fmt: skip
def test_what_is_told_of_their_output(words: str, message: str) -> None:
    """What people search for: no interpreter, and no line of Triton's own sources."""
    assert one_line(told(words)) == message


def test_what_dies_in_silence() -> None:
    assert attempt(lambda: die_of(signal.SIGSEGV)) == Result(message="the compiler died of SIGSEGV")


def test_what_never_ends(tmp_path: Path) -> None:
    """It is ended with what it started, as Triton starts ptxas."""
    note = tmp_path / "pid"

    def compile_kernel() -> int:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note.write_text(str(sleeper.pid))
        return sleeper.wait()

    assert attempt(compile_kernel, limit=2.0) == Result(message="no end after 2 s")
    deadline = time.monotonic() + 30
    while Path("/proc", note.read_text(), "stat").is_file() and is_alive(note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_computes_for_ever() -> None:
    def compile_kernel() -> int:
        while True:
            pass

    found = attempt(compile_kernel, cpu_limit=1)
    assert found == Result(message="the compiler died of SIGKILL")


def test_the_runner_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of a compiler's output, and no exception, gets out."""
    attempt(failing(SystemExit(3), "words"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines"), "ValueError: two\nlines"),
        (IndexError(), "IndexError"),
        (RuntimeError("at 1:0:\ndef f(a,\n^\nNameError('no x')"), "NameError: no x"),
        (RuntimeError("at 1:0:\ndef f(a,\n^\nno repr"), "RuntimeError: no repr"),
    ],
)  # fmt: skip
def test_messages(error: BaseException, message: str) -> None:
    assert message_of(error) == message


def test_a_message_is_the_same_everywhere() -> None:
    text = "ptxas /tmp/tmpab12cd34.ptx failed at 0x7ffdeadbeef\nin /home/me/x/fused_moe.py:3"
    assert one_line(text) == "ptxas tmp….ptx failed at 0x… in fused_moe.py:3"
    assert len(one_line("long " * 200)) <= 300
    assert told("nothing wrong here") == ""


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([("a", Result(1)), ("b", Result(3)), ("c", Result(2))], Outcome("b", 3)),
        ([("a", Result(9)), ("b", Result(message="no")), ("c", Result(message="nor"))],
         Outcome("b", 0, "no")),
    ],
)  # fmt: skip
def test_what_decides(results: Any, expected: Outcome) -> None:
    """A kernel that fails stops the launch; else the one that needs most memory may."""
    assert worst(results) == expected
