"""Wheels that others built of a release: repacked if their Python files are upstream's."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from made_upstream import WHEEL, Ran, Upstream, package, pin, write_wheel
from overlay.base.errors import Exit, OverlayError
from overlay.wheels import record, verify
from overlay.wheels.build import Built, build_from, build_wheel

from ..inplace.test_inplace import put
from .test_wheel import alone, contents, tampered

TAGS = "cp38-abi3-manylinux_2_28_aarch64"
PYTHON = "vllm/__init__.py"
SBOM = "sboms/vllm-overlay.cdx.json"


def other_wheel(
    folder: Path, version: str, changes: Mapping[str, str | bytes] | None = None, tags: str = TAGS
) -> Path:
    """The files of 1.0, compiled by someone else, and `changes`."""
    path = folder / f"vllm-{version}-{tags}.whl"
    write_wheel(path, version, {**package("1.0"), "vllm/_C.abi3.so": b"other", **(changes or {})})
    return path


def build(upstream: Upstream, source: Path, folder: Path) -> Built:
    return build_from(upstream.workspace(), source, folder)


def problems(upstream: Upstream, path: Path, source: Path | None) -> dict[str, tuple[str, ...]]:
    checks = verify.verify(upstream.workspace(), path, source=source)
    return {check.name: check.problems for check in checks if check.problems}


@pytest.mark.parametrize("label", ["cu118", "cu126", "cpu", "acme.1", "xpu", "a"])
def test_the_label_is_kept(upstream: Upstream, tmp_path: Path, label: str) -> None:
    """The version is another one, and greater, in PEP 440's order."""
    built = build(upstream, other_wheel(tmp_path, f"1.0+{label}"), tmp_path / "dist")
    assert built.path.name == f"vllm-1.0+{label}.llama4.1-{TAGS}.whl"
    assert Version("1.0") < Version(f"1.0+{label}") < Version(f"1.0+{label}.llama4.1")
    assert Version(f"1.0+{label}.llama4.1") < Version(f"1.0+{label}.llama4.2")
    new, info = contents(built.path), f"vllm-1.0+{label}.llama4.1.dist-info"
    assert f"\nVersion: 1.0+{label}.llama4.1\n".encode() in new[f"{info}/METADATA"]
    assert f"version = '1.0+{label}.llama4.1'\n".encode() in new["vllm/_version.py"]
    assert f"version_tuple = (1, 0, '{label}.llama4.1')".encode() in new["vllm/_version.py"]
    assert b"use_irope=False" in new["vllm/attention.py"]
    assert new["vllm/_C.abi3.so"] == b"other"


def test_a_module_that_states_the_label(upstream: Upstream, tmp_path: Path) -> None:
    """As setuptools-scm writes it; upstream's setup.py leaves it out."""
    module = (
        "__version__ = version = '1.0+acme.1'\n"
        "__version_tuple__ = version_tuple = (1, 0, 'acme.1')\n"
    )
    source = other_wheel(tmp_path, "1.0+acme.1", {"vllm/_version.py": module})
    built = build(upstream, source, tmp_path / "dist")
    assert contents(built.path)["vllm/_version.py"].decode() == (
        "__version__ = version = '1.0+acme.1.llama4.1'\n"
        "__version_tuple__ = version_tuple = (1, 0, 'acme.1.llama4.1')\n"
    )
    assert problems(upstream, built.path, source) == {}


def test_the_python_files_are_the_official_patched_wheels(
    upstream: Upstream, tmp_path: Path
) -> None:
    workspace = upstream.workspace()
    ours = contents(build_wheel(workspace, workspace.versions.get("1.0"), tmp_path).path)
    found = contents(build(upstream, other_wheel(tmp_path, "1.0+cu118"), tmp_path / "d").path)
    names = {name for name in ours if name.endswith(".py")}
    assert {name for name in found if name.endswith(".py")} == names
    assert all(ours[name] == found[name] for name in names - {"vllm/_version.py"})


