"""What becomes of quantised weights: made-up results, and what is kept of the real releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from made_upstream import Ran, Upstream
from overlay.answers import binaries, compiled, explain, matrix, matrix_run, runnable, weights
from overlay.answers.binaries import Binaries, Part
from overlay.answers.explain import Settings
from overlay.answers.matrix import Outcome
from overlay.answers.runnable import Kernels, Place
from overlay.answers.weights import Asked, Held, Weights
from overlay.base.errors import OverlayError
from overlay.base.project import Project
from overlay.kernels import needed
from overlay.kernels.code import Code
from overlay.patches.workspace import Workspace
from overlay.releases import versions

from ..made_matrix import AXES, keep, made
from .test_runnable import code, triton

Run = Callable[..., Ran]

ROOT = Path(__file__).parents[3]
VERSIONS = versions.load(ROOT / "VERSIONS.toml")
RELEASES = [release.name for release in VERSIONS.patched]
REFUSED = {
    "experts": "awq_marlin.AWQMoEMethod", "stage": "step", "message": "Not with weights on input."
}  # fmt: skip
RUNS = {"experts": "moe_wna16.MoeWNA16Method", "launches": ["triton.fused_moe.gptq-int4"]}
MARLIN = {"experts": "fp8.Fp8MoEMethod", "launches": ["gptq_marlin_gemm"]}
NO_CACHE = {"stage": "layers", "message": "fp8_e5m2 kv-cache is not supported."}
OLD = {"stage": "config", "message": "Minimum capability: 80. Current capability: 75."}
WRONG = {"stage": "wrong", "message": "the order is ignored"}
UNKNOWN = {"stage": "unknown", "message": "launches _C.new_kernel"}
STRANGE = {"launches": ["triton.new_kernel"]}
OUTCOMES = [REFUSED, RUNS, MARLIN, NO_CACHE, OLD, WRONG, UNKNOWN, STRANGE]


def run_of(release: str = "1.0") -> dict[str, Any]:
    """AWQ stops in the first step, unless it is moe_wna16; w4a16 takes no e5m2, and no 7.5."""

    def row(
        checkpoint: str, flag: str, which: Callable[[str, str, str], dict[str, Any]]
    ) -> dict[str, Any]:
        results = [OUTCOMES.index(which(*place)) for place in product(*AXES.values())]
        return {"checkpoint": checkpoint, "quantization": flag, "experts": 16, "results": results}

    def packed(_: str, kv_cache_dtype: str, capability: str) -> dict[str, Any]:
        if capability < "8":
            return OLD
        return NO_CACHE if kv_cache_dtype == "fp8_e5m2" else RUNS

    rows = [
        row("awq", "", lambda *_: REFUSED),
        row("awq", "moe_wna16", lambda *_: RUNS),
        row("w4a16", "", packed),
        row("fp8", "", lambda *_: MARLIN),
        row("gptq-act-order", "", lambda *_: WRONG),
        row("w8a16", "", lambda *_: UNKNOWN),
        row("fp8-block", "", lambda *_: STRANGE),
    ]
    return {"release": release, "axes": AXES, "outcomes": OUTCOMES, "rows": rows}


def kernels(asked: Asked, made: Weights | None = None, **others: Any) -> Kernels:
    return Kernels(held=Held(asked, made or weights.from_run(run_of())), **others)


def answered(found: Kernels, capability: str, **settings: str) -> Outcome:
    laid = runnable.laid_over(made("1.0", "patched"), found)
    return explain.look_up(laid, Settings(**settings).cell(capability))  # type: ignore[arg-type]


def test_what_a_release_says_is_in_the_way() -> None:
    found = answered(kernels(Asked("awq")), "8.6")
    assert (found.verdict, found.basis, found.engine) == ("cannot-run", "layers", "v1")
    assert found.message == (
        "stops in the first step, awq_marlin.AWQMoEMethod: Not with weights on input."
    )
    assert answered(kernels(Asked("awq", "moe_wna16")), "8.6").verdict == "right"
    assert answered(kernels(Asked("w4a16")), "8.6").verdict == "right"
    assert answered(kernels(Asked("w4a16")), "8.6", kv_cache_dtype="fp8_e5m2").message == (
        "stops while its layers are made: fp8_e5m2 kv-cache is not supported."
    )
    # A refusal of the settings comes before the weights.
    assert answered(kernels(Asked("w4a16")), "7.5").verdict == "explained"
    assert "refused at start-up" in answered(kernels(Asked("w4a16")), "7.5", dtype="half").message


def test_what_ignores_an_order_is_wrong() -> None:
    found = answered(kernels(Asked("gptq-act-order")), "8.6")
    assert (found.verdict, found.message) == ("wrong", "the order is ignored")


def test_a_gpu_is_answered_for_by_the_next_lower_one() -> None:
    held = Held(Asked("w4a16"), weights.from_run(run_of()))
    assert held.outcome("auto", "auto", "8.7") == held.outcome("auto", "auto", "8.6")
    assert held.outcome("auto", "auto", "9.0") is None
    assert held.outcome("bfloat16", "auto", "8.6") is None


def test_kernels_of_quantised_weights_are_asked_for() -> None:
    marlin = next(need for need in needed.QUANTISED if need.name == "Marlin")
    part = Part(library=marlin.library, kernels=marlin.kernels, code=Code(cubins=("9.0",)))
    found = code("7.5", "8.0").model_copy(update={"parts": (part,)})
    outcome = answered(kernels(Asked("fp8"), binaries=found), "8.6")
    assert outcome.message == (
        "the wheel of 1.0 has no code for capability 8.6 in its kernels for Marlin, which "
        "gptq_marlin_gemm launches"
    )
    assert answered(kernels(Asked("awq", "moe_wna16"), binaries=found), "8.6").verdict == "right"


def test_triton_is_asked_for_the_experts_as_they_are_held() -> None:
    """Unquantised ones do not compile on 7.5; of these nothing is known there."""
    half = {"dtype": "half"}
    assert answered(Kernels(compiled=triton()), "7.5", **half).verdict == "cannot-run"
    held = kernels(Asked("awq", "moe_wna16"), compiled=triton())
    assert answered(held, "7.5", **half).verdict == "right"
    assert held.unknown(Place("float16", "auto", "7.5")) == (
        "whether triton.fused_moe.gptq-int4 runs on this GPU",
    )


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Asked("w8a16"), "can run, since it launches _C.new_kernel"),
        (Asked("fp8-block"), "whether triton.new_kernel runs on this GPU"),
        (Asked("quark (bits 3)"), "what becomes of weights quark (bits 3) (16 experts)"),
        (Asked("awq", "gptq"), "what becomes of weights AWQ"),
        (replace(Asked("awq"), experts=64), "what becomes of weights AWQ"),
    ],
)
def test_what_is_unknown_is_said_to_be(asked: Asked, told: str) -> None:
    held = kernels(asked)
    assert answered(held, "8.6").verdict == "right"
    (said,) = held.unknown(Place("auto", "auto", "8.6"))
    assert told in said


@pytest.mark.parametrize(
    ("checkpoint", "flag", "expected"),
    [
        (None, None, None),
        (None, "awq", Asked("awq", "awq")),
        (None, "moe_wna16", Asked("awq", "moe_wna16")),
        (None, "fp8", Asked("none", "fp8")),
        (None, "none", Asked("none")),
        (None, "compressed-tensors", Asked("w4a16")),
        (None, "w8a8-fp8", Asked("w8a8-fp8")),
        ("fp8", "fp8", Asked("fp8")),
        ("none", "fp8", Asked("none", "fp8")),
        ("w4a16", "compressed_tensors", Asked("w4a16")),
        ("gptq", "moe_wna16", Asked("gptq", "moe_wna16")),
        ("awq", None, Asked("awq")),
    ],
)
def test_options(checkpoint: str | None, flag: str | None, expected: Asked | None) -> None:
    assert weights.asked(checkpoint, flag) == expected


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(OverlayError, match="nothing is known of --quantization q2_k") as raised:
        weights.asked(None, "q2_k")
    assert "w4a16" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"release": 1}, "release"),
        ({"rows": [{**run_of()["rows"][0], "results": [0]}]}, "1 places, not 36"),
        ({"rows": [{**run_of()["rows"][0], "results": [9] * 36}]}, "an outcome that is not there"),
        ({"rows": 2 * run_of()["rows"]}, "two rows are of the same weights"),
    ],
)
def test_damaged(change: dict[str, Any], why: str) -> None:
    with pytest.raises(OverlayError, match=why) as raised:
        weights.from_run({**run_of(), **change})
    assert "--weights" in str(raised.value)


@pytest.fixture
def upstream_weights(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """A project with a matrix and weights of 1.0 and 1.1; the program is stood in for."""
    keep(upstream.root, "1.0", "1.1")
    for release in ("1.0", "1.1"):
        weights.settle(upstream.root, weights.from_run(run_of(release)), check=False)

    def run_weights(workspace: Workspace, release: Any, folder: Path, jobs: int) -> Weights:
        return weights.from_run(run_of(release.name))

    monkeypatch.setattr(matrix_run, "run_weights", run_weights)
    return upstream


def test_command(run: Run, upstream_weights: Upstream) -> None:
    ran = run("matrix", "1.0", "--weights", "--check", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["cells"]["1.0 weights"] == {
        "launched": 120, "step": 36, "wrong": 36, "unknown": 36, "config": 18, "layers": 6
    }  # fmt: skip
    path = weights.path_of(upstream_weights.root, "1.0")
    path.write_text(path.read_text("utf-8").replace("Not with", "Never with"), "utf-8")
    ran = run("matrix", "1.0", "--weights", "--check")
    assert ran.status == 1
    assert "1.0.weights.json is not what a run gives" in ran.err
    ran = run("matrix", "1.0", "--weights")
    assert ran.status == 0, ran.err
    assert "1.0 weights: 7 rows, 120 launched" in " ".join(ran.out.split())
    assert "Never with" not in path.read_text("utf-8")


@pytest.mark.parametrize("option", ["--compare", "--stock", "--triton"])
def test_command_does_one_thing(run: Run, upstream_weights: Upstream, option: str) -> None:
    assert run("matrix", "1.0", "--weights", option).status == 2


def test_explain_names_the_flag(run: Run, upstream_weights: Upstream) -> None:
    ran = run("explain", "--release", "1.0", "--gpu", "RTX A6000", "--checkpoint", "awq")
    assert ran.status == 0, ran.err
    said = " ".join(ran.out.split())
    assert "weights AWQ, 4 bits (16 experts)" in said
    assert "overlay cannot run, V1 FlashAttention: stops in the first step" in said
    assert "to change: --quantization moe_wna16; then it is right, V1 FlashAttention" in said
    assert "patched and right on this GPU: 1.1 with --quantization moe_wna16" in said
    ran = run("explain", "--gpu", "RTX A6000", "--quantization", "moe_wna16")
    assert "Patched and right here: 1.0 – 1.1." in " ".join(ran.out.split())


def test_a_flag_and_a_cache_are_changed_together(run: Run, upstream_weights: Upstream) -> None:
    ran = run(
        "explain", "--release", "1.0", "--gpu", "RTX A6000", "--checkpoint", "awq",
        "--kv-cache-dtype", "fp8", "--json",
    )  # fmt: skip
    use = json.loads(ran.out)["releases"]["1.0"]["patched"]["use"]
    assert use["changes"] == ["--quantization moe_wna16", "--kv-cache-dtype fp8_e5m2"]


def test_a_release_of_which_nothing_is_kept_is_no_way_out(
    run: Run, upstream_weights: Upstream
) -> None:
    weights.path_of(upstream_weights.root, "1.1").unlink()
    ran = run("explain", "--release", "1.0", "--gpu", "RTX A6000", "--checkpoint", "awq", "--json")
    assert json.loads(ran.out)["releases"]["1.0"]["elsewhere"] == {
        "1.0": ["--quantization moe_wna16"]
    }
    ran = run("explain", "--release", "1.1", "--gpu", "RTX A6000", "--checkpoint", "awq")
    assert "not known: what becomes of weights AWQ" in " ".join(ran.out.split())
    ran = run("explain", "--gpu", "RTX A6000", "--checkpoint", "awq")
    assert "Not known of 1.1: what becomes of weights AWQ" in " ".join(ran.out.split())


@pytest.mark.parametrize("release", RELEASES)
def test_patched_holds_weights_as_stock(release: str, tmp_path: Path) -> None:
    """No patch of a release changes a method, a loader, or how experts are made and called."""
    workspace = Workspace.open(Project(ROOT), tmp_path, offline=True)
    layers = "vllm/model_executor/layers/"
    changed = {
        (patch.path.topic, file.path)
        for patch in workspace.patches(VERSIONS.get(release))
        for file in patch.files
        if file.path.startswith((layers, "vllm/model_executor/model_loader/"))
    }
    # It declares an operator's mutation to torch.compile.
    assert changed <= {("moe-input-mutation", f"{layers}fused_moe/layer.py")}


@pytest.mark.parametrize("release", RELEASES)
def test_speaks_of_every_format_on_every_gpu_of_the_matrix(release: str) -> None:
    kept = weights.read(ROOT, release)
    asked = matrix.read(matrix.path_of(ROOT, release, "patched")).axes
    assert kept.axes == asked
    for form, experts in product(weights.FORMATS, (16, 128)):
        assert "" in kept.flags(form, experts)
        assert kept.outcome_of(Asked(form, "", experts), "auto", "auto", "8.0") is not None


@pytest.mark.parametrize("release", RELEASES)
def test_every_kernel_is_in_the_binaries(release: str) -> None:
    """What a step launches is known by its operator, and the wheel has it."""
    found: Binaries = binaries.read(ROOT, release)
    kernels = compiled.read(ROOT, release)
    for outcome in weights.read(ROOT, release).outcomes:
        assert outcome.stage != "unknown", outcome.message
        held = [name for name in outcome.launches if not name.startswith("triton.")]
        for name in held:
            assert weights._is_known(name, found), name
        for kind in weights.kinds(outcome):
            known = kernels.answer("fused_moe", kind, "float16", "8.0")
            assert known is not None or kind == "fp8-block"


@pytest.mark.parametrize("release", RELEASES)
def test_unquantised_weights_are_in_nobodys_way(release: str) -> None:
    """And so they are answered for as if no weights were named."""
    kept = weights.read(ROOT, release)
    for dtype, kv_cache_dtype, capability in product(*kept.axes.model_dump().values()):
        found = kept.outcome_of(Asked("none"), dtype, kv_cache_dtype, capability)
        assert found is not None
        assert (found.stage, weights.kinds(found)) == ("", ("unquantised",))
