"""The torch and the Triton of an environment count, where they are not the release's."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlay.answers import stack
from overlay.answers.probe import Python
from overlay.answers.runnable import Kernels, Place

from ..made_matrix import made
from .test_runnable import code, triton

NOTHING = Kernels(code("7.5", "8.0"), triton())
"""Of a release that pins torch 2.6.0 and Triton 3.3.0."""


def python(folder: Path, answer: str, **versions: str) -> Python:
    """An environment with these distributions, whose torch answers so."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{answer}\n")
    script.chmod(0o755)
    return Python(str(script), (str(folder),))


def test_the_releases_own_are_not_asked(tmp_path: Path) -> None:
    found = stack.look(python(tmp_path, "exit 1", torch="2.6.0", triton="3.3.0"), NOTHING)
    assert found == stack.Stack(NOTHING)


def test_nothing_installed_is_the_releases_own(tmp_path: Path) -> None:
    assert stack.look(python(tmp_path, "exit 1"), NOTHING) == stack.Stack(NOTHING)


def test_another_torch_is_asked(tmp_path: Path) -> None:
    answer = "echo sm_80 sm_90a sm_120 compute_120"
    found = stack.look(python(tmp_path, answer, torch="2.9.0+cu128"), NOTHING)
    assert found.notes == (
        "torch is 2.9.0+cu128, not the release's 2.6.0; it has code for 8.0 9.0a 12.0, PTX 12.0",
    )
    assert found.kernels.binaries is not None
    assert found.kernels.binaries.lacking("12.1") == ()
    assert found.kernels.binaries.lacking("7.5") == ("torch",)


@pytest.mark.parametrize("answer", ["exit 1", "echo", "echo [] >&2; exit 3", "echo sm_eighty"])
def test_a_torch_that_does_not_tell(tmp_path: Path, answer: str) -> None:
    """Then nothing is said to be lacking in it."""
    found = stack.look(python(tmp_path, answer, torch="2.9.0"), NOTHING)
    (note,) = found.notes
    assert note.endswith("it does not tell for which GPUs it has code")
    assert found.kernels.binaries is not None
    assert found.kernels.binaries.lacking("12.0") == ()


def test_a_python_that_is_gone(tmp_path: Path) -> None:
    gone = Python(str(tmp_path / "gone"), ())
    assert stack.architectures(gone) is None


def test_another_triton_is_not_known(tmp_path: Path) -> None:
    found = stack.look(python(tmp_path, "exit 1", triton="3.5.0"), NOTHING)
    assert found.kernels.compiled is None
    assert found.notes[0].startswith("Triton is 3.5.0, not the release's 3.3.0; what it compiles")
    place = Place("float16", "auto", "7.5")
    outcome = next(one for one in made("1.0", "patched").outcomes if one.verdict == "right")
    assert NOTHING.over(outcome, place).verdict == "cannot-run"
    assert found.kernels.over(outcome, place).verdict == "right"
