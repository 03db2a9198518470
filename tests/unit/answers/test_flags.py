"""What settings beside the matrix' change: made-up results, and what is kept of real releases."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from made_upstream import Ran, Upstream
from overlay.answers import explain, flags, matrix, matrix_run, runnable
from overlay.answers.compiled import Row
from overlay.answers.explain import OTHER_FAULTS, Settings
from overlay.answers.flags import Flags, Kept, Set
from overlay.answers.matrix import Outcome, Variant
from overlay.answers.runnable import Kernels, Place
from overlay.base.errors import OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases import versions

from ..made_matrix import AXES, FLASH, XFORMERS, keep, made, refused
from .test_runnable import triton

Run = Callable[..., Ran]

ROOT = Path(__file__).parents[3]
VERSIONS = versions.load(ROOT / "VERSIONS.toml")
RELEASES = [release.name for release in VERSIONS.patched]

ON_V0 = {"verdict": "right", **XFORMERS, "basis": "measured"}
WRONG = {
    "verdict": "wrong", **FLASH, "message": "wrong attention in chunked layers",
    "basis": "measured",
}  # fmt: skip
NO_LORA = {
    "verdict": "worker-refused",
    **FLASH,
    "stage": "load",
    "message": "It does not support LoRA.",
}
ROWS = (("unset", "unset", "past", False), ("unset", "0", "past", False))


def run_of(variant: Variant, release: str = "1.0") -> dict[str, Any]:
    """On 8.6 and 8.9 with a plain cache: a KV connector is wrong on stock, n-grams go to V0, and
    LoRA is refused. Prefix caching changes nothing, nor does anything with VLLM_USE_V1=0."""
    changed = {
        "kv-connector": WRONG if variant == "stock" else None,
        "speculative-ngram": WRONG if variant == "stock" else ON_V0,
        "lora": NO_LORA,
        "prefix-caching-off": None,
        "chunked-prefill-on": ON_V0,
        "block-size-64": refused("Use blocks of 16."),
        "cuda-graphs": None,
    }
    outcomes = [one for one in changed.values() if one]
    rows = []
    for (setting, outcome), row in product(changed.items(), ROWS):
        backend, v1, length, flashinfer = row
        results = [
            outcomes.index(outcome)
            if outcome and v1 == "unset" and kv_cache_dtype == "auto" and capability >= "8"
            else None
            for _, kv_cache_dtype, capability in product(*AXES.values())
        ]
        name = {"backend": backend, "v1": v1, "length": length, "flashinfer": flashinfer}
        rows.append({"setting": setting, **name, "results": results})
    return {"release": release, "axes": AXES, "outcomes": outcomes, "rows": rows}


def kept_of(release: str = "1.0") -> Kept:
    return flags.from_runs({variant: run_of(variant, release) for variant in flags.VARIANTS})


def answered(*names: str, variant: Variant = "patched", **settings: Any) -> Outcome:
    held = Set(Flags(names), kept_of())
    column = settings.pop("column", "8.6")
    laid = held.laid_over(made("1.0", variant), [column])
    return explain.look_up(laid, Settings(**settings).cell(column))


def test_a_setting_changes_the_cells_that_it_was_asked_in() -> None:
    assert answered("kv-connector", variant="stock").verdict == "wrong"
    assert answered("kv-connector").verdict == "right"
    assert answered("speculative-ngram").engine == "v0"
    assert answered("lora").message == "It does not support LoRA."
    assert answered("lora", v1="0").verdict == "right"
    assert answered("lora", column="7.5").verdict == "explained"


def test_other_columns_stay_as_they_are() -> None:
    laid = Set(Flags(("lora",)), kept_of()).laid_over(made("1.0", "patched"), ["8.6"])
    assert explain.look_up(laid, Settings().cell("8.9")).verdict == "right"


@pytest.mark.parametrize(
    "settings",
    [{"backend": "XFORMERS"}, {"max_model_len": 100}, {"v1": "1"}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_nothing_is_said_of_other_cells(settings: dict[str, Any]) -> None:
    cell = Settings(**settings).cell("8.6")
    with pytest.raises(LookupError):
        flags.from_runs({v: _without_auto(run_of(v)) for v in flags.VARIANTS}).change(
            "lora", "stock", cell
        )


def _without_auto(raw: dict[str, Any]) -> dict[str, Any]:
    """The run, without the dtype that stands for bfloat16."""
    axes = {**AXES, "dtype": AXES["dtype"][1:]}
    size = len(AXES["kv_cache_dtype"]) * len(AXES["capability"])
    rows = [{**row, "results": row["results"][size:]} for row in raw["rows"]]
    return {**raw, "axes": axes, "rows": rows}


def test_bfloat16_is_what_auto_comes_to() -> None:
    """Where the GPU has it."""
    cell = Settings(dtype="bfloat16").cell("8.6")
    found = kept_of().change("lora", "stock", cell)
    assert found is not None
    assert found.verdict == "worker-refused"
    with pytest.raises(LookupError):
        kept_of().change("lora", "stock", Settings(dtype="bfloat16").cell("7.5"))


def test_what_was_not_asked_is_unknown() -> None:
    assert answered("lora", backend="XFORMERS").verdict == "unasked"
    assert answered("lora", max_model_len=100).verdict == "unasked"
    outcome = Outcome.model_validate(ON_V0)
    held = Set(Flags(("lora",)), None).over("stock", Settings().cell("8.6"), outcome)
    assert (held.verdict, held.message) == (
        "unasked", "no setting was asked of this release: --enable-lora"
    )  # fmt: skip


def test_a_release_may_not_have_a_setting() -> None:
    found = answered("no-hybrid-kv-cache-manager")
    assert (found.verdict, found.message) == (
        "explained", "1.0 has no --disable-hybrid-kv-cache-manager; leave it out"
    )  # fmt: skip


def test_of_several_the_worst_counts() -> None:
    assert answered("speculative-ngram", "lora").verdict == "worker-refused"
    assert answered("lora", "kv-connector", variant="stock").verdict == "wrong"
    assert answered("prefix-caching-off", "speculative-ngram").engine == "v0"
    assert answered("eager", "block-size-16").engine == "v1"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ()),
        ({"pipeline_parallel_size": 4, "tensor_parallel_size": 1}, ("pipeline-parallel",)),
        ({"speculative": "eagle", "enable_lora": True}, ("lora", "speculative-eagle")),
        ({"enable_chunked_prefill": False}, ("chunked-prefill-off",)),
        ({"enable_prefix_caching": True}, ("prefix-caching-on",)),
        ({"block_size": "64"}, ("block-size-64",)),
        ({"enforce_eager": True, "kv_connector": True}, ("kv-connector", "eager")),
    ],
)  # fmt: skip
def test_options(options: dict[str, Any], names: tuple[str, ...]) -> None:
    assert flags.asked(**options).names == names
    assert set(names) <= flags.WRITTEN.keys()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"release": 1}, "release"),
        ({"asked": []}, "rows that were not asked"),
        ({"settings": ["lora"]}, "rows that were not asked"),
        ({"outcomes": []}, "an outcome that is not there"),
        ({"axes": {**AXES, "dtype": ["auto"]}}, "36 cells, not 12"),
    ],
)
def test_damaged(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    (tmp_path / "matrix").mkdir()
    path = flags.path_of(tmp_path, "1.0")
    path.write_text(flags.dumps(kept_of()), "utf-8")
    whole = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**whole, **change}), "utf-8")
    with pytest.raises(OverlayError, match=why) as raised:
        flags.read(tmp_path, "1.0")
    assert "--settings" in str(raised.value)


def test_the_same_cells_twice(tmp_path: Path) -> None:
    (tmp_path / "matrix").mkdir()
    path = flags.path_of(tmp_path, "1.0")
    whole = json.loads(flags.dumps(kept_of()))
    path.write_text(json.dumps({**whole, "rows": 2 * whole["rows"]}), "utf-8")
    with pytest.raises(OverlayError, match="two rows are of the same cells"):
        flags.read(tmp_path, "1.0")


def test_what_is_worse_than_stock_is_a_problem() -> None:
    plain = {variant: made("1.0", variant) for variant in flags.VARIANTS}
    assert flags.compare(kept_of(), plain) == ()
    runs = {variant: run_of(variant) for variant in flags.VARIANTS}
    worse = copy.deepcopy(runs)
    worse["patched"]["outcomes"][worse["patched"]["outcomes"].index(ON_V0)] = WRONG
    (found, *_) = flags.compare(flags.from_runs(worse), plain)
    assert found.startswith("1.0: with --speculative-config of n-grams, wrong on stock, wrong here")


@pytest.fixture
def upstream_settings(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """A project with a matrix and settings of 1.0 and 1.1; the program is stood in for."""
    keep(upstream.root, "1.0", "1.1")
    for release in ("1.0", "1.1"):
        flags.settle(upstream.root, kept_of(release), check=False)

    def run_settings(workspace: Workspace, release: Any, folder: Path, jobs: int) -> Kept:
        return kept_of(release.name)

    monkeypatch.setattr(matrix_run, "run_settings", run_settings)
    return upstream


def test_command(run: Run, upstream_settings: Upstream) -> None:
    ran = run("matrix", "1.0", "--settings", "--check", "--json")
    assert ran.status == 0, ran.err
    counted = json.loads(ran.out)["cells"]["1.0 settings"]
    assert (counted["kv-connector"], counted["lora"], counted["prefix-caching-off"]) == (6, 12, 0)
    path = flags.path_of(upstream_settings.root, "1.0")
    path.write_text(path.read_text("utf-8").replace("does not", "never does"), "utf-8")
    ran = run("matrix", "1.0", "--settings", "--check")
    assert ran.status == 1
    assert "1.0.settings.json is not what a run gives" in ran.err
    ran = run("matrix", "1.0", "--settings")
    assert ran.status == 0, ran.err
    assert "1.0 settings: changed of 144 cells each: 6 kv-connector" in " ".join(ran.out.split())
    assert "never does" not in path.read_text("utf-8")


@pytest.mark.parametrize("option", ["--compare", "--stock", "--triton", "--weights"])
def test_command_does_one_thing(run: Run, upstream_settings: Upstream, option: str) -> None:
    assert run("matrix", "1.0", "--settings", option).status == 2


def said_by(ran: Ran) -> str:
    assert ran.status == 0, ran.err
    return " ".join(ran.out.split())


ASKED = ("explain", "--release", "1.0", "--gpu", "RTX A6000")


def test_explain_answers_with_the_setting(run: Run, upstream_settings: Upstream) -> None:
    said = said_by(run(*ASKED, "--kv-connector"))
    assert "without FlashInfer, --kv-transfer-config" in said
    assert "stock wrong, V1 FlashAttention: wrong attention in chunked layers" in said
    assert "to change: VLLM_USE_V1=0" not in said
    assert "overlay right, V1 FlashAttention" in said
    assert "do not change this" not in said
    assert "To launch" not in said


def test_explain_says_which_do_not_matter(run: Run, upstream_settings: Upstream) -> None:
    said = said_by(run(*ASKED, "--no-enable-prefix-caching", "--block-size", "16"))
    assert "flags --no-enable-prefix-caching, --block-size 16 do not change this" in said
    assert "each was asked alone" in said
    said = said_by(run(*ASKED, "--enforce-eager", "--kv-connector"))
    assert "flags --enforce-eager does not change this each was asked alone" in said
    assert said.count("flags") == 1


def test_what_cannot_be_is_left_out(run: Run, upstream_settings: Upstream) -> None:
    said = said_by(run(*ASKED, "--enable-lora"))
    assert "overlay refused by a worker, V1 FlashAttention: It does not support LoRA." in said
    # V0 is not changed, and right on the overlay; on stock it is wrong.
    assert "to change: VLLM_USE_V1=0; then it is right, V0 XFormers" in said
    assert "to change: unset --enable-lora; then it is right, V1 FlashAttention" in said


def test_explain_of_all_releases(run: Run, upstream_settings: Upstream) -> None:
    said = said_by(run("explain", "--gpu", "RTX A6000", "--enable-lora", "--enforce-eager"))
    assert "Patched and right here: 1.0 – 1.1 with VLLM_USE_V1=0." in said
    assert "1.0 – 1.1: --enforce-eager does not change this." in said


def test_explain_json(run: Run, upstream_settings: Upstream) -> None:
    ran = run(*ASKED, "--enable-lora", "--kv-connector", "--json")
    told = json.loads(ran.out)
    assert told["settings"]["flags"] == ["lora", "kv-connector"]
    found = told["releases"]["1.0"]
    assert found["of_flags"] == ["each was asked alone, and this is the worst answer of them"]
    assert found["stock"]["verdict"] == "wrong"
    assert "launch" not in found


def test_what_was_not_asked_demands_nothing(run: Run, upstream_settings: Upstream) -> None:
    said = said_by(run(*ASKED, "--enable-lora", "--backend", "XFORMERS"))
    assert "overlay not known: --enable-lora was not asked with" in said
    assert "what to change is not known" in said


def test_what_is_not_known_is_said(run: Run, upstream_settings: Upstream, tmp_path: Path) -> None:
    text_only = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    (tmp_path / "config.json").write_text(json.dumps(text_only), "utf-8")
    said = said_by(run(*ASKED, "--kv-connector", "--checkpoint", str(tmp_path / "config.json")))
    assert "whether --kv-transfer-config does the same to a text-only checkpoint" in said
    triton = Outcome(verdict="right", engine="v1", backend="v1.triton_attn.TritonAttentionImpl")
    assert flags.unknown(Flags(("block-size-64",)), triton, is_text_only=False) == (
        "whether Triton's kernels fit this GPU with --block-size 64",
    )
    assert flags.unknown(Flags(("block-size-16",)), triton, is_text_only=False) == ()


def test_prompts_in_parts_are_tritons() -> None:
    """`--enable-chunked-prefill` has V0 XFormers take a kernel that Triton has to compile."""
    found = triton()
    prefix = Row(use="v0-prefix", kind="auto", dtype="float16", results="2 2*0")
    experts = Row(use="fused_moe", kind="unquantised", dtype="float16", results="3*0")
    plain = Kernels(compiled=found.model_copy(update={"rows": (experts, prefix)}))
    in_parts = replace(plain, flags=Flags(("chunked-prefill-on",)))
    outcome = Outcome.model_validate(ON_V0)
    on_v1 = outcome.model_copy(update=FLASH)
    for capability, verdict in (("7.5", "cannot-run"), ("8.6", "right")):
        place = Place("float16", "auto", capability)
        assert in_parts.over(outcome, place).verdict == verdict
        assert plain.over(outcome, place) == outcome
        assert in_parts.over(on_v1, place) == on_v1


# The real releases.


@pytest.mark.parametrize("release", RELEASES)
def test_kept_is_of_the_matrix(release: str) -> None:
    """The same GPUs, and rows that it has."""
    found = flags.read(ROOT, release)
    whole = matrix.read(matrix.path_of(ROOT, release, "patched"))
    assert found.axes.capability == whole.axes.capability
    assert set(found.axes.dtype) <= set(whole.axes.dtype)
    assert set(found.axes.kv_cache_dtype) <= set(whole.axes.kv_cache_dtype)
    assert set(found.asked) <= {row.name for row in whole.rows}
    assert set(found.settings) <= flags.WRITTEN.keys()
    assert flags.path_of(ROOT, release).stat().st_size < 60_000


@pytest.mark.parametrize("release", RELEASES)
def test_eager_is_as_with_graphs(release: str) -> None:
    """The matrix is eager, and what is said of it is said of CUDA graphs too."""
    found = flags.read(ROOT, release)
    assert "cuda-graphs" in found.settings
    assert "cuda-graphs" not in {row.setting for row in found.rows}


@pytest.mark.parametrize("release", RELEASES)
def test_no_cell_is_worse_than_on_stock(release: str) -> None:
    assert runnable.judge_flags(ROOT, flags.read(ROOT, release)) == ()


@pytest.mark.parametrize("name", ["kv-connector", "no-hybrid-kv-cache-manager"])
def test_one_group_is_wrong_on_stock_alone(name: str) -> None:
    """In 0.10.0, whose model runner forgets then which layers are chunked."""
    found, cell = flags.read(ROOT, "0.10.0"), Settings().cell("9.0")
    stock = found.change(name, "stock", cell)
    assert stock is not None
    assert (stock.verdict, stock.engine, stock.basis) == ("wrong", "v1", "measured")
    assert found.change(name, "patched", cell) is None


def test_faults_are_told_of_unless_the_answer_shows_them() -> None:
    assert {*flags.OF_GRAPHS, *flags.SHOWN_BY} <= OTHER_FAULTS.keys()
    assert Flags().concerns("v1-hybrid-off-local")
    assert Flags(("lora",)).concerns("v1-hybrid-off-local")
    assert not Flags(("kv-connector",)).concerns("v1-hybrid-off-local")
    assert not Flags(("eager",)).concerns("v1-full-graph-local")
