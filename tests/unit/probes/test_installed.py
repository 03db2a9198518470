"""install and doctor probe the vLLM that is installed, in its own Python."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import WHEEL, Ran, Upstream
from overlay.probes.probing import TIMEOUT, Verdict, in_environment

from ..inplace.test_inplace import put
from ..made_matrix import keep
from .made_llama4 import LLAMA4, MODELS, REGISTRY, TOPIC

Run = Callable[..., Ran]


@pytest.fixture
def venv(upstream: Upstream, tmp_path: Path) -> Path:
    """An environment with the official 1.0."""
    put("uv", upstream.served / WHEEL, tmp_path / "venv")
    keep(upstream.root, "1.0")
    return tmp_path / "venv"


def site(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


def test_install_says_that_it_behaves_as_patched(run: Run, venv: Path) -> None:
    ran = run("install", "--python", str(venv))
    assert ran.status == 0, ran.err
    assert "1 of 1 topic behave as patched" in ran.out
    again = json.loads(run("install", "--python", str(venv), "--json").out)
    assert again["probes"]["topics"][TOPIC]["verdict"] == "right"
    assert again["action"] == "nothing"
    assert "behave" not in run("install", "--python", str(venv), "--revert").out
    assert "behave" not in run("install", "--python", str(venv), "--dry-run").out


def snapshot(venv: Path) -> dict[str, bytes]:
    files = (path for path in sorted(site(venv).rglob("*")) if path.is_file())
    return {str(p.relative_to(venv)): p.read_bytes() for p in files if p.suffix != ".pyc"}


def test_install_takes_back_what_does_not_behave_so(
    run: Run, bad_upstream: Upstream, venv: Path
) -> None:
    before = snapshot(venv)
    ran = run("install", "--python", str(venv))
    assert ran.status == 4
    assert "does not behave as patched, and is reverted: 0 of 1 topic behave as patched" in ran.err
    assert f"{TOPIC}: Llama4ForCausalLM is left to the Transformers backend" in ran.err
    assert snapshot(venv) == before
    kept = run("install", "--python", str(venv), "--no-probe")
    assert kept.status == 0
    assert "behave" not in kept.out
    later = run("install", "--python", str(venv))
    assert later.status == 4
    assert "does not behave as patched: 0 of 1" in later.err
    assert snapshot(venv) != before


def doctor(run: Run, venv: Path) -> Ran:
    return run("doctor", "--probe", "--python", str(venv), "--gpu", "A10")


def test_doctor_on_stock(run: Run, venv: Path) -> None:
    ran = doctor(run, venv)
    assert "1 of 1 topics do what stock does" in ran.out
    assert "again" not in ran.out


def test_doctor_on_patched(run: Run, venv: Path) -> None:
    run("install", "--python", str(venv))
    ran = doctor(run, venv)
    assert (ran.status, ran.err) == (0, "")
    assert "1 of 1 topic behave as patched" in ran.out
    found = json.loads(run("doctor", "--probe", "--json", "--python", str(venv)).out)["probes"]
    assert found["topics"][TOPIC]["verdict"] == "right"
    assert "probes" not in json.loads(run("doctor", "--json", "--python", str(venv)).out)


def test_doctor_on_what_is_half_patched(run: Run, venv: Path) -> None:
    run("install", "--python", str(venv))
    file = site(venv) / REGISTRY
    file.unlink()
    file.write_text(MODELS)
    ran = doctor(run, venv)
    assert ran.status == 1
    assert f"{TOPIC}: Llama4ForCausalLM is left" in ran.out
    assert ran.out.count("To change: ") == 1
    assert "To change: repair it" in ran.out


def test_doctor_where_all_files_are_as_they_should_be(
    run: Run, bad_upstream: Upstream, venv: Path
) -> None:
    """Hashes alone would say that it is well."""
    run("install", "--python", str(venv), "--no-probe")
    ran = doctor(run, venv)
    assert ran.status == 1
    assert f"To change: install it again: {TOPIC} do not behave as patched" in ran.out
    assert run("doctor", "--python", str(venv), "--gpu", "A10").status == 0


def test_what_is_removed_is_no_success(run: Run, venv: Path) -> None:
    run("install", "--python", str(venv))
    (site(venv) / REGISTRY).unlink()
    assert doctor(run, venv).status == 1


def test_another_vllm_is_imported(
    run: Run, venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(site(venv) / "vllm", tmp_path / "other/vllm")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    ran = run("install", "--python", str(venv))
    assert ran.status == 0
    assert f"Not probed: this Python imports vLLM from {tmp_path / 'other'}" in ran.out


def test_a_python_that_does_not_start(venv: Path) -> None:
    found = in_environment(str(venv / "nothing"), site(venv), [TOPIC])
    assert found.of(Verdict.UNKNOWN)
    assert "does not start" in found.problem


def test_without_llama_4(tmp_path: Path) -> None:
    found = in_environment(sys.executable, tmp_path, [TOPIC])
    assert found.problem == f"there is no {LLAMA4}"
    assert TIMEOUT > 60
