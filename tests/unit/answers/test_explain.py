"""Explain: the answers of a made-up matrix, known by heart, and of every file of matrix/."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made_upstream import Ran, Upstream
from overlay.answers import evidence, explain, matrix
from overlay.answers.explain import (
    CHUNK,
    Settings,
    VariantAnswer,
    capability_of,
    changes,
    look_up,
    nearest,
    target,
)
from overlay.answers.gpus import GPUS
from overlay.answers.matrix import Cell, Matrix
from overlay.base.errors import OverlayError
from overlay.cli.main import main
from overlay.releases import versions

from ..made_gpu_run import gpu_case
from ..made_matrix import AXES, BACKENDS, keep, made

Run = Callable[..., Ran]

KEPT = sorted((Path(__file__).parents[3] / matrix.FOLDER).glob("*[dk].json"))  # patched, stock
MADE = {"stock": made("1.0", "stock"), "patched": made("1.0", "patched")}
#: What the matrix has no column for, and all that it has.
ODD = ("6.1", "7.2", "8.7", "10.3", "11.0", "12.1")


def applied(cell: Cell, told: tuple[str, ...], chunk: int = CHUNK) -> Cell:
    """What a user has who does what is told."""
    axes = {explain.BACKEND: "backend", explain.ENGINE: "v1"}
    new: dict[str, Any] = {}
    for one in told:
        if one.startswith("--"):
            flag, value = one[2:].split()
            if flag == "max-model-len":
                assert int(value) == chunk
                new["length"] = "at"
            else:
                new[flag.replace("-", "_")] = value
        elif one.startswith("unset "):
            new[axes[one.split()[1]]] = "unset"
        else:
            name, value = one.split("=")
            new[axes[name]] = value
    return replace(cell, **new)


def check(kept: Matrix, cell: Cell, chunk: int) -> None:
    """There is an answer, and what it suggests is really right."""
    assert explain.told(VariantAnswer(look_up(kept, cell), None), "T4")
    use = nearest(kept, cell, chunk)
    if use is None:
        # Not even what vLLM chooses by itself.
        unforced = replace(cell, backend="unset", v1="unset", length="at")
        assert look_up(kept, unforced).verdict != "right"
        return
    there = applied(cell, use.changes, chunk)
    assert look_up(kept, there).verdict == "right"
    assert look_up(kept, there) == use.outcome
    assert bool(use.changes) == (look_up(kept, cell).verdict != "right")


@pytest.mark.parametrize("kept", MADE.values(), ids=MADE)
def test_every_made_up_cell_is_answered(kept: Matrix) -> None:
    for cell in kept.llama4:
        check(kept, cell, 64)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_every_kept_cell_is_answered(path: Path) -> None:
    """Looked up all, and a sample of suggestions followed: each takes milliseconds."""
    kept = matrix.read(path)
    for cell, outcome in kept.llama4.items():
        assert look_up(kept, cell) is outcome
        assert explain.brief(outcome)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(list(kept.llama4)))
    def follow(cell: Cell) -> None:
        check(kept, cell, CHUNK)

    follow()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_every_gpu_has_a_column_or_a_reason(path: Path) -> None:
    columns = matrix.read(path).axes.capability
    for capability in {*ODD, *(gpu.capability for gpu in GPUS)}:
        found = target("", capability, columns)
        assert bool(found.note) == (capability not in columns)
        assert found.column is None or found.column in columns


def cell_of(capability: str = "8.6", **options: Any) -> Cell:
    return Settings(**options).cell(capability)


@pytest.mark.parametrize(
    ("variant", "cell", "told"),
    [
        # Right already.
        ("patched", cell_of(), ()),
        ("patched", cell_of(kv_cache_dtype="fp8_e5m2"), ()),
        ("stock", cell_of(kv_cache_dtype="fp8", max_model_len=CHUNK), ()),
        # One change; of several, the mildest.
        ("patched", cell_of("7.5"), ("--dtype float16",)),
        ("patched", cell_of(backend="FLASHINFER"), ("unset VLLM_ATTENTION_BACKEND",)),
        ("patched", cell_of(kv_cache_dtype="fp8"), ("--kv-cache-dtype fp8_e5m2",)),
        ("patched", cell_of(kv_cache_dtype="fp8_e4m3"), ("--kv-cache-dtype fp8_e5m2",)),
        ("patched", cell_of(kv_cache_dtype="fp8_e5m2", v1="1"), ("unset VLLM_USE_V1",)),
        ("stock", cell_of(v1="0"), ("unset VLLM_USE_V1",)),
        ("stock", cell_of(kv_cache_dtype="fp8"), ("--kv-cache-dtype auto",)),
        ("stock", cell_of(backend="XFORMERS"), ("unset VLLM_ATTENTION_BACKEND",)),
        # Two, in the order of backend, engine, KV cache, dtype.
        ("patched", cell_of("7.5", v1="1"), ("unset VLLM_USE_V1", "--dtype float16")),
        (
            "stock",
            cell_of(kv_cache_dtype="fp8", backend="XFORMERS"),
            ("unset VLLM_ATTENTION_BACKEND", "--kv-cache-dtype auto"),
        ),
        # Nothing but a shorter model.
        ("stock", cell_of("7.5", dtype="half"), ("--max-model-len 8192",)),
        ("stock", cell_of("7.5"), ("--dtype float16", "--max-model-len 8192")),
    ],
)
def test_nearest(variant: str, cell: Cell, told: tuple[str, ...]) -> None:
    use = nearest(MADE[variant], cell, CHUNK)
    assert use is not None
    assert use.changes == told


def test_nothing_is_right() -> None:
    assert nearest(MADE["patched"], cell_of("7.0"), CHUNK) is None


def test_names_of_other_platforms_are_not_suggested() -> None:
    """HPU_ATTN gets XFormers on V0: right, but no name to give to anyone."""
    kept = MADE["patched"]
    assert look_up(kept, cell_of(backend="HPU_ATTN")).verdict == "right"
    for cell in kept.llama4:
        use = nearest(kept, cell, 64)
        if cell.backend != "HPU_ATTN":
            assert use is None or use.cell.backend != "HPU_ATTN"


def test_flashinfer_is_neither_installed_nor_removed() -> None:
    """A backend that it is nothing to has one row, which speaks for both."""
    kept = MADE["patched"]
    for cell in kept.llama4:
        use = nearest(kept, cell, 64)
        if use and use.cell.flashinfer != cell.flashinfer:
            assert use.cell.backend not in ("unset", "FLASHINFER")
    assert look_up(kept, cell_of(backend="XFORMERS", flashinfer=True)).verdict == "right"


@given(st.sampled_from(list(MADE["stock"].llama4)), st.sampled_from(list(MADE["stock"].llama4)))
def test_changes_lead_there(old: Cell, new: Cell) -> None:
    new = replace(new, capability=old.capability, flashinfer=old.flashinfer)
    if old.length == "at":
        new = replace(new, length="at")
    if new.length == "past":
        old = replace(old, length="past")
    assert applied(old, changes(old, new, CHUNK)) == new


@pytest.mark.parametrize(
    ("text", "capability"),
    [("7.5", "7.5"), ("75", "7.5"), ("sm_75", "7.5"), ("SM90a", "9.0"), ("100", "10.0")],
)
def test_capabilities(text: str, capability: str) -> None:
    assert capability_of(text) == capability


@pytest.mark.parametrize("text", ["", "7", "T4", "7.5.1", "-7.5", "seven"])
def test_no_capabilities(text: str) -> None:
    with pytest.raises(OverlayError, match="--gpu T4"):
        capability_of(text)


@pytest.mark.parametrize(
    ("capability", "column", "said"),
    [
        ("8.6", "8.6", ""),
        ("8.7", "8.6", "the matrix has no capability 8.7; this is what it has for 8.6"),
        ("8.0", None, "no capability like 8.0"),
        ("6.1", None, "no kernels for capability 6.1: they start at 7.0"),
        ("11.0", None, "no capability like 11.0"),
    ],
)
def test_columns(capability: str, column: str | None, said: str) -> None:
    found = target("", capability, AXES["capability"])
    assert found.column == column
    assert said in found.note
    assert bool(found.note) == bool(said)
    assert found.is_too_old == (capability == "6.1")


@pytest.mark.parametrize(
    ("tokens", "chunk", "length"),
    [(None, 8192, "past"), (8192, 8192, "at"), (8193, 8192, "past"), (65, 64, "past")],
)
def test_lengths(tokens: int | None, chunk: int, length: str) -> None:
    assert Settings(max_model_len=tokens, chunk=chunk).length == length


@pytest.fixture
def kept_run(run: Run, upstream: Upstream) -> Run:
    keep(upstream.root, "1.0", "1.1")
    return run


def words(text: str) -> str:
    """Printed text, unwrapped."""
    return " ".join(text.split())


def test_command(kept_run: Run) -> None:
    ran = kept_run("explain", "--release", "1.0", "--gpu", "T4", "--dtype", "half")
    assert ran.status == 0, ran.err
    said = words(ran.out)
    assert "T4 (capability 7.5), KV cache auto, dtype half" in said
    assert "max_model_len past the chunk of 8192 (assumed), without FlashInfer" in said
    assert "stock wrong, V0 XFormers: wrong attention in chunked layers (measured" in said
    assert "to change: --max-model-len 8192; then it is right, V0 XFormers" in said
    assert "overlay right, V0 XFormers (measured" in said
    assert "no change needed" in said
    assert "vllm==1.0+llama4.1: vllm-overlay build 1.0" in said
    assert max(map(len, ran.out.splitlines())) <= 80


def test_known_from_a_gpu(kept_run: Run, upstream: Upstream) -> None:
    """Runs of the same engine, backend, dtypes and capability are named, and no others."""
    release = versions.load(upstream.root / "VERSIONS.toml").get("1.0")
    runs = evidence.runs_of([gpu_case()], "patched", release, date(2026, 11, 28))
    evidence.write(upstream.root, evidence.Evidence(release="1.0").merged(runs))
    said = words(kept_run("explain", "--release", "1.0", "--gpu", "T4", "--dtype", "half").out)
    assert "reference; whole engines on an NVIDIA Made-up, 2026-11-28: 1 of 1 right)" in said
    assert "reference; no GPU of this capability has run it)" in said  # stock
    for other in (("--gpu", "T4", "--kv-cache-dtype", "fp8_e5m2"), ("--gpu", "A10")):
        said = words(kept_run("explain", "--release", "1.0", *other).out)
        assert "Made-up" not in said
    old = [run.model_copy(update={"tree": "0" * 40, "outcome": "failed"}) for run in runs]
    evidence.write(upstream.root, evidence.Evidence(release="1.0").merged(old))
    said = words(kept_run("explain", "--release", "1.0", "--gpu", "T4", "--dtype", "half").out)
    assert "with earlier patches: 0 of 1 right, wrong in v0[xformers-graphs])" in said


def test_refusal_is_quoted_with_the_gpu(kept_run: Run) -> None:
    ran = kept_run("explain", "--release", "1.0", "--gpu", "Tesla T4", "--backend", "HPU_ATTN")
    assert "refused: Your T4 GPU has compute capability 7.5." in words(ran.out)
    ran = kept_run("explain", "--release", "1.0", "--capability", "7.5", "--max-model-len", "9000")
    assert "refused: Your GPU has compute capability 7.5." in words(ran.out)
    assert "max_model_len 9000, past the chunk of 8192" in words(ran.out)


def test_table(kept_run: Run) -> None:
    ran = kept_run("explain", "--capability", "8.7", "--kv-cache-dtype", "fp8")
    assert ran.status == 0, ran.err
    assert "this is what it has for 8.6" in words(ran.out)
    rows = [line.split("  ") for line in ran.out.splitlines() if line.startswith("1.")]
    assert [row[0] for row in rows] == ["1.0", "1.1"]
    for row in rows:
        cells = [cell.strip() for cell in row if cell.strip()]
        assert cells[1:3] == ["wrong, V0 XFormers", "refused"]
    assert "--kv-cache-dtype fp8_e5m2" in words(ran.out)
    assert max(map(len, ran.out.splitlines())) <= 80


def test_table_without_some(run: Run, upstream: Upstream) -> None:
    """Releases that the matrix has not, or that have no such backend, are left out."""
    keep(upstream.root, "1.0")
    assert set(told(run("explain", "--gpu", "A10", "--json"))["releases"]) == {"1.0"}
    keep(upstream.root, "1.1", backends=BACKENDS[:1])
    arguments = ("explain", "--gpu", "A10", "--backend", "XFORMERS")
    assert set(told(run(*arguments, "--json"))["releases"]) == {"1.0"}
    ran = run(*arguments, "--release", "1.1")
    assert ran.status == 2
    assert "1.1 has no backend 'XFORMERS'" in ran.err


def told(ran: Ran) -> Any:
    assert ran.status == 0, ran.err
    return json.loads(ran.out)


def test_json(kept_run: Run) -> None:
    arguments = ("explain", "--release", "v1.0", "--gpu", "RTX A6000", "--v1", "1", "--json")
    found = told(kept_run(*arguments, "--kv-cache-dtype", "fp8_e5m2", "--flashinfer"))
    assert (found["gpu"], found["capability"], found["answered_as"]) == ("RTX A6000", "8.6", "8.6")
    assert found["settings"] == {
        "kv_cache_dtype": "fp8_e5m2", "dtype": "auto", "backend": "unset", "v1": "1",
        "flashinfer": True, "max_model_len": None, "chunk": 8192, "length": "past",
        "weights": None, "flags": [],
    }  # fmt: skip
    (one,) = found["releases"].values()
    assert one["version"] == "1.0+llama4.1"
    assert one["patched"]["verdict"] == "explained"
    assert one["patched"]["use"] == {
        "changes": ["unset VLLM_USE_V1"], "environment": {}, "kv_cache_dtype": "fp8_e5m2",
        "dtype": "auto", "length": "past", "engine": "v0", "backend": "xformers.XFormersImpl",
        "basis": "measured",
    }  # fmt: skip
    assert one["stock"]["use"]["changes"] == ["--kv-cache-dtype auto"]
    assert one["stock"]["use"]["environment"] == {"VLLM_USE_V1": "1"}
    one = told(kept_run("explain", "--gpu", "T4", "--json"))["releases"]["1.0"]
    assert one["stock"]["message"].startswith("Your T4 GPU has")
    nothing = told(kept_run("explain", "--capability", "7.0", "--release", "1.0", "--json"))
    assert nothing["releases"]["1.0"]["patched"]["use"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--release", "0.9", "--gpu", "T4"), "0.9 has no Llama 4: the model came with 1.0"),
        (("--release", "1.0", "--gpu", "P40"), "no kernels for capability 6.1"),
        (("--gpu", "B300"), "the matrix has no capability like 10.3"),
        (("--gpu", "GB200"), "no capability like 10.0; its processor is 64-bit Arm"),
        (("--release", "1.0", "--capability", "7.0"), "no settings are right on this GPU"),
    ],
)
def test_answers_without_cells(kept_run: Run, arguments: tuple[str, ...], said: str) -> None:
    ran = kept_run("explain", *arguments)
    assert ran.status == 0, ran.err
    assert said in words(ran.out)
    found = told(kept_run("explain", *arguments, "--json"))
    assert {"gpu", "capability", "answered_as", "note", "settings", "releases"} == set(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--release", "1.0"), "name the GPU: --gpu T4, or --capability 7.5"),
        (("--gpu", "T4", "--capability", "7.5"), "not both"),
        (("--gpu", "RTX 6000"), "near it are Quadro RTX 6000 (7.5)"),
        (("--capability", "T4"), "no compute capability 'T4'"),
        (("--gpu", "T4", "--release", "1.2"), "Did you mean 1.0 or 1.1"),
        (("--gpu", "T4", "--kv-cache-dtype", "int8"), "'int8' is not one of"),
        (("--gpu", "T4", "--dtype", "fp16"), "'fp16' is not one of"),
        (("--gpu", "T4", "--max-model-len", "0"), "is no number of tokens"),
        (("--gpu", "T4", "--v1", "true"), "'true' is not one of"),
        (
            ("--gpu", "T4", "--backend", "xformers"),
            "1.1 has no backend 'xformers': its backends are",
        ),
    ],
)
def test_wrong_usage(kept_run: Run, arguments: tuple[str, ...], said: str) -> None:
    ran = kept_run("explain", *arguments)
    assert ran.status == 2
    assert said in words(ran.err)
    assert not ran.out


def test_no_matrix(run: Run) -> None:
    ran = run("explain", "--gpu", "T4")
    assert ran.status == 2
    assert "vllm-overlay matrix RELEASE --stock" in ran.err


def test_an_axis_that_lacks_a_value(kept_run: Run) -> None:
    ran = kept_run("explain", "--gpu", "T4", "--release", "1.0", "--dtype", "bfloat16")
    assert ran.status == 2
    assert "matrix/ does not have this configuration of 1.0" in ran.err


def test_other_faults_of_stock_are_told(upstream: Upstream, run: Run) -> None:
    keep(upstream.root, "1.0")
    folder = upstream.patches / "llama4-sampler"
    folder.mkdir()
    (folder / "1.0.patch").write_text("")
    with (upstream.patches / "series/1.0").open("a") as listing:
        listing.write("llama4-sampler/1.0.patch\n")
    ran = run("explain", "--gpu", "A10", "--release", "1.0")
    assert "other fault: a request for prompt_logprobs stops the V1 engine" in words(ran.out)
    assert "Stock 1.0: a request for prompt_logprobs" in words(run("explain", "--gpu", "A10").out)


def test_topics_of_other_faults_exist() -> None:
    patches = Path(__file__).parents[3] / "patches"
    assert {path.name for path in patches.iterdir()} >= set(explain.OTHER_FAULTS)


def test_readme_shows_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[3]
    if not KEPT:
        pytest.skip("matrix/ has nothing yet")
    text = (root / "README.md").read_text("utf-8")
    command, _, shown = text.split("<!-- explain -->\n```\n$ ")[1].partition("\n")
    name, *arguments = command.split()
    monkeypatch.setattr("sys.argv", [name, "--root", str(root), *arguments])
    with pytest.raises(SystemExit):
        main()
    printed = "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
    assert printed == shown.split("```")[0]


def test_readme_names_the_releases_that_run_on_each_gpu() -> None:
    root = Path(__file__).parents[3]
    rows = (root / "README.md").read_text("utf-8").split("<!-- gpus -->\n")[1].split("\n\n")[0]
    told = dict(row.strip("| ").split(" | ")[1:] for row in rows.splitlines()[2:])
    patched = versions.load(root / "VERSIONS.toml").patched
    order = [release.name for release in patched]
    found: dict[str, list[str]] = {}
    for release in patched:
        for capability in explain.capabilities(root, release):
            found.setdefault(capability, []).append(release.name)
    assert told == {name: versions.ranges(names, order) for name, names in found.items()}
