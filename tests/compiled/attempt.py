"""Compile one kernel in a process of its own, which LLVM may abort and a time limit may end."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

CPU_LIMIT = 300
"""Seconds that the compiler may compute, and that ptxas may: the slowest kernels take 25 each."""
LIMIT = 3600.0
"""Seconds by the clock, however busy the machine is."""
POLL = 0.02

_NOISE = (
    (re.compile(r"0x[0-9a-f]{6,}"), "0x…"),
    (re.compile(r"(?<![\w:/.])/\S*/(?=[\w.-]+)"), ""),
    (re.compile(r"tmp\w{6,}"), "tmp…"),
    (re.compile(r"\s+"), " "),
)
_SAID = re.compile(
    r"(?P<whole>(?:Unsupported conversion from .*\n)?LLVM ERROR: .*|Assertion .*)"
    r"|\b(?:error|fatal)\s*: (?!Internal Triton)(?P<rest>.*)"
)
"""How LLVM, MLIR and ptxas say what is wrong, in the first line that does."""
LONGEST = 300


class SharedMemoryError(Exception):
    """A block needs more shared memory than the GPU has: bytes."""


@dataclass(frozen=True)
class Result:
    """What a compile came to: bytes of shared memory that a block needs, or a message."""

    shared: int = 0
    message: str = ""


def attempt(
    compile_kernel: Callable[[], int], limit: float = LIMIT, cpu_limit: int = CPU_LIMIT
) -> Result:
    """Return what `compile_kernel` comes to, which returns the bytes of shared memory.

    It runs in a fork, which is killed with all it started after `limit` seconds.
    """
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            _run(compile_kernel, cpu_limit, answer, said)
        status = _wait(child, limit)
        answer.seek(0)
        said.seek(0)
        written, words = answer.read(), said.read().decode("utf-8", "replace")
    if status is None:
        return Result(message=f"no end after {limit:.0f} s")
    if os.WIFSIGNALED(status):
        return Result(message=one_line(killed(os.WTERMSIG(status), words)))
    shared, message = json.loads(written)
    return Result(shared, one_line(told(words) or told(message) or message) if message else "")


def _run(
    compile_kernel: Callable[[], int], cpu_limit: int, answer: IO[bytes], said: IO[bytes]
) -> None:
    """Be the child: answer and leave, by no other way out than this."""
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            result: tuple[int, str] = compile_kernel(), ""
        except SharedMemoryError as error:
            result = int(str(error)), ""
        except BaseException as error:
            result = 0, message_of(error)
        answer.write(json.dumps(result).encode())
        answer.flush()
    finally:
        os._exit(0)


def _wait(child: int, limit: float) -> int | None:
    """Return the child's status; None if it had to be killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(POLL)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def killed(by: int, words: str) -> str:
    """Return what a compiler's death by a signal means, given what it said on stderr."""
    name = signal.Signals(by).name
    return f"{name}: {told(words)}" if told(words) else f"the compiler died of {name}"


def message_of(error: BaseException) -> str:
    """Return what an error says: of Triton's, which quote source first, what is below the caret."""
    words = re.split(r"\^\s*\n", str(error))[-1].strip()
    quoted = _QUOTED.fullmatch(words)
    if quoted:
        return f"{quoted['type']}: {ast.literal_eval(quoted['words'])}"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


_QUOTED = re.compile(r"(?P<type>\w+)\((?P<words>'.*'|\".*\")\)", re.S)
"""An error in an error, by its repr."""


def told(words: str) -> str:
    """Return the line of a compiler's output that says what is wrong; nothing if none does."""
    found = _SAID.search(words)
    return (found["whole"] or found["rest"]) if found else ""


def one_line(text: str) -> str:
    """Return a message in a line that is the same on every machine."""
    for pattern, replacement in _NOISE:
        text = pattern.sub(replacement, text)
    return text.strip()[:LONGEST]
