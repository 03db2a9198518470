"""What cannot run on a GPU is said to be so, whatever selection and attention would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream
from overlay.answers import binaries, compiled, explain, matrix, runnable
from overlay.answers.binaries import Binaries, Torch, Wheel
from overlay.answers.compiled import Compiled, Row
from overlay.answers.explain import Settings
from overlay.answers.matrix import Outcome
from overlay.answers.runnable import Kernels
from overlay.kernels.code import Code

from ..made_matrix import keep, made

Run = Callable[..., Ran]

ROOT = Path(__file__).parents[3]
WHEEL = Wheel(file="a.whl", sha256="0" * 64)
MOE = "fused_moe.fused_moe_kernel"
ATTENTION = "triton_unified_attention.kernel_unified_attention_2d"


def code(*cubins: str, release: str = "1.0") -> Binaries:
    """A release whose torch has code for some architectures, and needs nothing else."""
    torch = Torch(version="2.6.0", wheel=WHEEL, code=(Code(cubins=cubins),))
    return Binaries(release=release, wheel=WHEEL, parts=(), torch=torch)


def triton(release: str = "1.0") -> Compiled:
    """On 7.5, no experts in half precision; on 8.9, no attention over an fp8 cache; else all."""
    gpus = [{"capability": name, "shared": 65536} for name in ("7.5", "8.6", "8.9")]
    outcomes = [
        {"kernel": MOE},
        {"kernel": MOE, "message": "no conversion from f16 to f16"},
        {"kernel": ATTENTION, "shared": 70000},
    ]
    rows = [
        {"use": "fused_moe", "kind": "unquantised", "dtype": "float16", "results": [1, 0, 0]},
        {"use": "fused_moe", "kind": "unquantised", "dtype": "bfloat16", "results": [0, 0, 0]},
        {"use": "fused_moe", "kind": "unquantised", "dtype": "float32", "results": [0, 0, 0]},
        {"use": "v1-triton", "kind": "auto", "dtype": "bfloat16", "results": [0, 0, 2]},
    ]
    return compiled.from_run(
        {"release": release, "triton": "3.3.0", "gpus": gpus, "outcomes": outcomes, "rows": rows}
    )


def verdict(kernels: Kernels, capability: str, **settings: str) -> Outcome:
    laid = runnable.laid_over(made("1.0", "patched"), kernels)
    return explain.look_up(laid, Settings(**settings).cell(capability))  # type: ignore[arg-type]


def test_without_code_in_torch_nothing_runs() -> None:
    found = verdict(Kernels(code("7.5", "8.9")), "8.6")
    assert (found.verdict, found.stage, found.basis) == ("cannot-run", "kernel", "binaries")
    assert found.backend == "v1.flash_attn.FlashAttentionImpl"
    assert found.message == "torch 2.6.0 has no code for capability 8.6, but for 7.5 8.9"
    assert verdict(Kernels(code("7.5", "8.0")), "8.6").verdict == "right"


def test_what_triton_does_not_compile_does_not_run() -> None:
    kernels = Kernels(code("7.5", "8.0"), triton())
    found = verdict(kernels, "7.5", dtype="float16")
    assert (found.verdict, found.basis) == ("cannot-run", "compiled")
    assert found.message.endswith("fused_moe_kernel: no conversion from f16 to f16")
    assert verdict(kernels, "7.5", dtype="float32").verdict == "right"
    assert verdict(kernels, "8.6").verdict == "right"


def test_only_the_backend_that_launches_it_is_stopped() -> None:
    kernels = Kernels(None, triton())
    assert verdict(kernels, "8.9").verdict == "right"
    found = verdict(kernels, "8.9", backend="TRITON_ATTN_VLLM_V1")
    assert found.verdict == "cannot-run"
    assert "needs 70000 bytes of shared memory" in found.message


def test_a_refusal_stays_one() -> None:
    """It comes before any kernel, and is what the user reads."""
    found = verdict(Kernels(code("8.0")), "7.5", dtype="auto")
    assert found.verdict == "explained"


def test_a_fault_of_a_kernel_comes_after_the_lack_of_it() -> None:
    launched = Outcome(verdict="crash", stage="kernel", message="no kernel image")
    built = Outcome(verdict="crash", stage="layers", message="no such attribute")
    place = runnable.Place("auto", "auto", "12.0")
    assert Kernels(code("8.0")).over(launched, place).verdict == "cannot-run"
    assert Kernels(code("8.0")).over(built, place) == built


def test_nothing_kept_changes_nothing() -> None:
    whole = made("1.0", "stock")
    assert runnable.laid_over(whole, Kernels()) == whole


def test_other_cells_survive() -> None:
    whole = made("1.0", "patched")
    laid = runnable.laid_over(whole, Kernels(code("7.5", "8.9")))
    assert laid.control == whole.control
    for cell, outcome in whole.llama4.items():
        if cell.capability != "8.6" and outcome.stage != "kernel":
            assert laid.llama4[cell] == outcome


def test_a_column_that_stands_for_another_gpu() -> None:
    kernels = Kernels(code("8.7"))
    laid = runnable.laid_over(made("1.0", "patched"), kernels, {"8.6": "8.7"})
    cell = Settings().cell("8.6")
    assert explain.look_up(laid, cell).verdict == "right"
    other = runnable.laid_over(made("1.0", "patched"), kernels)
    assert explain.look_up(other, cell).verdict == "cannot-run"


def test_a_patched_release_has_to_run_where_stock_does(tmp_path: Path) -> None:
    """On 8.9 stock is made to be right with FlashAttention where patched takes Triton."""
    stock, patched = made("1.0", "stock"), made("1.0", "patched")
    triton_outcome = next(one for one in patched.outcomes if "triton" in one.backend)
    outcomes = tuple(
        triton_outcome if "flash_attn" in one.backend else one for one in patched.outcomes
    )
    patched = patched.model_copy(update={"outcomes": outcomes})
    for one in (stock, patched):
        matrix.write(tmp_path, one)
    path = compiled.path_of(tmp_path, "1.0")
    path.write_text(compiled.dumps(triton()))
    _, problems = runnable.judge(tmp_path, "1.0")
    assert any(
        "right on stock, cannot run here: kernel_unified_attention_2d" in p for p in problems
    )


def test_a_refusal_is_no_loss_where_stock_cannot_run(tmp_path: Path) -> None:
    """The overlay may refuse what has no code, of which stock's own selection knows nothing."""
    stock, patched = made("1.0", "stock"), made("1.0", "patched")
    refused = Outcome(verdict="explained", message="It has no code for this GPU.")
    outcomes = tuple(refused if "flash_attn" in one.backend else one for one in patched.outcomes)
    matrix.write(tmp_path, stock)
    matrix.write(tmp_path, patched.model_copy(update={"outcomes": outcomes}))
    _, problems = runnable.judge(tmp_path, "1.0")
    assert [problem for problem in problems if "right on stock, explained" in problem]
    binaries.write(tmp_path, code("7.5", release="1.0"))
    _, problems = runnable.judge(tmp_path, "1.0")
    assert not [problem for problem in problems if "right on stock, explained" in problem]


