"""The torch and the Triton of an environment, where they are not those that a release pins.

torch is asked for which GPUs it has code; what another Triton compiles is not known here.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions

from overlay.answers.binaries import Torch
from overlay.answers.probe import Python
from overlay.answers.runnable import Kernels
from overlay.kernels.code import code_of

#: It answers without a GPU, where torch.cuda.get_arch_list() does not.
_ASK = "import torch; print(torch._C._cuda_getArchFlags())"
#: Seconds that torch has to be imported; from a cold disk it takes 20.
TIMEOUT = 90.0
_FLAG = re.compile(r"(sm|compute)_(\d+)(\d)(a?)")


@dataclass(frozen=True)
class Stack:
    """What kernels come to in an environment, and what is to be known of it."""

    kernels: Kernels
    notes: tuple[str, ...] = ()


def look(python: Python, kernels: Kernels) -> Stack:
    """What is known of a release's kernels, with the torch and the Triton that `python` imports."""
    notes = list[str]()
    binaries, compiled = kernels.binaries, kernels.compiled
    torch = _version(python.paths, "torch")
    if binaries and torch and torch != binaries.torch.version:
        found = architectures(python)
        code = () if found is None else (code_of(*found),)
        known = Torch(version=torch, wheel=binaries.torch.wheel, code=code)
        told = (
            f"it has code for {code[0]}" if code else "it does not tell for which GPUs it has code"
        )
        notes.append(f"torch is {torch}, not the release's {binaries.torch.version}; {told}")
        binaries = binaries.model_copy(update={"torch": known})
    triton = _version(python.paths, "triton")
    if compiled and triton and triton != compiled.triton:
        notes.append(
            f"Triton is {triton}, not the release's {compiled.triton}; what it compiles for which "
            "GPU is not known here"
        )
        compiled = None
    return Stack(Kernels(binaries, compiled), tuple(notes))


def architectures(python: Python) -> tuple[list[str], list[str]] | None:
    """For which architectures the torch of an environment has cubins, and PTX; None if it does not
    tell."""
    try:
        done = subprocess.run(
            [python.executable, "-c", _ASK], capture_output=True, text=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    flags = _FLAG.findall(done.stdout)
    if done.returncode or not flags:
        return None
    by_kind: dict[str, list[str]] = {"sm": [], "compute": []}
    for kind, major, minor, exact in flags:
        by_kind[kind].append(f"{major}.{minor}{exact}")
    return by_kind["sm"], by_kind["compute"]


def _version(paths: Sequence[str], name: str) -> str | None:
    """The version of a distribution that is installed; None if there is none."""
    found = next(iter(distributions(name=name, path=list(paths))), None)
    return found.version if found else None
