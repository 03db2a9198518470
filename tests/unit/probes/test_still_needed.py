"""watch, port and validate say of each topic whether its test still fails on stock."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from made_upstream import Ran, Upstream, release
from overlay.probes import probing

from .made_llama4 import LLAMA4, MODELS, TEXT_ONLY, TOPIC, files

Run = Callable[..., Ran]
PASSES = "no longer needed: it passes its test on stock 1.2"
FAILS = "needed: Llama4ForCausalLM is left to the Transformers backend"
TO = ("port", "--to", "1.2", "--date", "2027-01-02")
#: What upstream has in place of the patch: it neither applies nor is it the same.
ELSEWHERE = MODELS + "_TEXT_GENERATION_MODELS['Llama4ForCausalLM'] = ('llama4', 'Llama4')\n"


@pytest.mark.parametrize(
    ("registry", "verdict", "told"),
    [
        (ELSEWHERE, "right", PASSES),
        (MODELS, "wrong", FAILS),
        ("MODELS = {}\n", "unknown", "unknown: vllm.model_executor.models.registry has no"),
        ("syntax error\n", "unknown", "does not compile"),
    ],
)
def test_watch(run: Run, upstream: Upstream, registry: str, verdict: str, told: str) -> None:
    release(upstream, "1.2", files(registry))
    words = " ".join(run("watch").out.split())
    assert told in words
    assert ("by their probes, no longer: llama4-text-only" in words) == (verdict == "right")
    found = json.loads(run("watch", "--json").out)["releases"]["1.2"]["topics"][TOPIC]["probe"]
    assert found["verdict"] == verdict
    assert found["needed"] == {"right": False, "wrong": True}.get(verdict)
    assert told in run("watch", "--markdown").out
    assert told not in run("watch", "--no-probe").out


def test_without_llama_4_nothing_is_run(
    run: Run, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(upstream, "1.2")
    monkeypatch.setattr("overlay.probes.probing.subprocess.run", None)
    assert f"unknown: there is no {LLAMA4}" in " ".join(run("watch").out.split())


def test_port_stops_where_it_is_no_longer_needed(run: Run, upstream: Upstream) -> None:
    """Although the patch applies: its file has what upstream has not."""
    release(upstream, "1.2", files(ELSEWHERE))
    ran = run(*TO)
    assert ran.status == 5
    assert "1 topic probed on stock 1.2: 1 no longer needed\n" in ran.out
    assert f"  {TOPIC}: {PASSES}\n" in ran.out
    assert f"stopped at {TOPIC}: {PASSES}; as a patch it is clean" in ran.err
    assert "Keep it in 1.2" in ran.err
    assert run("port", "--skip").status == 0
    listed = (upstream.patches / "series/1.2").read_text()
    assert listed == f"# Without {TEXT_ONLY} of 1.1: {PASSES}\n"


def test_port_keeps_it_if_told_to(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", files(ELSEWHERE))
    assert json.loads(run(*TO, "--json").out)["stopped"] == TOPIC
    assert run("port", "--continue").status == 0
    assert (upstream.patches / "series/1.2").read_text() == f"{TEXT_ONLY}\n"


def test_port_does_not_stop_where_it_is_needed(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", files())
    found = json.loads(run(*TO, "--dry-run", "--json").out)
    assert found["probes"][TOPIC]["needed"] is True
    ran = run(*TO)
    assert ran.status == 0, ran.err
    assert "1 topic probed on stock 1.2: 1 needed\n" in ran.out


def test_port_without_probes(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", files(ELSEWHERE))
    ran = run(*TO, "--no-probe")
    assert ran.status == 0, ran.err
    assert "probed" not in ran.out


def test_a_conflict_tells_what_the_probe_says(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", files("# Anew.\n_TEXT_GENERATION_MODELS = ['Llama4ForCausalLM']\n"))
    ran = run(*TO)
    assert ran.status == 5
    assert f"by its probe it is {PASSES}" in ran.err


def test_validate_demands_that_a_probe_tells_stock_from_patched(
    run: Run, upstream: Upstream, bad_upstream: Upstream
) -> None:
    """`bad_upstream` lies where `upstream` did."""
    ran = run("validate", "1.0", "--each")
    assert ran.status == 1
    assert f"1.0: patched, the probe of {TOPIC} says wrong (Llama4ForCausalLM is left" in ran.err


def test_validate_probes(run: Run, upstream: Upstream) -> None:
    ran = run("validate", "--all", "--each")
    assert ran.status == 0, ran.err
    assert "1.1: 1 of 1 prefixes compiled; 1 topic probed on stock and patched" in ran.out
    found = json.loads(run("validate", "1.0", "--each", "--json").out)
    assert found["each"]["1.0"]["probed"] == 1


def test_what_is_known_of_a_tree_is_kept(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = upstream.workspace()
    base = workspace.base(workspace.versions.get("1.0"))
    first = probing.on_tree(workspace, base, [TOPIC])
    monkeypatch.setattr("overlay.probes.probing.subprocess.run", None)
    assert probing.on_tree(workspace, base, [TOPIC]).probed == first.probed


@pytest.mark.parametrize(
    ("registry", "told"),
    [
        ("import os\n_TEXT_GENERATION_MODELS = {'TOKEN': os.environ['TOKEN']}\n", "KeyError"),
        ("import os\n_TEXT_GENERATION_MODELS = os._exit(3)\n", "ended its process"),
        ("_TEXT_GENERATION_MODELS = [0 for _ in iter(int, 1)]\n", "no answer in 2 s"),
    ],
    ids=["the environment", "an end", "no end"],
)
def test_what_a_release_runs_is_contained(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, registry: str, told: str
) -> None:
    """It sees no variable of this process, and can't end or stop it."""
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setattr(probing, "TIMEOUT", 2.0)
    release(upstream, "1.2", files(registry))
    workspace = upstream.workspace()
    from overlay.porting.candidate import fetch_sdist, get_candidate

    _, commit = fetch_sdist(workspace, get_candidate(workspace, "1.2"))
    (said,) = probing.on_tree(workspace, commit, [TOPIC]).probed
    assert said.is_needed is None
    assert told in said.why


def test_what_it_prints_is_no_answer(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", files(f"{MODELS}_TEXT_GENERATION_MODELS[print('noise')] = 1\n"))
    assert FAILS in " ".join(run("watch").out.split())
