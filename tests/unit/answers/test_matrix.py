"""The matrix: a made-up one is kept, read back, counted and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_upstream import Ran, Upstream
from overlay.answers import matrix
from overlay.answers.matrix import Cell, Matrix, Outcome, Variant, compare, compress, counts, expand
from overlay.base.errors import OverlayError

AXES = {
    "dtype": ["float16", "float32"],
    "kv_cache_dtype": ["auto"],
    "capability": ["7.5", "8.0", "9.0"],
}
RIGHT = {"verdict": "right", "engine": "v1", "backend": "flash", "basis": "measured"}
TYPE_ERROR = {"verdict": "type-error", "engine": "v0", "message": "got 'use_irope'"}
EXPLAINED = {"verdict": "explained", "message": "Set VLLM_USE_V1=1"}
SELECTED = {"verdict": "selected", "engine": "v0", "backend": "xformers"}
OTHER = {"verdict": "selected", "engine": "v1", "backend": "flex"}
OUTCOMES = [RIGHT, TYPE_ERROR, EXPLAINED, SELECTED, OTHER]
STOCK = [1, 0, 0, 1, 1, 1]


def run_of(llama4: list[int], control: list[int] | None = None, backend: str = "unset") -> Any:
    row = {"backend": backend, "v1": "0", "length": "past", "flashinfer": False}
    numbers = {"llama4": llama4, "control": control or [3] * 6}
    return {"release": "1.0", "axes": AXES, "outcomes": OUTCOMES, "rows": [{**row, **numbers}]}


def made(llama4: list[int], control: list[int] | None = None, **options: Any) -> Matrix:
    variant: Variant = options.pop("variant", "patched")
    return matrix.from_run(run_of(llama4, control, **options), variant)


stock = made(STOCK, variant="stock")


@given(st.lists(st.integers(0, 30), min_size=1))
def test_runs_survive(numbers: list[int]) -> None:
    assert expand(compress(numbers)) == numbers


def test_cells() -> None:
    verdicts = {str(cell): outcome.verdict for cell, outcome in stock.cells("llama4")}
    assert len(verdicts) == 6
    expected = (
        "capability 8.0, KV cache auto, float16, VLLM_ATTENTION_BACKEND unset, VLLM_USE_V1 0, "
        "max_model_len past the chunk"
    )
    assert next(cell for cell, found in verdicts.items() if found == "right") == expected
    assert counts(stock) == {"type-error": 4, "right": 2}
    assert matrix.summary(stock) == "1.0 stock: 6 cells, 4 type-error, 2 right"


def test_file_survives(tmp_path: Path) -> None:
    path = matrix.write(tmp_path, stock)
    assert path == tmp_path / "matrix/1.0.stock.json"
    assert matrix.read(path) == stock
    assert matrix.dumps(matrix.read(path)) == path.read_text("utf-8")
    # A row a line: what changes shows in a diff.
    assert sum('"backend": "unset"' in line for line in path.read_text("utf-8").splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 2}, "schema"),
        ({"rows": []}, None),
        ({"outcomes": []}, "an outcome that is not there"),
        ({"axes": {**AXES, "dtype": ["float16"]}}, "has 6 cells, not 3"),
        ({"extra": 1}, "extra"),
    ],
)
def test_damage_is_found(tmp_path: Path, change: dict[str, Any], problem: str | None) -> None:
    path = matrix.write(tmp_path, stock)
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    if problem is None:
        assert not matrix.read(path).llama4
        return
    with pytest.raises(OverlayError, match=problem):
        matrix.read(path)


def test_same_row_twice() -> None:
    run = run_of(STOCK)
    with pytest.raises(OverlayError, match="two rows are of the same configuration"):
        matrix.from_run({**run, "rows": run["rows"] * 2}, "stock")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match=r"vllm-overlay matrix RELEASE --stock"):
        matrix.read(tmp_path / "gone.json")


def test_all_well() -> None:
    assert compare(stock, made([0, 0, 0, 2, 2, 0])) == ()


@pytest.mark.parametrize(
    ("patched", "problem"),
    [
        (made([1, 0, 0, 0, 0, 1]), r"type-error: got 'use_irope' \(2 cells; capability 7.5"),
        (made([0, 2, 0, 0, 0, 0]), r"right on stock, explained \(Set VLLM_USE_V1=1\) here"),
        (made([0] * 6, [3, 3, 4, 3, 3, 3]), r"without chunks, selected \(v0 xformers\) became"),
        (made([0] * 6, backend="XFORMERS"), r"stock and patched have different cells"),
    ],
)
def test_problems(patched: Matrix, problem: str) -> None:
    (found,) = compare(stock, patched)
    assert re.search(problem, found)


REFUSAL = (
    "With {settings}, none can do that up to --max-model-len {max_model_len}. "
    "Why: V1 {backend}: no. "
    "What works instead: unset VLLM_ATTENTION_BACKEND and --dtype float16 (V0 XFORMERS), or "
    "--kv-cache-dtype fp8_e4m3 (V1 FLASH_ATTN), or --max-model-len 8192 or less (V1 FLASHINFER)."
)
REFUSED = Cell("FLASHINFER", "unset", "past", True, "float32", "fp8_e5m2", "8.0")


def test_message_is_filled() -> None:
    outcome = Outcome(verdict="explained", message=REFUSAL)
    told = outcome.message_for(REFUSED, 30000)
    assert told.startswith(
        "With --kv-cache-dtype fp8_e5m2, --dtype float32, VLLM_ATTENTION_BACKEND=FLASHINFER on "
        "compute capability 8.0, none can do that up to --max-model-len 30000. Why: V1 FLASHINFER: "
    )
    beside = outcome.message_beside("FLASHINFER")
    assert beside.startswith("With these settings, none can do that up to this max_model_len. Why")
    assert "{" not in told + beside


DUMP = (
    "1 validation error for ModelConfig Value error, VLLM_ATTENTION_BACKEND is set to FLASHINFER, "
    "but flashinfer module was not found. See https://example.org for how to install it. "
    "[type=value_error, input_value=ArgsKwargs((), {'model': ...gits_processors': None}), "
    "input_type=ArgsKwargs] For further information visit "
    "https://errors.pydantic.dev/2.14/v/value_error"
)
TWO = (
    "2 validation errors for VllmConfig cache.dtype Input should be 'auto' [type=literal_error, "
    "input_value='x', input_type=str] For further information visit https://errors.pydantic.dev/2 "
    "seed Input should be an integer [type=int_type, input_value='x', input_type=str]"
)


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        (
            DUMP,
            "VLLM_ATTENTION_BACKEND is set to FLASHINFER, but flashinfer module was not found. See "
            "https://example.org for how to install it.",
        ),
        (f"ValidationError: {TWO}", "ValidationError: cache.dtype Input should be 'auto'"),
        ("wrong attention [type=x]", "wrong attention [type=x]"),
    ],
)
def test_dumps_are_shown_by_their_first_error(recorded: str, shown: str) -> None:
    outcome = Outcome(verdict="explained", message=recorded)
    assert outcome.message_for(REFUSED, 30000) == shown
    assert outcome.message_beside("FLASHINFER") == shown
    right = made([0] * 6)
    crash = Outcome(verdict="crash", message=recorded)
    patched = right.model_copy(update={"outcomes": (crash,) * len(right.outcomes)})
    (problem, *_) = compare(right, patched)
    assert problem.startswith(f"1.0: crash: {shown} (")


def test_what_is_kept_of_all_releases_is_shown_without_dumps() -> None:
    root = Path(__file__).parents[3]
    files = sorted((root / matrix.FOLDER).glob("*.stock.json"))
    kept = [outcome for file in files for outcome in matrix.read(file).outcomes]
    assert any("input_value=" in one.message for one in kept)
    assert not any("input_value=" in one.message_beside("x") for one in kept)


def test_remedies() -> None:
    found = list(matrix.remedies(REFUSED, Outcome(verdict="explained", message=REFUSAL)))
    assert [(words, engine) for words, engine, _ in found] == [
        ("unset VLLM_ATTENTION_BACKEND and --dtype float16", "v0"),
        ("--kv-cache-dtype fp8_e4m3", "v1"),
        ("--max-model-len 8192 or less", "v1"),
    ]
    assert [cell for *_, cell in found] == [
        replace(REFUSED, backend="unset", dtype="float16"),
        replace(REFUSED, kv_cache_dtype="fp8"),
        replace(REFUSED, length="at"),
    ]
    assert list(matrix.remedies(REFUSED, Outcome(verdict="explained", message="Use --x"))) == []


def test_a_remedy_to_install_flashinfer_is_of_the_default_backend() -> None:
    """A row with it is kept where it is the default, and where it is asked for by name."""
    message = "Why: none. What works instead: install FlashInfer (V1 FLASHINFER)."
    (found,) = matrix.remedies(REFUSED, Outcome(verdict="explained", message=message))
    assert found == ("install FlashInfer", "v1", replace(REFUSED, backend="unset", flashinfer=True))


@pytest.mark.parametrize(
    ("engine", "problem"),
    [("V1", None), ("V0", r"told to try --dtype float16 \(v0\), which is right \(v1 flash\)")],
)
def test_advice_is_followed(engine: str, problem: str | None) -> None:
    """What a refusal names has to work, on the engine that it names."""
    message = f"What works instead: --dtype float16 ({engine} FLASH)."
    run = run_of([0, 0, 0, 5, 5, 5])
    run["outcomes"] = [*OUTCOMES, {"verdict": "explained", "message": message}]
    found = compare(made([1] * 6, variant="stock"), matrix.from_run(run, "patched"))
    assert len(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])


def test_settle(tmp_path: Path) -> None:
    """A run is kept, or compared with what is kept."""
    assert matrix.settle(tmp_path, stock, check=True) != []
    assert matrix.settle(tmp_path, stock, check=False) == []
    assert matrix.settle(tmp_path, stock, check=True) == []
    (problem,) = matrix.settle(tmp_path, made([0] * 6, variant="stock"), check=True)
    assert "1.0.stock.json is not what a run gives" in problem


def test_command_compares(run: Callable[..., Ran], upstream: Upstream) -> None:
    root = upstream.root
    matrix.write(root, stock)
    matrix.write(root, made([0] * 6))
    ran = run("matrix", "1.0", "--compare")
    assert ran.status == 0, ran.err
    assert "1.0 patched: 6 cells, 6 right" in ran.out
    matrix.write(root, made(STOCK))
    ran = run("matrix", "1.0", "--compare", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["cells"]["1.0 patched"] == {"type-error": 4, "right": 2}
    assert run("matrix", "1.0", "--compare", "--stock").status == 2


def test_a_cell_or_a_column_is_looked_up_without_the_others() -> None:
    kept = made(STOCK)
    assert {cell: kept.outcome_of(cell) for cell in kept.llama4} == kept.llama4
    for capability in kept.axes.capability:
        column = {c: out for c, out in kept.llama4.items() if c.capability == capability}
        assert dict(kept.column(capability)) == column
    assert kept.outcome_of(replace(next(iter(kept.llama4)), dtype="int3")) is None
    assert kept.outcome_of(replace(next(iter(kept.llama4)), backend="NONE")) is None
