"""For which GPUs a release has code: from made-up wheels, and what is kept of the real ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from made_upstream import WHEEL, Upstream, package, pin, write_wheel
from overlay.answers import binaries
from overlay.answers.binaries import Binaries
from overlay.answers.binaries_run import TORCH as TORCH_LIBRARY
from overlay.base.errors import OverlayError
from overlay.kernels import needed
from overlay.releases import versions

from ..cli.test_cli import Run
from ..made_library import cubin, entry, libraries, library, unit

ROOT = Path(__file__).parents[3]
PATCHED = versions.load(ROOT / "VERSIONS.toml").patched
TORCH = "torch-2.6.0-cp312-cp312-manylinux1_x86_64.whl"
BY_NAME = {need.name: need for need in needed.NEEDS}
FLASH = "v1.flash_attn.FlashAttentionImpl"


def kept(release: str) -> Binaries:
    return binaries.read(ROOT, release)


def serve(upstream: Upstream, files: dict[str, bytes]) -> None:
    """Make 1.0's wheel one with these libraries."""
    wheel, toml = upstream.served / WHEEL, upstream.root / "VERSIONS.toml"
    old = pin(wheel, "wheel", "1.0")
    write_wheel(wheel, "1.0", {**package("1.0"), **files})
    text = toml.read_text()
    assert old in text
    toml.write_text(text.replace(old, pin(wheel, "wheel", "1.0")))


def torch_wheel(folder: Path, *architectures: str, name: str = TORCH) -> Path:
    code = cubin("kernel")
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.mkdir("torch/")
        entries = [entry(one, code) for one in architectures]
        archive.writestr(TORCH_LIBRARY, library(unit(*entries)))
    return folder / name


