"""Releases after those of VERSIONS.toml: the files of matrix/, and answers from made-up ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from packaging.version import Version

from made_upstream import Ran, Upstream
from overlay.answers import later, report
from overlay.answers.explain import Settings
from overlay.answers.later import BACKENDS, CAPABILITIES, KV_CACHE_DTYPES, Known, Later
from overlay.base.errors import OverlayError
from overlay.releases import versions

from ..made_matrix import keep
from .test_doctor import A10, Machine, machine

Run = Callable[..., Ran]

__all__ = ["machine"]

ROOT = Path(__file__).parents[3]
VERSIONS = versions.load(ROOT / "VERSIONS.toml")
H100, T4, V100, B200 = ("H100", "9.0"), ("T4", "7.5"), ("V100", "7.0"), ("B200", "10.0")

FACTS = """
read = 2030-01-02
releases = ["0.9", "2.0", "2.1"]
[[right]]
what = "chunks are kept"
sources = ["2.0 chunks.py:1"]
[[fact]]
name = "dies"
releases = "<2.1"
capabilities = ["8.6"]
kv_cache_dtypes = ["fp8_e5m2"]
backends = ["TRITON_ATTN"]
happens = "dies"
what = "it asserts"
use = ["--kv-cache-dtype fp8"]
sources = ["2.0 attention.py:7", "2.0 triton.py:8"]
[[fact]]
name = "window"
releases = ">=2.0"
backends = ["FLASHINFER"]
setting = "--block-size above 64"
past_chunk = true
happens = "silently wrong"
what = "it reads another window"
use = ["BACKEND=FLASH_ATTN", "--block-size 64"]
sources = ["2.0 chunks.py:9"]
[[fact]]
name = "engine"
releases = ">=2.0"
setting = "VLLM_USE_V1"
happens = "ignored"
what = "nothing reads it"
sources = ["2.0 envs.py:1"]
"""


def selections(**changes: str) -> dict[str, Any]:
    cells: dict[str, dict[str, str]] = {
        "auto": {"default": "FLASH_ATTN"},
        "fp8": {"default": "FLASHINFER", "FLASH_ATTN": "no 8 bits"},
        "fp8_e5m2": {"default": "TRITON_ATTN", "FLASH_ATTN": "no 8 bits", **changes},
    }
    selected = dict.fromkeys(CAPABILITIES, cells)
    return {"executed": "2030-01-03", "groups": [{"releases": ["2.0"], "selected": selected}]}


@pytest.fixture
def made(upstream: Upstream) -> Known:
    keep(upstream.root, "1.0", "1.1")
    (upstream.root / "matrix" / later.FACTS).write_text(FACTS)
    (upstream.root / "matrix" / later.SELECTED).write_text(json.dumps(selections()))
    return known_of(upstream)


def known_of(upstream: Upstream) -> Known:
    found = later.load(upstream.root, upstream.workspace().versions)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def real() -> Known:
    found = later.load(ROOT, VERSIONS)
    assert found is not None
    return found


def ask(known: Known, release: str, gpu: tuple[str, str], **settings: Any) -> Later:
    return later.ask(known, release, gpu, Settings(**settings))


def words(text: str) -> str:
    return " ".join(text.split())


# The files of matrix/


def test_releases_are_in_order_and_newer_than_the_patched(real: Known) -> None:
    order = [Version(name) for name in real.facts.releases]
    assert order == sorted(set(order))
    newest = max(release.version for release in VERSIONS.releases.values())
    assert all(Version(name) > newest for name in real.releases)
    assert real.newest == real.releases[-1]


def test_selection_was_executed_for_known_releases_once(real: Known) -> None:
    executed = [name for group in real.selections.groups for name in group.releases]
    assert len(executed) == len(set(executed))
    assert set(executed) <= set(real.facts.releases)
    assert real.newest in executed


def test_facts_have_one_name_each_and_say_where_they_stand(real: Known) -> None:
    names = [fact.name for fact in real.facts.fact]
    assert len(names) == len(set(names))
    place = re.compile(
        r"(\d+\.\d+\.\d+ \S+\.py(:\d+)?|\d+\.\d+\.\d+ docker/Dockerfile:\d+)( \(.+\))?"
        r"|https://github\.com/vllm-project/vllm/(issues|pull)/\d+"
        r"|cubins of .+|this overlay's matrix/\S+"
    )
    facts, right = real.facts.fact, real.facts.right
    sources = [one for fact in facts for one in fact.sources]
    sources += [one for told in right for one in told.sources]
    assert [one for one in sources if not place.fullmatch(one)] == []


def test_every_fact_can_be_met(real: Known) -> None:
    """No condition is one that selection never leads to."""
    gpus = [("", capability) for capability in CAPABILITIES]
    found = set()
    for release in real.releases:
        for gpu in gpus:
            for kv_cache_dtype in KV_CACHE_DTYPES:
                one = ask(real, release, gpu, kv_cache_dtype=kv_cache_dtype, v1="0")
                found |= {fact.name for fact in one.met} | {fact.name for _, fact in one.others}
        named = ask(real, release, H100, backend="FLASHINFER", kv_cache_dtype="fp8")
        found |= {fact.name for fact in named.met}
    assert found == {fact.name for fact in real.facts.fact}


@pytest.mark.parametrize(
    ("release", "gpu", "kv_cache_dtype", "verdict", "way"),
    [
        ("0.21.0", H100, "fp8_e5m2", "dies", "--kv-cache-dtype fp8"),
        ("0.22.0", H100, "fp8_e5m2", "not known", ""),
        ("0.33.0", H100, "fp8", "nothing known against it", ""),
        ("0.33.0", B200, "fp8_e5m2", "dies", "--kv-cache-dtype fp8"),
        ("0.19.1", V100, "fp8", "dies", "--kv-cache-dtype auto"),
        ("0.19.1", V100, "auto", "not known", ""),
        ("0.20.0", V100, "auto", "cannot run", "0.10.2 or 0.11.0, patched"),
        ("0.23.0", T4, "fp8", "not known", ""),
        ("0.24.0", T4, "fp8", "refused", "--kv-cache-dtype auto"),
    ],
)
def test_what_was_found(
    real: Known, release: str, gpu: tuple[str, str], kv_cache_dtype: str, verdict: str, way: str
) -> None:
    one = ask(real, release, gpu, kv_cache_dtype=kv_cache_dtype)
    assert one.verdict == verdict
    assert " ".join(fact.way(release) for fact in one.faults) == way


def test_the_fault_of_the_kernels_blocks_ends_with_0_17(real: Known) -> None:
    names = [
        release
        for release in real.releases
        if "kernel-blocks" in {fact.name for _, fact in ask(real, release, B200).others}
    ]
    assert (names[0], names[-1]) == (real.releases[0], "0.17.1")
    within = ask(real, "0.16.0", B200, max_model_len=8192)
    assert "kernel-blocks" not in {fact.name for _, fact in within.others}


def test_backends_are_named_as_the_release_has_it(real: Known) -> None:
    old, new = (
        ask(real, release, ("A100", "8.0"), backend="TRITON_ATTN_VLLM_V1", kv_cache_dtype="fp8")
        for release in ("0.12.0", "0.13.0")
    )
    assert "use VLLM_ATTENTION_BACKEND=FLASHINFER or" in later.changes(old)[0]
    assert "use --attention-backend FLASHINFER or" in later.changes(new)[0]


def test_a_variable_that_is_not_read_names_no_backend(real: Known) -> None:
    settings = Settings(backend="TRITON_ATTN", kv_cache_dtype="fp8")
    old, new = (
        later.ask(real, release, ("A100", "8.0"), settings, by_variable=True)
        for release in ("0.14.1", "0.15.0")
    )
    assert (old.verdict, old.backend) == ("dies", "TRITON_ATTN")
    assert (new.verdict, new.backend) == ("nothing known against it", "FLASHINFER")
    assert "backend-variable" in {fact.name for fact in new.met}


def test_a_refused_backend_is_told_with_selections_own_reason(real: Known) -> None:
    one = ask(real, "0.33.0", H100, backend="FLEX_ATTENTION", kv_cache_dtype="fp8")
    assert (one.verdict, one.backend) == ("refused", "")
    assert "kv_cache_dtype not supported" in one.refusal
    assert later.changes(one)


def test_gpus_that_no_column_answers_for(real: Known) -> None:
    assert ask(real, "0.12.0", ("P100", "6.0")).verdict == "cannot run"
    odd = ask(real, "0.12.0", ("Jetson Thor", "11.0"))
    assert odd.verdict == "not known"
    assert later.lines(odd)
    assert "8.6" in ask(real, "0.12.0", ("", "8.7")).unknown[0]


# Made-up ones


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"<2.1"', '"<0.5"', "has none of the releases"),
        ('use = ["--kv-cache-dtype fp8"]', "", "nothing is said to use instead"),
        ('happens = "dies"', 'happens = "sulks"', "happens"),
        ('capabilities = ["8.6"]', 'capabilities = ["8.5"]', "capabilities"),
        ('sources = ["2.0 envs.py:1"]', "sources = []", "sources"),
        ("read = 2030-01-02", "read = soon", "later.toml"),
    ],
)
def test_a_damaged_file_of_facts(
    made: Known, upstream: Upstream, old: str, new: str, said: str
) -> None:
    assert made.releases == ("2.0", "2.1")
    text = FACTS.replace(old, new, 1)
    assert text != FACTS
    (upstream.root / "matrix" / later.FACTS).write_text(text)
    with pytest.raises(OverlayError) as caught:
        known_of(upstream)
    assert said in f"{caught.value.what}: {caught.value.why}"


def test_a_selection_of_an_unknown_backend(made: Known, upstream: Upstream) -> None:
    path = upstream.root / "matrix" / later.SELECTED
    path.write_text(json.dumps(selections(default="XFORMERS")))
    with pytest.raises(OverlayError, match=r"later\.json is damaged"):
        known_of(upstream)
    assert made.selections.by_release["2.0"]


def test_nothing_is_known_without_the_files(upstream: Upstream, run: Run) -> None:
    assert later.load(upstream.root, upstream.workspace().versions) is None
    assert run("explain", "--release", "2.0", "--gpu", "T4").status == 2


@pytest.mark.usefixtures("made")
def test_explain_of_one(run: Run) -> None:
    arguments = (
        "explain",
        "--release",
        "2.0",
        "--capability",
        "8.6",
        "--kv-cache-dtype",
        "fp8_e5m2",
    )
    ran = run(*arguments)
    assert ran.status == 0, ran.err
    said = words(ran.out)
    assert "2.0 not patched by this overlay; upstream's own attention keeps to the chunks" in said
    assert "dies; selects TRITON_ATTN (selection executed on a faked GPU, 2030-01-03" in said
    assert "it asserts; use --kv-cache-dtype fp8 (read in 2.0 attention.py:7 and 1 more)" in said
    assert "with FLASHINFER and --block-size above 64, silently wrong: it reads" in said
    found = json.loads(run(*arguments, "--json").out)
    assert (found["patched"], found["verdict"], found["backend"]) == (False, "dies", "TRITON_ATTN")
    assert found["met"][0]["sources"] == ["2.0 attention.py:7", "2.0 triton.py:8"]
    assert found["otherwise"][0]["use"] == "--attention-backend FLASH_ATTN or --block-size 64"


@pytest.mark.usefixtures("made")
def test_explain_of_one_whose_selection_was_not_executed(run: Run) -> None:
    said = words(run("explain", "--release", "v2.1", "--gpu", "A10", "--v1", "0").out)
    assert "not known; which backend it selects is not known (read in upstream's sources" in said
    assert "ignored: nothing reads it" in said
    assert "this release's selection was not executed" in said


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("2.2",), "nothing is known of 2.2: beside the releases of VERSIONS.toml, 2.0 to 2.1"),
        (("1.5",), "1.5"),
        (("2.0", "--backend", "XFORMERS"), "no backend 'XFORMERS'"),
    ],
)
def test_explain_of_what_is_not_known(run: Run, arguments: tuple[str, ...], said: str) -> None:
    ran = run("explain", "--gpu", "A10", "--release", *arguments)
    assert ran.status == 2
    assert said in words(ran.err)


@pytest.mark.usefixtures("made")
def test_explain_of_all_adds_a_sentence(run: Run) -> None:
    said = words(run("explain", "--capability", "8.6", "--kv-cache-dtype", "fp8_e5m2").out)
    assert "Later releases keep to the chunks and are not patched here" in said
    assert "2.0 dies (TRITON_ATTN), use --kv-cache-dtype fp8; 2.1 not known" in said
    arguments = ("explain", "--capability", "8.6", "--kv-cache-dtype", "fp8", "--json")
    assert json.loads(run(*arguments).out)["later"] == {
        "2.0": {"verdict": "nothing known against it", "backend": "FLASHINFER", "use": []},
        "2.1": {"verdict": "not known", "backend": None, "use": []},
    }
    without = run("explain", "--capability", "8.6", "--backend", "XFORMERS")
    assert without.status == 0, without.err
    assert "Later releases" not in without.out


@pytest.mark.usefixtures("made")
def test_doctor(machine: Machine) -> None:
    machine.install("2.0+cu999")
    machine.gpus(A10)
    ran = machine.doctor("--kv-cache-dtype", "fp8_e5m2")
    assert ran.status == 1
    assert "To change: use --kv-cache-dtype fp8: it asserts" in words(ran.out)
    assert "dies; selects TRITON_ATTN" in words(ran.out)
    found = machine.report()
    assert [one["verdict"] for one in found["later"]] == ["nothing known against it"]
    assert found["to_change"] == []


@pytest.mark.usefixtures("made")
def test_doctor_of_one_beyond_what_is_known(machine: Machine) -> None:
    machine.install("2.2")
    machine.gpus(A10)
    ran = machine.doctor()
    assert ran.status == 0
    assert "nothing is known of 2.2: beside the releases of VERSIONS.toml" in words(ran.out)


def test_report(real: Known) -> None:
    rows = dict(later.defaults(real))
    assert tuple(rows) == CAPABILITIES
    assert all(found for found in rows.values())
    assert later.executed(real)[0]
    assert {later.spans(real, fact) != "" for fact in real.facts.fact} == {True}
    assert (report.TEMPLATES / "later.html").is_file()
    assert set(get_args(later.Backend)) == set(BACKENDS)
