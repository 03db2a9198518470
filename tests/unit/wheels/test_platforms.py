"""A release with a second official wheel, for 64-bit Arm, made of a later commit than its tag."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import WHEEL, Ran, Upstream, add_arm_wheel, package, release, write_wheel
from overlay.base.errors import Exit
from overlay.patches import entry
from overlay.porting import candidate
from overlay.releases import versions
from overlay.releases.platforms import PLATFORMS

from ..inplace.test_inplace import Place, put
from ..made_matrix import keep
from .test_wheel import contents, tampered

Run = Callable[..., Ran]
ARM = "vllm-1.0-cp38-abi3-manylinux2014_aarch64.whl"
PATCHED_ARM = ARM.replace("1.0", "1.0+llama4.1")
PATCHED = WHEEL.replace("1.0", "1.0+llama4.1")
#: No file that a patch changes.
LATER: dict[str, str | bytes] = {
    "vllm/envs.py": "MAIN_CUDA = '12.8'\n",
    "vllm/_C.abi3.so": b"for Arm",
}


@pytest.fixture
def both(upstream: Upstream) -> Upstream:
    """The made-up upstream, whose 1.0 has two wheels."""
    assert add_arm_wheel(upstream, "1.0", LATER).name == ARM
    return upstream


def test_what_is_locked_of_each(both: Upstream) -> None:
    """A wheel's own digests, beside those of the other; a second time nothing changes."""
    text = (both.root / "VERSIONS.toml").read_text()
    both.lock()
    assert (both.root / "VERSIONS.toml").read_text() == text
    one = versions.parse(text, "it").get("1.0")
    assert one.aarch64 is not None
    assert None not in one.aarch64.model_dump().values()
    assert one.record_python != one.aarch64.record_python
    assert one.patched_sha256 != one.aarch64.patched_sha256
    assert [build.platform for build in one.builds] == ["x86_64", "aarch64"]
    assert [build.tree for build in one.builds] == [one.tree, one.tree]


def test_build_and_verify(both: Upstream, run: Run, tmp_path: Path) -> None:
    ran = run("build", "1.0", "--platform", "aarch64", "--out", str(tmp_path))
    assert ran.status == 0, ran.err
    members = contents(tmp_path / PATCHED_ARM)
    assert members["vllm/envs.py"] == b"MAIN_CUDA = '12.8'\n"
    assert members["vllm/_C.abi3.so"] == b"for Arm"
    assert b"use_irope=False" in members["vllm/attention.py"]
    for more in ((), ("--official",), ("--wheel", str(both.served / ARM))):
        ran = run("verify", str(tmp_path / PATCHED_ARM), *more)
        assert (ran.status, "wrong" in ran.out) == (0, False), ran.out
        assert re.search(rf"official wheel: +ok \({ARM},", ran.out), ran.out
    tampered(tmp_path / PATCHED_ARM, lambda files: files.update({"vllm/envs.py": b"evil = 1\n"}))
    ran = run("verify", str(tmp_path / PATCHED_ARM))
    assert ran.status == Exit.PROBLEMS
    assert re.search(r"sha256: +wrong", ran.out)
    assert "vllm/envs.py" in ran.err


def test_neither_wheel_passes_for_the_other(both: Upstream, run: Run, tmp_path: Path) -> None:
    assert run("build", "1.0", "--out", str(tmp_path)).status == 0
    (tmp_path / PATCHED).rename(tmp_path / PATCHED_ARM)
    ran = run("verify", str(tmp_path / PATCHED_ARM))
    assert ran.status == Exit.PROBLEMS
    assert re.search(r"other files: +wrong", ran.out)


def test_fetch(both: Upstream, run: Run) -> None:
    ran = run("fetch", "--all", "--wheel", "--platform", "aarch64")
    assert ran.out.splitlines() == [str(both.cache / "files" / ARM)]
    (both.cache / "files" / ARM).unlink()
    ran = run("build", "1.0", "--platform", "aarch64", flags=("--offline",))
    assert "'vllm-overlay fetch 1.0 --platform aarch64 --wheel'" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build", "1.1", "--platform", "aarch64"), "1.1 has no official wheel for aarch64"),
        (("fetch", "1.1", "--platform", "aarch64"), "1.1 has no official wheel for aarch64"),
        (("kernels", "1.1", "--platform", "aarch64"), "1.1 has no official wheel for aarch64"),
        (("build", "1.0", "--sdist", "--platform", "aarch64"), "goes with a release alone"),
        (("build", "1.0", "--platform", "riscv"), "'riscv' is not one of"),
    ],
)
@pytest.mark.usefixtures("both")
def test_wrong_usage(run: Run, arguments: tuple[str, ...], said: str) -> None:
    ran = run(*arguments)
    assert ran.status == Exit.USAGE
    assert said in " ".join(ran.err.split())