def test_kept_checked_and_shown(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    serve(upstream, libraries(["7.5", "8.0"], ["8.0"]))
    wheel = torch_wheel(tmp_path / "torch", "7.5", "8.0", "8.6")
    ran = run("kernels", "1.0", "--keep", "--torch", str(wheel))
    assert ran.status == 0, ran.err
    assert "matrix/1.0.kernels.json: written" in ran.err
    assert "All that every backend needs has code for: 7.5, 8.0, 8.6, 8.9\n" in ran.out
    found = binaries.read(upstream.root, "1.0")
    assert {part.library for part in found.parts} == set(needed.LIBRARIES)
    assert [str(part.code) for part in found.parts] == ["7.5 8.0, PTX 8.0"] * 4
    assert [str(code) for code in found.torch.code] == ["7.5 8.0 8.6"]
    assert found.torch.wheel.file == TORCH
    checked = run("kernels", "1.0", "--check", "--json")
    assert checked.status == 0, checked.err
    assert "torch 2.6.0 is not unpacked here, and not compared" in checked.err
    assert json.loads(checked.out) == {
        "releases": [json.loads(binaries.dumps(found))],
        "problems": [],
    }


def test_the_options_exclude_each_other(run: Run) -> None:
    assert run("kernels", "1.0", "--keep", "--check").status == 2
    assert run("kernels").status == 2


def test_what_has_changed_is_told(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    serve(upstream, libraries())
    run("kernels", "1.0", "--keep", "--torch", str(torch_wheel(tmp_path / "torch", "8.0")))
    before = binaries.path_of(upstream.root, "1.0").read_text()
    serve(upstream, libraries(["7.5", "8.0", "9.0"]))
    upstream.cache.joinpath("files", WHEEL).unlink()
    ran = run("kernels", "1.0", "--check")
    assert ran.status == 1
    assert "1.0: vllm/_C.abi3.so has 7.5 8.0 9.0 for rms_norm_kernel, " in ran.err
    assert "is of vllm-1.0-cp38-abi3-manylinux1_x86_64.whl, another wheel" in ran.err
    other = torch_wheel(tmp_path / "other", "8.0", "9.0")
    assert "1.0: torch 2.6.0 has 8.0 9.0" in run(
        "kernels", "1.0", "--check", "--torch", str(other)
    ).err  # fmt: skip
    assert binaries.path_of(upstream.root, "1.0").read_text() == before


def test_torch_of_an_environment_is_compared(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    """Where uv has unpacked it for tests."""
    serve(upstream, libraries())
    wheel = torch_wheel(tmp_path / "torch", "8.0")
    run("kernels", "1.0", "--keep", "--torch", str(wheel))
    site = upstream.cache / "uv/torch-2.6.0/archive-v0/abc"
    (site / "torch-2.6.0.dist-info").mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert run("kernels", "1.0", "--check").status == 0
    (site / TORCH_LIBRARY).unlink()  # one for CPUs
    assert "is not unpacked here" in run("kernels", "1.0", "--check").err
    (site / TORCH_LIBRARY).write_bytes(library(unit(entry("9.0", cubin("kernel")))))
    ran = run("kernels", "1.0", "--check")
    assert (ran.status, "1.0: torch 2.6.0 has 9.0, which is not what is kept" in ran.err) == (
        1,
        True,
    )


def test_torch_of_another_release_counts(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    """If both pin the same."""
    serve(upstream, libraries())
    ran = run("kernels", "1.0", "--keep")
    assert ran.status == 2
    assert "nothing is kept of torch 2.6.0" in ran.err
    assert "the wheel that 'pip download --no-deps torch==2.6.0' fetches" in ran.err
    run("kernels", "1.0", "--keep", "--torch", str(torch_wheel(tmp_path / "torch", "8.0")))
    path = binaries.path_of(upstream.root, "1.0")
    path.rename(binaries.path_of(upstream.root, "1.1"))
    assert run("kernels", "1.0", "--keep").status == 0
    assert binaries.read(upstream.root, "1.0").torch == binaries.read(upstream.root, "1.1").torch


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torch-2.7.0-cp312-cp312-manylinux1_x86_64.whl", "1.0 pins torch 2.6.0"),
        ("torch.zip", "is no wheel of torch"),
        ("vllm-1.0-cp38-abi3-manylinux1_x86_64.whl", "it is of vllm"),
    ],
)
def test_other_wheels_are_not_its_torch(
    run: Run, upstream: Upstream, tmp_path: Path, name: str, why: str
) -> None:
    serve(upstream, libraries())
    wheel = torch_wheel(tmp_path / "torch", "8.0", name=name)
    ran = run("kernels", "1.0", "--torch", str(wheel))
    assert (ran.status, why in ran.err) == (2, True)
    assert "there is no such file" in run("kernels", "1.0", "--torch", TORCH).err


def test_a_wheel_without_what_is_needed(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    torch = ("--torch", str(torch_wheel(tmp_path / "torch", "8.0")))
    ran = run("kernels", "1.0", *torch)  # its _C is no library, and it has no other one
    assert (ran.status, "there is no vllm/_moe_C.abi3.so in it" in ran.err) == (4, True)
    whole = libraries()
    serve(upstream, {**whole, needed.C: b"no library"})
    upstream.cache.joinpath("files", WHEEL).unlink()
    assert "vllm/_C.abi3.so: it is no ELF file" in run("kernels", "1.0", *torch).err
    serve(upstream, {**whole, needed.MOE_C: library(unit(entry("8.0", cubin("other"))))})
    upstream.cache.joinpath("files", WHEEL).unlink()
    assert "has none of the kernels for MoE alignment" in run("kernels", "1.0", *torch).err
    assert not (upstream.root / "matrix").exists()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "matrix").mkdir()
    path = binaries.path_of(tmp_path, "0.8.3")
    for text in ("", "[]", "{}", '{"schema": 2}', '{"schema": 1, "release": "0.8.3"}'):
        path.write_text(text)
        with pytest.raises(OverlayError, match=r"Make it: vllm-overlay kernels 0\.8\.3 --keep"):
            binaries.read(tmp_path, "0.8.3")


BUILDS = [build for release in PATCHED for build in release.builds]


@pytest.mark.parametrize("release", BUILDS, ids=[one.asked for one in BUILDS])
def test_what_is_kept_is_of_the_release(release: versions.Release) -> None:
    """Of the wheel that is pinned, with code for every need, written as the command writes it."""
    found = binaries.read(ROOT, release.name, release.platform)
    assert (found.wheel.file, found.wheel.sha256) == (release.wheel.file, release.wheel.sha256)
    assert found.torch.version == release.torch
    assert [need.name for need in needed.NEEDS if not found.code_of(need)] == []
    path = binaries.path_of(ROOT, release.name, release.platform)
    assert path.read_text("utf-8") == binaries.dumps(found)


def test_a_torch_without_cuda_runs_nowhere(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    """As the package index has it for 64-bit Arm; one that is not known is no obstacle."""
    serve(upstream, libraries(["7.5", "8.0"], ["8.0"]))
    wheel = tmp_path / TORCH
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/lib/libtorch_cpu.so", b"none")
    ran = run("kernels", "1.0", "--keep", "--torch", str(wheel))
    assert ran.status == 0, ran.err
    assert "has code for: none\n" in ran.out
    found = binaries.read(upstream.root, "1.0")
    assert found.lacking("8.0") == ("torch",)
    assert found.with_any_torch().lacking("8.0") == ()
    assert found.with_any_torch().lacking("7.0") != ()


def test_what_64_bit_arm_has() -> None:
    found = binaries.read(ROOT, "0.10.2", "aarch64")
    assert found.platform == "aarch64"
    assert found.lacking("9.0") == ("torch",)
    grace, orin, volta = (found.with_any_torch().lacking(one) for one in ("9.0", "8.7", "7.0"))
    assert (grace, orin) == ((), ())
    assert volta


@pytest.mark.parametrize(
    ("release", "capability", "lacking"),
    [
        ("0.8.5", "12.0", ("torch", "layers", "KV cache", "MoE alignment")),  # an RTX 5090
        ("0.9.1", "10.0", ("torch",)),
        ("0.10.1.1", "12.0", ("torch",)),
        ("0.10.2", "12.0", ()),
        ("0.10.2", "10.3", ()),
        ("0.8.3", "6.1", ("layers", "KV cache", "MoE alignment")),  # a P40
        ("0.8.3", "7.0", ()),
        ("0.10.2", "7.0", ()),
    ],
)
def test_who_cannot_run_it(release: str, capability: str, lacking: tuple[str, ...]) -> None:
    assert kept(release).lacking(capability) == lacking


def test_only_the_backends_own_kernels_count() -> None:
    """FlashAttention 2 has no code for 7.5, which nobody else needs; 9.0 has one of its own."""
    found = kept("0.9.1")
    assert found.lacking("7.5") == found.lacking("7.5", "v1.triton_attn.TritonAttentionImpl") == ()
    assert found.lacking("7.5", FLASH) == ("FlashAttention 2",)
    assert found.lacking("9.0", FLASH) == ()
    assert not found.serves(BY_NAME["FlashAttention 3"], "10.0")
    assert found.lacking("10.0", FLASH) == ("torch",)  # and not FlashAttention 3


def test_ptx_of_flash_attention_is_enough() -> None:
    """From 0.9.2 on it is all that Hopper and Blackwell have of FlashAttention 2."""
    need = BY_NAME["FlashAttention 2"]
    for capability in ("8.6", "9.0", "10.0", "12.0"):
        assert kept("0.9.2").serves(need, capability)
    assert not kept("0.9.2").serves(need, "7.5")
    assert not kept("0.9.1").serves(need, "12.0")
