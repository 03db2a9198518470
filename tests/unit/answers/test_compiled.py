"""What Triton makes of kernels: a made-up result is kept, read back, compared and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made_upstream import Ran, Upstream
from overlay.answers import compiled, matrix, matrix_run
from overlay.answers.compiled import Answer, Compiled, Use
from overlay.base.errors import OverlayError
from overlay.base.project import Project
from overlay.patches.workspace import Workspace
from overlay.releases import versions

MOE = "vllm.model_executor.layers.fused_moe.fused_moe.fused_moe_kernel"
PREFIX = "vllm.attention.ops.prefix_prefill._fwd_kernel"


def run_of(*rows: tuple[str, str, str, list[int]]) -> dict[str, Any]:
    """What tests/compiled writes."""
    return {
        "release": "1.0",
        "triton": "3.3.1",
        "gpus": [
            {"capability": "7.5", "shared": 65536},
            {"capability": "8.0", "shared": 166912},
        ],
        "outcomes": [
            {"kernel": MOE, "shared": 0, "message": "no conversion from f16 to f16"},
            {"kernel": MOE, "shared": 16384, "message": ""},
            {"kernel": PREFIX, "shared": 98304, "message": ""},
            {"kernel": "", "shared": 0, "message": "vLLM has bfloat16 from capability 8.0 on"},
        ],
        "rows": [
            dict(zip(("use", "kind", "dtype", "results"), row, strict=True))
            for row in rows
            or (
                ("fused_moe", "unquantised", "float16", [0, 1]),
                ("fused_moe", "unquantised", "bfloat16", [3, 1]),
                ("v0-prefix", "auto", "float16", [2, 2]),
            )
        ],
    }


@pytest.fixture
def made() -> Compiled:
    return compiled.from_run(run_of())


def test_answers(made: Compiled) -> None:
    assert made.answer("fused_moe", "unquantised", "float16", "8.0") == Answer("runs")
    assert made.answer("fused_moe", "unquantised", "float16", "7.5") == Answer(
        "does not compile",
        "Triton 3.3.1 does not compile fused_moe_kernel: no conversion from f16 to f16",
    )
    assert made.answer("fused_moe", "unquantised", "bfloat16", "7.5") == Answer(
        "not launched", "vLLM has bfloat16 from capability 8.0 on"
    )
    short = made.answer("v0-prefix", "auto", "float16", "7.5")
    assert short == Answer(
        "too much shared memory",
        "_fwd_kernel needs 98304 bytes of shared memory in a block; capability 7.5 has 65536 "
        "(Triton 3.3.1)",
    )
    assert not short.runs
    enough = made.answer("v0-prefix", "auto", "float16", "8.0")
    assert enough is not None
    assert enough.runs


def test_what_was_not_compiled_has_no_answer(made: Compiled) -> None:
    assert made.answer("fused_moe", "unquantised", "float16", "12.0") is None
    assert made.answer("fused_moe", "awq-int4", "float16", "8.0") is None


def test_a_block_may_have_all_there_is() -> None:
    """On 7.0, V0's kernel needs 98,304 bytes, which is what the GPU has."""
    raw = run_of()
    raw["gpus"][0] = {"capability": "7.0", "shared": 98304}
    answer = compiled.from_run(raw).answer("v0-prefix", "auto", "float16", "7.0")
    assert answer == Answer("runs")


def test_kept(tmp_path: Path, made: Compiled) -> None:
    assert compiled.settle(tmp_path, made, check=False) == []
    assert compiled.path_of(tmp_path, "1.0").name == "1.0.triton.json"
    assert compiled.read(tmp_path, "1.0") == made
    assert compiled.settle(tmp_path, made, check=True) == []