def test_explain_tells_the_way_out(run: Run, upstream: Upstream) -> None:
    keep(upstream.root, "1.0", "1.1")
    for name, cubin in (("1.0", "8.0"), ("1.1", "9.0")):
        binaries.write(upstream.root, code(cubin, release=name))
    text = " ".join(run("explain", "--gpu", "A10").out.split())
    assert "Patched and right here: 1.0." in text
    text = " ".join(run("explain", "--gpu", "A10", "--release", "1.1").out.split())
    assert "cannot run, V1 FlashAttention: torch 2.6.0 has no code for capability 8.6" in text
    assert "no settings are right on this GPU patched and right on this GPU: 1.0" in text
    told = json.loads(run("explain", "--gpu", "A10", "--release", "1.1", "--json").out)
    assert told["releases"]["1.1"]["elsewhere"] == {"1.0": []}


def test_no_way_out_is_said(run: Run, upstream: Upstream) -> None:
    keep(upstream.root, "1.0")
    binaries.write(upstream.root, code("9.0", release="1.0"))
    text = " ".join(run("explain", "--gpu", "A10").out.split())
    assert "No release that this overlay patches runs Llama 4 on this GPU past a chunk." in text
    text = " ".join(run("explain", "--gpu", "A10", "--release", "1.0").out.split())
    assert "no release that this overlay patches runs it on this GPU" in text


@pytest.mark.parametrize("variant", ["stock", "patched"])
def test_no_cell_of_the_real_matrix_is_right_without_kernels(variant: matrix.Variant) -> None:
    """By another way than the code's: the columns that the wheels' torch cannot serve."""
    kept = runnable.laid_over(
        matrix.read(matrix.path_of(ROOT, "0.8.5", variant)), runnable.known(ROOT, "0.8.5")
    )
    verdicts = {
        outcome.verdict for cell, outcome in kept.llama4.items() if cell.capability == "12.0"
    }
    assert not verdicts & {"right", "wrong"}
    assert "cannot-run" in verdicts


def test_build_tells_on_which_gpus_the_wheel_is_right(run: Run, upstream: Upstream) -> None:
    keep(upstream.root, "1.0")
    binaries.write(upstream.root, code("7.5", "8.9", release="1.0"))
    ran = run("build", "1.0", "--out", "dist")
    assert ran.status == 0, ran.err
    assert "right on compute capability 7.5 with --dtype float16, 8.9 (vllm-overlay" in ran.out
    (upstream.root / "matrix" / "1.0.patched.json").unlink()
    assert "compute capability" not in run("build", "1.0", "--out", "dist").out


def test_v0_without_chunks(run: Run, upstream: Upstream) -> None:
    """On 7.5 XFormers runs, and the prefix kernel lacks shared memory."""
    keep(upstream.root, "1.0")
    known = triton()
    rows = (
        *known.rows[1:3],
        Row(use="fused_moe", kind="unquantised", dtype="float16", results="3*0"),
        Row(use="v0-prefix", kind="auto", dtype="float16", results="2 2*0"),
    )
    whole = known.model_copy(update={"rows": rows})
    compiled.path_of(upstream.root, "1.0").write_text(compiled.dumps(whole))
    one = ("explain", "--gpu", "T4", "--release", "1.0", "--dtype", "half")
    text = " ".join(run(*one).out.split())
    assert "overlay right, V0 XFormers" in text
    assert "besides: chunked prefill and prefix caching cannot run: kernel_unified" in text
    told = json.loads(run(*one, "--json").out)
    assert len(told["releases"]["1.0"]["besides"]) == 1
    text = run("explain", "--gpu", "A10", "--release", "1.0").out
    assert "besides" not in text


def test_what_was_looked_up_before_is_not_kept() -> None:
    """The matrix remembers its rows."""
    kept = made("1.0", "patched")
    cell = Settings().cell("8.6")
    assert explain.look_up(kept, cell).verdict == "right"
    laid = runnable.laid_over(kept, Kernels(binaries=code("9.0")))
    assert explain.look_up(laid, cell).verdict == "cannot-run"
    assert laid.llama4[cell].verdict == "cannot-run"