@pytest.mark.usefixtures("both")
def test_it_is_not_imported_elsewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overlay.cli.build.machine", lambda: "x86_64")
    ran = run("build", "1.0", "--platform", "aarch64", "--check-import")
    assert ran.status == Exit.USAGE
    assert "can't be imported on x86_64" in " ".join(ran.err.split())
    assert "repacking" not in ran.err


@pytest.mark.usefixtures("both")
def test_the_index_has_both(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for platform in PLATFORMS:
        assert run("build", "1.0", "--platform", platform).status == 0
    assert run("index", "simple").status == 0
    page = (tmp_path / "simple" / "vllm" / "index.html").read_text()
    assert f">{PATCHED}<" in page
    assert f">{PATCHED_ARM}<" in page


@pytest.mark.usefixtures("both")
def test_selfcheck_is_of_both(run: Run) -> None:
    ran = run("selfcheck", "1.0")
    assert ran.status == 0, ran.err
    assert [line.split()[1] for line in ran.out.splitlines()] == [PATCHED, PATCHED_ARM]


@pytest.fixture
def arm_place(both: Upstream, tmp_path: Path) -> Place:
    """An environment with the wheel for Arm, under a name that can be installed here."""
    anywhere = tmp_path / "vllm-1.0-py3-none-any.whl"
    anywhere.write_bytes((both.served / ARM).read_bytes())
    return Place(both, put("uv", anywhere, tmp_path / "venv"))


def test_patched_in_place_and_back(arm_place: Place) -> None:
    """It is no other build: upstream's own wheel, whose digests are locked."""
    keep(arm_place.upstream.root, "1.0")
    before = arm_place.files
    arm_place.install(full=True)
    assert arm_place.doctor() == ()
    envs = arm_place.site / "vllm" / "envs.py"
    envs.write_text("evil = 1\n")
    assert "not as RECORD has them are vllm/envs.py" in " ".join(arm_place.doctor())
    envs.write_text(str(LATER["vllm/envs.py"]))
    arm_place.revert()
    assert arm_place.files == before


def test_a_wheel_that_was_installed_is_healed_with_its_own(
    arm_place: Place, run: Run, tmp_path: Path
) -> None:
    keep(arm_place.upstream.root, "1.0")
    run("build", "1.0", "--platform", "aarch64", "--out", str(tmp_path))
    anywhere = tmp_path / "vllm-1.0+llama4.1-py3-none-any.whl"
    (tmp_path / PATCHED_ARM).rename(anywhere)
    place = Place(arm_place.upstream, put("uv", anywhere, tmp_path / "patched"))
    assert place.doctor() == ()
    (place.site / "vllm" / "attention.py").write_text("pass\n")
    (told,) = place.doctor()
    assert "vllm-overlay build 1.0 --platform aarch64" in told


def test_a_changed_build_is_refused_still(arm_place: Place) -> None:
    (arm_place.site / "vllm" / "envs.py").write_text("evil = 1\n")
    arm_place.rewrite_record()
    assert any("does not list upstream's files" in told for told in arm_place.doctor())


def test_a_new_release_is_pinned_with_both(upstream: Upstream, run: Run) -> None:
    release(upstream, "1.2")
    arm = upstream.served / ARM.replace("1.0", "1.2")
    write_wheel(arm, "1.2", package("1.1"))
    assert arm.name in run("watch", "1.2").out
    workspace = upstream.workspace()
    found = candidate.draft_release(workspace, candidate.get_candidate(workspace, "1.2"))
    assert found.aarch64 is not None
    assert found.aarch64.wheel.file == arm.name
    text = entry.insert((upstream.root / "VERSIONS.toml").read_text(), found)
    assert versions.parse(text, "it").get("1.2") == found


def test_the_table_is_for_aarch64(both: Upstream, run: Run) -> None:
    toml = both.root / "VERSIONS.toml"
    toml.write_text(toml.read_text().replace(ARM, ARM.replace("aarch64", "ppc64le")))
    ran = run("validate", "--all")
    assert ran.status == Exit.USAGE
    assert "is no wheel for aarch64" in " ".join(ran.err.split())


def test_locked_entries_are_written_as_they_are_read(both: Upstream) -> None:
    known = versions.load(both.root / "VERSIONS.toml")
    text = "".join(entry.render(each) for each in known.releases.values())
    head = (both.root / "VERSIONS.toml").read_text().split("[releases.")[0]
    assert versions.parse(head + text, "it") == known
