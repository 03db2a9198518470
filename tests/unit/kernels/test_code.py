"""Which GPUs a cubin serves, and which PTX does."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from overlay.kernels.code import Code, code_of


@pytest.mark.parametrize(
    ("architecture", "served", "refused"),
    [
        ("7.0", ("7.0", "7.5"), ("6.1", "8.0", "10.0")),
        ("8.6", ("8.6", "8.7", "8.9"), ("8.0", "9.0", "7.5")),
        ("9.0a", ("9.0",), ("8.9", "10.0")),
        ("10.0", ("10.0", "10.3"), ("9.0", "12.0", "1.0")),
        ("10.0a", ("10.0",), ("10.3", "12.0")),
    ],
)
def test_a_cubin_serves_its_major_from_its_minor_up(
    architecture: str, served: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    code = Code(cubins=(architecture,))
    assert [one for one in served if not code.serves(one)] == []
    assert [one for one in refused if code.serves(one)] == []


@pytest.mark.parametrize(
    ("architecture", "served", "refused"),
    [
        ("8.0", ("8.0", "8.6", "9.0", "10.0", "12.1"), ("7.5", "7.0")),
        ("9.0a", ("9.0",), ("8.9", "10.0", "12.0")),
    ],
)
def test_ptx_serves_what_is_newer(
    architecture: str, served: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    code = Code(ptx=(architecture,))
    assert [one for one in served if not code.serves(one)] == []
    assert [one for one in refused if code.serves(one)] == []


def test_nothing_serves_nothing() -> None:
    assert not Code().serves("9.0")
    assert str(Code()) == "none"


def test_either_of_several_is_enough() -> None:
    code = code_of(["10.0", "7.5", "9.0a", "7.5"], ["8.9"])
    assert code == Code(cubins=("7.5", "9.0a", "10.0"), ptx=("8.9",))
    assert [one for one in ("7.0", "7.5", "8.0", "8.9", "12.0") if code.serves(one)] == [
        "7.5", "8.9", "12.0",
    ]  # fmt: skip
    assert str(code) == "7.5 9.0a 10.0, PTX 8.9"


def test_less() -> None:
    assert code_of(["8.0"], []).is_less_than(code_of(["8.0", "9.0a"], []))
    assert not code_of(["8.0"], []).is_less_than(code_of(["8.0"], []))
    assert not code_of(["8.0"], ["8.0"]).is_less_than(code_of(["8.0", "9.0"], []))


@pytest.mark.parametrize("name", ["90", "sm_90", "9.0f", "9.x", ""])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(ValidationError):
        Code(cubins=(name,))
    with pytest.raises(ValueError, match="no compute capability"):
        Code(cubins=("9.0",)).serves(name)