def test_a_check_finds_what_is_different(tmp_path: Path, made: Compiled) -> None:
    found = "1.0: 1.0.triton.json is not what a run gives; run it without --check"
    assert compiled.settle(tmp_path, made, check=True) == [found]
    compiled.settle(tmp_path, made, check=False)
    before = compiled.path_of(tmp_path, "1.0").read_text("utf-8")
    other = compiled.from_run(run_of(("fused_moe", "unquantised", "float16", [1, 1])))
    assert compiled.settle(tmp_path, other, check=True) == [found]
    assert compiled.path_of(tmp_path, "1.0").read_text("utf-8") == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: raw["rows"].append(raw["rows"][0]), "two rows are of the same launch"),
        (lambda raw: raw["gpus"].pop(), "has 2 GPUs, not 1"),
        (lambda raw: raw["outcomes"].pop(), "names an outcome that is not there"),
        (lambda raw: raw["rows"][0].update(use="lora"), "rows.0.use"),
        (lambda raw: raw.update(schema=2), "schema"),
    ],
)
def test_damage_is_told(
    tmp_path: Path, made: Compiled, change: Callable[[Any], object], why: str
) -> None:
    path = compiled.path_of(tmp_path, "1.0")
    compiled.settle(tmp_path, made, check=False)
    raw = json.loads(path.read_text("utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(OverlayError, match=why):
        compiled.read(tmp_path, "1.0")


def test_nothing_kept_is_told(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="cannot read") as raised:
        compiled.read(tmp_path, "1.0")
    assert "--triton" in str(raised.value)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch, made: Compiled) -> list[str]:
    """The releases that the command has had compiled, and whether with what others know."""
    ran: list[str] = []

    def run_triton(
        _workspace: Workspace, release: Any, _folder: Path, _jobs: int, known: Path | None
    ) -> Compiled:
        ran.append(f"{release.name} {'alone' if known is None else known.name}")
        return made

    monkeypatch.setattr(matrix_run, "run_triton", run_triton)
    return ran


def test_command(run: Callable[..., Ran], upstream: Upstream, compiles: list[str]) -> None:
    ran = run("matrix", "1.0", "--triton", "--check")
    assert ran.status == 1
    assert "1.0.triton.json is not what a run gives" in ran.err
    ran = run("matrix", "1.0", "--triton")
    assert ran.status == 0, ran.err
    assert (
        "1.0 Triton 3.3.1: 3 launches on 2 GPUs, 3 runs, 1 does not compile, 1 not launched, "
        "1 too much shared memory"
    ) in " ".join(ran.out.split())
    assert compiled.read(upstream.root, "1.0").triton == "3.3.1"
    ran = run("matrix", "1.0", "--triton", "--check", "--json")
    assert ran.status == 0
    assert json.loads(ran.out)["cells"]["1.0 triton"]["runs"] == 3
    assert compiles == ["1.0 alone", "1.0 known.json", "1.0 alone"]


@pytest.mark.parametrize("option", ["--compare", "--stock"])
def test_command_does_one_thing(run: Callable[..., Ran], compiles: list[str], option: str) -> None:
    assert run("matrix", "1.0", "--triton", option).status == 2
    assert compiles == []


ROOT = Path(__file__).parents[3]
VERSIONS = versions.load(ROOT / "VERSIONS.toml")
KEPT = [release.name for release in VERSIONS.patched]
LAUNCHERS = {
    "vllm/attention/ops/paged_attn.py",
    "vllm/v1/attention/backends/triton_attn.py",
    "vllm/v1/attention/backends/tree_attn.py",
}
"""What tests/compiled runs beside the modules with kernels."""


@pytest.mark.parametrize("release", KEPT)
def test_patched_is_compiled_as_stock(release: str, tmp_path: Path) -> None:
    """No patch of a release changes a kernel that was compiled, or what launches it."""
    workspace = Workspace.open(Project(ROOT), tmp_path, offline=True)
    kept = compiled.read(ROOT, release)
    kernels = {f"{one.module.replace('.', '/')}.py" for one in kept.outcomes if one.kernel}
    assert "vllm/model_executor/layers/fused_moe/fused_moe.py" in kernels
    changed = {
        file.path for patch in workspace.patches(VERSIONS.get(release)) for file in patch.files
    }
    assert changed
    assert not changed & (kernels | LAUNCHERS)


@pytest.mark.parametrize("release", KEPT)
def test_speaks_of_every_gpu_of_the_matrix(release: str) -> None:
    """And of the checkpoints and caches that every release has."""
    kept = compiled.read(ROOT, release)
    patched = matrix.read(matrix.path_of(ROOT, release, "patched"))
    asked = patched.axes
    engines = {one.engine for one in patched.outcomes if one.verdict == "right"}
    uses: tuple[Use, ...] = ("v0-prefix", "v1-triton") if "v0" in engines else ("v1-triton",)
    assert set(asked.capability) <= {gpu.capability for gpu in kept.gpus}
    for capability in asked.capability:
        assert kept.answer("fused_moe", "unquantised", "float16", capability) is not None
        for kv_cache_dtype in asked.kv_cache_dtype:
            for use in uses:
                assert kept.answer(use, kv_cache_dtype, "float16", capability) is not None