def test_the_sbom_names_the_file(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = build(upstream, source, tmp_path / "dist")
    bill = json.loads(contents(built.path)[f"vllm-1.0+cu118.llama4.1.dist-info/{SBOM}"])
    (ancestor,) = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor["version"] == "1.0+cu118"
    assert source.name.replace("+", "%2B") in ancestor["purl"].replace("+", "%2B")
    (digest,) = ancestor["hashes"]
    assert digest["content"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "another build" in ancestor["description"]


def test_twice_the_same_bytes(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    one, two = (build(upstream, source, tmp_path / name) for name in "ab")
    assert one.sha256 == two.sha256


def test_the_official_wheel_by_its_path(upstream: Upstream, tmp_path: Path) -> None:
    """Is what `build` makes without it, by VERSIONS.toml."""
    built = build(upstream, upstream.served / WHEEL, tmp_path)
    assert built.sha256 == upstream.workspace().versions.get("1.0").patched_sha256


def test_pip_installs_it(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118", tags="py3-none-any")
    put("pip", source, tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv/bin/python")]
    built = build(upstream, source, tmp_path / "dist")
    install = [*pip, "install", "-q", "--no-deps", "--no-index", "--upgrade", str(built.path)]
    subprocess.run(install, check=True)
    frozen = subprocess.run([*pip, "list", "--format", "freeze"], capture_output=True, check=True)
    assert b"vllm==1.0+cu118.llama4.1\n" in frozen.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vllm/attention.py": "pass\n"}, "not upstream's are vllm/attention.py"),
        ({"vllm/extra.py": "pass\n"}, "not upstream's are vllm/extra.py"),
        ({f"vllm/{n}.py": "pass\n" for n in "abcd"}, "vllm/a.py, vllm/b.py, vllm/c.py and 1 more"),
        ({"other/__init__.py": "pass\n"}, "not upstream's are other/__init__.py"),
    ],
)
def test_other_python_files_are_refused(
    upstream: Upstream, tmp_path: Path, changes: Mapping[str, str], said: str
) -> None:
    with pytest.raises(OverlayError, match=re.escape(said)) as caught:
        build(upstream, other_wheel(tmp_path, "1.0+cu118", changes), tmp_path / "dist")
    assert caught.value.status is Exit.INTEGRITY
    assert not (tmp_path / "dist").exists()


def test_a_missing_python_file_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    path = tmp_path / f"vllm-1.0+cu118-{TAGS}.whl"
    files = package("1.0")
    del files[PYTHON]
    write_wheel(path, "1.0+cu118", files)
    with pytest.raises(OverlayError, match=r"not upstream's are vllm/__init__\.py \(missing\)"):
        build(upstream, path, tmp_path / "dist")


def test_a_record_that_lies_about_a_python_file(upstream: Upstream, tmp_path: Path) -> None:
    """The digests of VERSIONS.toml are of RECORD: what it says has to be true."""
    source = other_wheel(tmp_path, "1.0+cu118")
    tampered(source, lambda members: members.update({PYTHON: b"__version__ = '6.6'\n"}))
    with pytest.raises(OverlayError, match=r"its RECORD is wrong about vllm/__init__\.py"):
        build(upstream, source, tmp_path / "dist")


@pytest.mark.parametrize(
    ("name", "said", "status"),
    [
        ("vllm-1.0.zip", "Invalid wheel filename", 2),
        ("torch-1.0-py3-none-any.whl", "it is a wheel of torch", 2),
        ("vllm-0.9-py3-none-any.whl", "that release needs no patches", 2),
        ("vllm-0.5-py3-none-any.whl", "there are no patches for its version", 2),
        ("vllm-2.0-py3-none-any.whl", "it is newer than the releases", 2),
        ("vllm-1.0+llama4.1-py3-none-any.whl", "it is patched already", 2),
        ("vllm-1.0+cu118.llama4.1-py3-none-any.whl", "it is patched already", 2),
        (WHEEL, "it has the official wheel's name, and another sha256", 4),
        ("vllm-1.0+cu118-py3-none-any.whl", "its dist-info folder is vllm-1.5.dist-info", 4),
    ],
)
def test_what_is_no_other_build(
    upstream: Upstream, tmp_path: Path, name: str, said: str, status: int
) -> None:
    write_wheel(tmp_path / name, "1.5", package("1.0"))
    with pytest.raises(OverlayError, match=re.escape(said)) as caught:
        build(upstream, tmp_path / name, tmp_path / "dist")
    assert caught.value.status == status
    with pytest.raises(OverlayError, match="there is no such file"):
        build(upstream, tmp_path / "none" / "vllm-1.0-py3-none-any.whl", tmp_path / "dist")


def with_flash_attention(upstream: Upstream) -> None:
    """Let the official wheel have FlashAttention's Python files, as a CUDA build's has."""
    official, toml = upstream.served / WHEEL, upstream.root / "VERSIONS.toml"
    before = pin(official, "wheel", "1.0")
    write_wheel(official, "1.0", {**package("1.0"), "vllm/vllm_flash_attn/__init__.py": "F = 1\n"})
    text = toml.read_text().replace(before, pin(official, "wheel", "1.0"))
    toml.write_text(re.sub(r"^record.* = .*\n", "", text, flags=re.M))
    upstream.lock()


def test_a_build_without_flash_attention(upstream: Upstream, tmp_path: Path) -> None:
    """For CPUs, say. What is left has to be upstream's as well."""
    with_flash_attention(upstream)
    source = other_wheel(tmp_path, "1.0+cpu")
    built = build(upstream, source, tmp_path / "dist")
    assert problems(upstream, built.path, source) == {}
    changed = other_wheel(tmp_path, "1.0+cpu.1", {"vllm/attention.py": "pass\n"})
    with pytest.raises(OverlayError, match=r"not upstream's are vllm/attention\.py"):
        build(upstream, changed, tmp_path / "dist")


def test_verify_with_the_wheel_that_it_was_made_of(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = build(upstream, source, tmp_path / "dist")
    checks = verify.verify(upstream.workspace(), built.path, source=source)
    assert [c.name for c in checks] == [
        "sha256", "zip file", "RECORD", "version", "patched files", "other files", "source wheel",
        "SBOM",
    ]  # fmt: skip
    assert not any(c.problems for c in checks)
    assert [c.name for c in checks if not c.is_compared] == ["sha256"]


def test_verify_without_it_says_what_is_not_compared(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = build(upstream, source, tmp_path / "dist")
    checks = verify.verify(alone(upstream), built.path)
    assert [c.name for c in checks if not c.is_compared] == ["sha256", "source wheel"]
    (problem,) = (p for c in checks for p in c.problems)
    assert (
        f"of {source.name} with the sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"
        in (problem)
    )


def replace_member(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[name] = data
        info = "vllm-1.0+cu118.llama4.1.dist-info"
        lines = [record.line(n, d) for n, d in members.items() if not n.endswith("/RECORD")]
        members[f"{info}/RECORD"] = record.write([*lines, (f"{info}/RECORD", "", "")])

    return change


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (PYTHON, "other files"),
        ("vllm/attention.py", "patched files"),
        ("vllm/backdoor.py", "other files"),
        ("vllm/_C.abi3.so", "source wheel"),
        ("vllm/_version.py", "version"),
        ("vllm/data/config.json", "source wheel"),
    ],
)
def test_an_altered_one_is_refused_in_both_modes(
    upstream: Upstream, tmp_path: Path, name: str, check: str
) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = build(upstream, source, tmp_path / "dist")
    tampered(built.path, replace_member(name, b"evil = 1\n"))
    assert check in problems(upstream, built.path, source)
    assert verify_fails(upstream, built.path)


def verify_fails(upstream: Upstream, path: Path) -> bool:
    return any(check.problems for check in verify.verify(alone(upstream), path))


def test_an_altered_source_is_found(upstream: Upstream, tmp_path: Path) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = build(upstream, source, tmp_path / "dist")
    other_wheel(tmp_path, "1.0+cu118", {"vllm/_C.abi3.so": b"evil"})
    assert problems(upstream, built.path, source).keys() >= {"source wheel", "SBOM"}
    elsewhere = other_wheel(tmp_path, "1.0+cu126")
    with pytest.raises(OverlayError, match="was not made of vllm-1"):
        verify.verify(upstream.workspace(), built.path, source=elsewhere)


def test_a_source_with_other_python_files_proves_nothing(
    upstream: Upstream, tmp_path: Path
) -> None:
    built = build(upstream, other_wheel(tmp_path, "1.0+cu118"), tmp_path / "dist")
    source = other_wheel(tmp_path, "1.0+cu118", {PYTHON: "evil = 1\n"})
    with pytest.raises(OverlayError, match=r"not upstream's are vllm/__init__\.py"):
        verify.verify(upstream.workspace(), built.path, source=source)


def test_an_sbom_that_names_no_wheel(upstream: Upstream, tmp_path: Path) -> None:
    built = build(upstream, other_wheel(tmp_path, "1.0+cu118"), tmp_path / "dist")
    tampered(built.path, replace_member(f"vllm-1.0+cu118.llama4.1.dist-info/{SBOM}", b"{}"))
    with pytest.raises(OverlayError, match="does not tell what it was made of") as caught:
        verify.verify(alone(upstream), built.path)
    assert caught.value.status is Exit.INTEGRITY


def test_another_wheels_sum_is_not_the_official_ones(upstream: Upstream, tmp_path: Path) -> None:
    """A wheel of upstream's version for another platform: VERSIONS.toml has no sum of it."""
    source = other_wheel(tmp_path, "1.0")
    built = build(upstream, source, tmp_path / "dist")
    assert built.path.name == f"vllm-1.0+llama4.1-{TAGS}.whl"
    assert problems(upstream, built.path, source) == {}
    assert verify_fails(upstream, built.path)


def test_the_commands(upstream: Upstream, tmp_path: Path, run: Callable[..., Ran]) -> None:
    source = other_wheel(tmp_path, "1.0+cu118")
    built = run("build", "--wheel", str(source))
    assert built.status == 0, built.err
    path = tmp_path / f"dist/vllm-1.0+cu118.llama4.1-{TAGS}.whl"
    assert built.out.endswith(f"pip install '{path}'\n")
    given = run("verify", str(path), "--wheel", str(source))
    assert given.status == 0, given.err
    assert "sha256:         not compared (VERSIONS.toml has no sum" in given.out
    assert given.out.endswith(f"{path.name}: verified against {source.name}\n")
    alone = run("verify", str(path))
    assert alone.status == 1
    assert "source wheel:   not compared (it is not at hand)" in alone.out
    assert alone.out.endswith(f"{path.name}: not verified, 1 problem\n")
    assert "name that file with --wheel" in alone.err
    found = json.loads(run("verify", str(path), "--json").out)
    assert not found["source wheel"]["compared"]
    index = run("index", str(tmp_path / "simple"), str(path))
    assert index.status == 4
    assert "name that file with --wheel" in " ".join(index.err.split())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("build",), "name a release, or a wheel of one with --wheel"),
        (("build", "1.0", "--wheel", "x.whl"), "name a release, or a wheel of one with --wheel"),
        (("build", "--wheel", "x.whl", "--sdist"), "--wheel goes with neither"),
        (("verify", "x.whl", "--official", "--wheel", "y.whl"), "both name what it was made of"),
    ],
)  # fmt: skip
def test_wrong_usage(run: Callable[..., Ran], arguments: tuple[str, ...], text: str) -> None:
    ran = run(*arguments)
    assert ran.status == 2
    assert text in ran.err
