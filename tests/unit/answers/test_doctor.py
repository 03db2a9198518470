"""Doctor, in made-up environments: a folder with metadata, a Python and a nvidia-smi to match."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest

from made_upstream import Ran, Upstream, package, write_wheel
from overlay.answers import binaries, doctor, probe, weights
from overlay.answers.explain import Settings
from overlay.answers.probe import Device, visible
from overlay.base.errors import OverlayError
from overlay.wheels import record
from overlay.wheels.build import build_from, build_wheel

from ..made_matrix import keep
from .test_runnable import code
from .test_weights import run_of

T4 = "0, GPU-aaaa, Tesla T4, 7.5\n"
A10 = "1, GPU-bbbb, NVIDIA A10, 8.6\n"


@dataclass(frozen=True)
class Machine:
    """A made-up machine: an environment, and what stands on its PATH."""

    folder: Path
    upstream: Upstream
    call: Callable[..., Ran]

    @property
    def site(self) -> Path:
        return self.folder / "site-packages"

    @property
    def python(self) -> Path:
        return self.script("python", f"echo '{json.dumps([str(self.site)])}'")

    def script(self, name: str, body: str) -> Path:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def gpus(self, text: str) -> None:
        self.script("nvidia-smi", f"cat <<'END'\n{text}END")

    def install(self, version: str) -> None:
        """A wheel of `version`, unpacked: the official one, if there is one."""
        name = f"vllm-{version}-cp38-abi3-manylinux1_x86_64.whl"
        path = self.upstream.served / name
        if not path.is_file():
            path = self.folder / name
            write_wheel(path, version, {"vllm/__init__.py": "", "vllm/attention.py": "A = 1\n"})
        self.unpack(path)

    def unpack(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(self.site)

    def command(self, *options: str) -> str:
        """`vllm-overlay install` for its Python, as doctor writes it."""
        return shlex.join(("vllm-overlay", "install", "--python", str(self.python), *options))

    def doctor(self, *arguments: str) -> Ran:
        return self.call("doctor", "--python", str(self.python), *arguments)

    def report(self, *arguments: str) -> Any:
        ran = self.doctor(*arguments, "--json")
        assert ran.out, ran.err
        found = json.loads(ran.out)
        assert ran.status == (1 if found["to_change"] else 0), ran.err
        return found


@pytest.fixture
def machine(
    tmp_path: Path,
    upstream: Upstream,
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """Without vLLM, and without a GPU."""
    keep(upstream.root, "1.0", "1.1")
    folder = tmp_path / "machine"
    for name in ("bin", "site-packages"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    for name in (*doctor.SHOWN, "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    return Machine(folder, upstream, run)


@pytest.fixture
def patched(machine: Machine) -> Machine:
    """With the very wheel that the overlay builds, and a GPU."""
    release = machine.upstream.workspace().versions.get("1.0")
    machine.unpack(build_wheel(machine.upstream.workspace(), release, machine.folder).path)
    machine.gpus(A10)
    return machine


def words(text: str) -> str:
    return " ".join(text.split())


def test_nothing_is_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.folder / "bin"))
    ran = machine.doctor()
    assert ran.status == 1
    said = words(ran.out)
    assert "vLLM not installed" in said
    assert "none seen: there is no nvidia-smi" in said
    assert "To change: install one of the releases 1.0 to 1.1: vllm-overlay build RELEASE" in said
    assert machine.report()["vllm"]["kind"] == "absent"


def test_stock_that_is_wrong(machine: Machine) -> None:
    machine.install("1.0")
    machine.gpus(T4)
    ran = machine.doctor("--dtype", "half")
    assert ran.status == 1
    said = words(ran.out)
    assert "vLLM 1.0, upstream's, not patched, in /" in said
    assert "GPU 0: Tesla T4, capability 7.5 (nvidia-smi)" in said
    assert "files 3 Python files, as RECORD has them" in said
    assert "Llama 4 wrong, V0 XFormers: wrong attention in chunked layers" in said
    (change,) = (line for line in ran.out.splitlines() if line.startswith("To change"))
    assert change == f"To change: install 1.0+llama4.1: {machine.command()}"
    assert max(len(line) for line in ran.out.splitlines() if line != change) <= 80


def test_stock_that_is_right(machine: Machine) -> None:
    machine.install("1.0")
    machine.gpus(A10)
    ran = machine.doctor()
    assert ran.status == 0, ran.out
    assert "No change needed." in ran.out
    assert "right, V1 FlashAttention" in words(ran.out)


def test_stock_that_needs_settings_too(machine: Machine) -> None:
    machine.install("1.0")
    machine.gpus(T4)
    assert machine.report()["to_change"] == [
        f"install 1.0+llama4.1: {machine.command()}, and set --dtype float16"
    ]


def test_patched(patched: Machine) -> None:
    found = patched.report("--kv-cache-dtype", "fp8_e5m2")
    assert found["to_change"] == []
    assert found["vllm"] == {
        "kind": "patched", "version": "1.0+llama4.1", "release": "1.0", "revision": 1,
        "newest_revision": 1, "folder": str(patched.site), "files_checked": 3,
        "files_damaged": [],
    }  # fmt: skip
    said = words(patched.doctor().out)
    assert "1.0+llama4.1, patched, revision 1" in said
    assert "No change needed." in said


def test_patched_with_settings_that_are_refused(
    patched: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHINFER")
    monkeypatch.setenv("VLLM_USE_V1", "0")
    found = patched.report()
    assert found["to_change"] == ["unset VLLM_ATTENTION_BACKEND"]
    assert found["environment"] == {"VLLM_USE_V1": "0", "VLLM_ATTENTION_BACKEND": "FLASHINFER"}
    assert "VLLM_USE_V1=0, without FlashInfer" in words(patched.doctor().out)
    assert patched.report("--max-model-len", "8192")["to_change"] == []


def test_no_settings_are_right(patched: Machine) -> None:
    (change,) = patched.report("--capability", "7.0")["to_change"]
    assert change == "use another GPU: no settings of 1.0 are right on this one"


def test_older_revision(patched: Machine) -> None:
    toml = patched.upstream.root / "VERSIONS.toml"
    toml.write_text(toml.read_text().replace("revision = 1", "revision = 2"))
    (change,) = patched.report()["to_change"]
    assert change.startswith("install 1.0+llama4.2, a newer revision: vllm-overlay build 1.0, and")


def test_newer_revision(machine: Machine) -> None:
    machine.install("1.0+llama4.7")
    found = machine.report("--gpu", "A10")
    assert found["to_change"] == []
    assert "its revision is newer than this overlay's, 1; update the overlay" in found["notes"]


def test_other_patches_under_the_same_revision(patched: Machine) -> None:
    patch = patched.upstream.patches / "attention-signatures/1.0.patch"
    patch.write_bytes(patch.read_bytes().replace(b"Llama 4 passes", b"Llama 4 hands"))
    (change,) = patched.report()["to_change"]
    assert "has another patches/attention-signatures/1.0.patch" in change


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "has no SBOM"), ("{", "is damaged"), ("[]", "is damaged"), ("{}", "is damaged")],
)
def test_sbom_is_no_good(patched: Machine, text: str | None, said: str) -> None:
    (bill,) = patched.site.glob("*.dist-info/sboms/*")
    if text is None:
        bill.unlink()
    else:
        bill.write_text(text)
    (change,) = patched.report()["to_change"]
    assert change.startswith("install 1.0+llama4.1 again: ")
    assert said in change


def test_files_were_edited(patched: Machine) -> None:
    (patched.site / "vllm/attention.py").write_text("import this\n")
    (patched.site / "vllm/__init__.py").unlink()
    found = patched.report()
    assert found["vllm"]["files_damaged"] == ["vllm/__init__.py", "vllm/attention.py"]
    (change,) = found["to_change"]
    assert change.startswith(
        "install 1.0+llama4.1 again: not as RECORD has them are vllm/__init__.py, "
        "vllm/attention.py; vllm-overlay build 1.0, and install that wheel"
    )
    assert "3 Python files, 2 not as RECORD has them" in words(patched.doctor().out)


INFO = "vllm-1.0+llama4.1.dist-info"


def adapt_record(site: Path, info: str = INFO) -> None:
    """Let RECORD say what is there, as one does who knows how it is written."""
    file = site / info / "RECORD"
    rows = record.read(file.read_text()).values()
    there = [(row, site / row[0]) for row in rows if (site / row[0]).is_file()]
    new = [record.line(row[0], path.read_bytes()) if row[1] else row for row, path in there]
    file.write_bytes(record.write(new))


def take_patch_back(site: Path) -> None:
    file = site / "vllm/attention.py"
    file.write_text(file.read_text().replace(", use_irope=False", ""))
    adapt_record(site)


def change_another_module(site: Path) -> None:
    (site / "vllm/__init__.py").write_text("import os\n")
    adapt_record(site)


def drop_a_row(site: Path) -> None:
    file = site / INFO / "RECORD"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("vllm/__init__.py,")))


def add_a_module(site: Path) -> None:
    (site / "vllm/backdoor.py").write_text("import os\n")
    file = site / INFO / "RECORD"
    file.write_text("vllm/backdoor.py,,\n" + file.read_text())
    adapt_record(site)


def no_record(site: Path) -> None:
    (site / INFO / "RECORD").unlink()


def second_dist_info(site: Path) -> None:
    (site / "vllm-0.9.dist-info").mkdir()
    (site / "vllm-0.9.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.9\n")


def interrupted(site: Path) -> None:
    (site / ".vllm-overlay").mkdir()


def lose_originals(site: Path) -> None:
    file = site / INFO / "RECORD"
    file.write_text(f"{INFO}/{record.ORIGINALS},sha256={'A' * 43},9\n" + file.read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (take_patch_back, "install 1.0+llama4.1 again: patched files are not as locked"),
        (change_another_module, "install 1.0+llama4.1 again: RECORD is not as locked"),
        (drop_a_row, "install 1.0+llama4.1 again: RECORD is not as locked"),
        (add_a_module, "install 1.0+llama4.1 again: RECORD is not as locked"),
        (no_record, "install it again: it has no RECORD"),
        (second_dist_info, "there are vllm-0.9.dist-info and vllm-1.0+llama4.1.dist-info; rm -r"),
        (interrupted, "end the install that was interrupted: vllm-overlay install --python"),
        (lose_originals, "which holds what was replaced, is lost: it is missing; pip --python"),
    ],
)
def test_an_installation_that_is_not_what_it_says(
    patched: Machine, change: Callable[[Path], None], said: str
) -> None:
    """It is compared with this checkout, and RECORD is not believed."""
    assert patched.report()["to_change"] == []
    change(patched.site)
    assert any(said in each for each in patched.report()["to_change"])


def test_stock_whose_record_was_adapted(machine: Machine) -> None:
    machine.install("1.0")
    machine.gpus(A10)
    assert machine.report()["to_change"] == []
    (machine.site / "vllm/__init__.py").write_text("import os\n")
    adapt_record(machine.site, "vllm-1.0.dist-info")
    (change,) = machine.report()["to_change"]
    assert change == (
        "install upstream's 1.0 again: its RECORD does not list upstream's files; "
        f"pip --python {machine.python} install --force-reinstall --no-deps 'vllm==1.0'"
    )


@pytest.mark.parametrize(
    ("version", "kind", "status", "said"),
    [
        ("1.0+cu118", "foreign", 1, "neither upstream's 1.0 nor this overlay's"),
        ("1.0+llama4.x", "foreign", 1, "neither upstream's 1.0 nor this overlay's"),
        ("0.9", "control", 1, "0.9 has no Llama 4: the model came with 1.0"),
        ("1.1.dev3+g0123456", "unknown", 1, "nothing is known here of 1.1.dev3+g0123456"),
        ("0.5", "unknown", 1, "nothing is known here of 0.5"),
        ("2.0", "newer", 0, "it is newer than what this overlay is for"),
        ("dev", "unknown", 1, "nothing is known here of dev"),
    ],
)
def test_other_versions(machine: Machine, version: str, kind: str, status: int, said: str) -> None:
    machine.install(version)
    machine.gpus(T4)
    ran = machine.doctor("--dtype", "half")
    assert ran.status == status, ran.out + ran.err
    assert said in words(ran.out)
    assert machine.report("--dtype", "half")["vllm"]["kind"] == kind


def test_metadata_without_a_version(machine: Machine) -> None:
    machine.install("1.0")
    (metadata,) = machine.site.glob("*.dist-info/METADATA")
    metadata.unlink()
    found = machine.report()
    assert (found["vllm"]["kind"], found["vllm"]["version"]) == ("unknown", "")
    assert "install a release: nothing is known here of it" in found["to_change"]


def test_different_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install("1.0")
    machine.gpus(T4 + A10 + "2, GPU-cccc, NVIDIA A10, 8.6\n")
    found = machine.report()
    assert [one["capability"] for one in found["answers"]] == ["7.5", "8.6"]
    assert found["to_change"] == [
        f"for Tesla T4 (capability 7.5): install 1.0+llama4.1: {machine.command()}, and set "
        "--dtype float16"
    ]
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in note for note in found["notes"])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    found = machine.report()
    assert [one["capability"] for one in found["answers"]] == ["8.6"]
    assert [gpu["visible"] for gpu in found["gpus"]] == [False, True, True]
    assert found["to_change"] == found["notes"] == []
    assert "hidden by CUDA_VISIBLE_DEVICES" in words(machine.doctor().out)


def test_different_gpus_that_need_the_same(
    patched: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched.gpus(T4 + A10)
    monkeypatch.setenv("VLLM_USE_V1", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    arguments = ("--dtype", "half", "--kv-cache-dtype", "fp8_e5m2")
    assert patched.report(*arguments)["to_change"] == ["unset VLLM_USE_V1"]
    said = words(patched.doctor(*arguments).out)
    assert "on Tesla T4 (capability 7.5): refused" in said
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in said


def test_gpu_that_is_too_old(machine: Machine) -> None:
    machine.install("1.0")
    machine.gpus("0, GPU-1, Tesla P40, 6.1\n")
    (change,) = machine.report()["to_change"]
    assert "use another GPU: vLLM's wheels have no kernels for capability 6.1" in change


def test_gpu_that_the_matrix_has_not(machine: Machine) -> None:
    """Not known to fail, so nothing to change."""
    machine.install("1.0")
    found = machine.report("--capability", "11.0")
    assert found["to_change"] == []
    assert "the matrix has no capability like 11.0" in found["notes"]


def test_another_torch_decides_what_can_run(patched: Machine) -> None:
    """The release's has code for the GPU, the installed one has none."""
    binaries.write(patched.upstream.root, code("8.0", release="1.0"))
    assert patched.report()["to_change"] == []
    info = patched.site / "torch-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    paths = json.dumps([str(patched.site)])
    patched.script("python", f"case \"$*\" in *torch*) echo sm_90;; *) echo '{paths}';; esac")
    ran = patched.call("doctor", "--python", str(patched.folder / "bin" / "python"))
    assert ran.status == 1
    assert "torch 2.9.0 has no code for capability 8.6, but for 9.0" in words(ran.out)
    assert "torch is 2.9.0, not the release's 2.6.0" in words(ran.out)


def test_weights_are_asked_about(patched: Machine) -> None:
    """The flag that is missing is what to change."""
    found = weights.from_run(run_of())
    weights.settle(patched.upstream.root, found, check=False)
    asked = ("--capability", "8.6", "--checkpoint", "awq")
    report = patched.report(*asked)
    assert report["to_change"] == ["--quantization moe_wna16"]
    assert report["answers"][0]["settings"]["weights"]["checkpoint"] == "awq"
    assert patched.report(*asked, "--quantization", "moe_wna16")["to_change"] == []
    ran = patched.doctor("--capability", "8.6", "--checkpoint", "bitsandbytes")
    assert "not known: what becomes of weights bitsandbytes, 4 bits" in words(ran.out)


def test_named_gpu_goes_before_the_one_there(machine: Machine) -> None:
    machine.install("1.0")
    machine.script("nvidia-smi", "echo called > called; exit 1")
    ran = machine.doctor("--gpu", "A10")
    assert ran.status == 0, ran.out
    assert "GPU A10 (capability 8.6), as named" in words(ran.out)
    assert not list(machine.folder.parent.rglob("called"))


def test_all_gpus_are_hidden(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install("1.0")
    machine.gpus(T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine.report()
    assert found["answers"] == []
    (change,) = found["to_change"]
    assert change.startswith("install 1.0+llama4.1: this one is not patched, and no GPU tells")
    assert "no GPU to answer for: pass --gpu or --capability" in found["notes"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 60", "nvidia-smi gave no answer in 0.2 s"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "NVIDIA-SMI has failed"),
        ("echo 'No devices were found'", "nvidia-smi lists none"),
        ("exit 0", "nvidia-smi lists none"),
    ],
)
def test_nvidia_smi_is_no_good(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    """It is said, and all the rest is told."""
    if "sleep" in script:
        monkeypatch.setattr(probe, "NVIDIA_SMI_TIMEOUT", 0.2)
    machine.install("1.0")
    machine.script("nvidia-smi", script)
    ran = machine.doctor()
    assert ran.status == 1, ran.err
    assert said in words(ran.out)
    assert "upstream's, not patched" in words(ran.out)
    assert "To change: install 1.0+llama4.1: this one is not patched" in words(ran.out)


def test_drivers_that_do_not_know_the_capability(machine: Machine) -> None:
    """By name then; nothing is made up for a name that is unknown."""
    machine.install("1.0")
    body = 'case "$*" in *compute_cap*) echo "not a valid field"; exit 2;; esac\n'
    listed = "0, GPU-aaaa, Tesla T4\n1, GPU-dddd, Mystery 9\n"
    machine.script("nvidia-smi", f"{body}cat <<'END'\n{listed}END")
    found = machine.report()
    assert [gpu["capability"] for gpu in found["gpus"]] == ["7.5", ""]
    assert "Mystery 9: capability unknown; pass --capability" in found["notes"]
    assert [one["capability"] for one in found["answers"]] == ["7.5"]


def test_nvml_goes_before_nvidia_smi(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("pynvml")
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: b"Tesla T4",
        "nvmlDeviceGetCudaComputeCapability": lambda _: (7, 5),
        "nvmlDeviceGetUUID": lambda _: "GPU-aaaa",
    }
    for name, function in functions.items():
        setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    machine.gpus(A10)
    found = probe.devices()
    assert found.source == "NVML"
    assert found.found == (Device(0, "Tesla T4", "7.5", "GPU-aaaa"),)

    def broken() -> None:
        raise RuntimeError("driver/library version mismatch")

    monkeypatch.setattr(fake, "nvmlInit", broken)
    assert [device.name for device in probe.devices().found] == ["NVIDIA A10"]


GPUS = tuple(Device(index, "A10", "8.6", f"GPU-{index}{index}") for index in range(3))


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,7,1", [0]),
        ("GPU-1", [1]),
        ("GPU-", []),
        ("MIG-GPU-11/0/0", [0, 1, 2]),
    ],
)
def test_visible(setting: str | None, indices: list[int]) -> None:
    assert [device.index for device in visible(GPUS, setting)] == indices


def test_flashinfer(machine: Machine) -> None:
    machine.install("1.0")
    assert not machine.report("--gpu", "A10")["answers"][0]["settings"]["flashinfer"]
    (machine.site / "flashinfer").mkdir()
    (machine.site / "flashinfer/__init__.py").touch()
    assert machine.report("--gpu", "A10")["answers"][0]["settings"]["flashinfer"]


@pytest.mark.parametrize(
    ("value", "engine", "problems"),
    [
        ("0", "0", 0),
        ("1", "1", 0),
        ("2", "1", 0),
        (" 0", "0", 0),
        ("", "unset", 1),
        ("no", "unset", 1),
    ],
)
def test_use_v1(value: str, engine: str, problems: int) -> None:
    found, said = doctor.set_by({"VLLM_USE_V1": value}, Settings())
    assert found.v1 == engine
    assert len(said) == problems


def test_unknown_backend(patched: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH")
    (change,) = patched.report()["to_change"]
    assert "1.0 has no backend 'FLASH'" in change
    assert "unset VLLM_ATTENTION_BACKEND" in change


def test_what_the_matrix_does_not_count_with(
    patched: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_V1_USE_PREFILL_DECODE_ATTENTION", "1")
    (note,) = patched.report()["notes"]
    assert note == "VLLM_V1_USE_PREFILL_DECODE_ATTENTION is set; the matrix is made without"


def test_which_python(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This one if it has vLLM, else the active environment's, else the PATH's first."""
    first = machine.script("python3", "echo '[\"first\"]'")
    assert probe.choose_python(None, os.environ) == probe.Python(str(first), ("first",))
    active = machine.folder / "active"
    monkeypatch.setenv("VIRTUAL_ENV", str(active))
    assert probe.choose_python(None, os.environ).executable == str(first)
    active.mkdir()
    (machine.folder / "bin").rename(active / "bin")
    machine.folder.joinpath("bin").mkdir()
    machine.script("python3", "exit 1")
    (active / "bin/python3").rename(active / "bin/python")
    assert probe.choose_python(None, os.environ).executable == str(active / "bin/python")
    assert probe.choose_python(str(active), {}).executable == str(active / "bin/python")
    machine.install("1.0")
    monkeypatch.syspath_prepend(str(machine.site))
    assert probe.choose_python(None, os.environ).executable == sys.executable


@pytest.mark.parametrize("body", ["exit 3", "echo hello", "echo 7", "exec sleep 60"])
def test_python_that_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    if "sleep" in body:
        monkeypatch.setattr(probe, "PYTHON_TIMEOUT", 0.2)
    ran = machine.call("doctor", "--python", str(machine.script("none", body)))
    assert ran.status == 2
    assert "--python /path/to/venv/bin/python" in ran.err
    with pytest.raises(OverlayError):
        probe.ask_python(str(machine.folder / "gone"))


def test_real_python_is_asked() -> None:
    assert set(probe.ask_python(sys.executable).paths) <= {
        *sys.path,
        *map(os.path.abspath, sys.path),
    }


def test_vllm_is_not_imported(machine: Machine) -> None:
    machine.install("1.0")
    (machine.site / "vllm/__init__.py").write_text("raise SystemExit('imported')\n")
    found = probe.find_vllm([str(machine.site)])
    assert isinstance(found, PathDistribution)
    assert probe.inspect(found).damaged == ("vllm/__init__.py",)


def test_the_command_names_the_python_that_was_looked_at(machine: Machine) -> None:
    """As a shell takes it; not where `install` finds it by itself."""
    machine.install("1.0")
    machine.gpus(T4)
    elsewhere = machine.folder / "my python's"
    elsewhere.write_text(machine.python.read_text())
    elsewhere.chmod(0o755)
    ran = machine.call("doctor", "--python", str(elsewhere), "--dtype", "half")
    (command,) = re.findall(r"To change: install 1\.0\+llama4\.1: (.*)\n", ran.out)
    assert shlex.split(command) == ["vllm-overlay", "install", "--python", str(elsewhere)]
    machine.script("python3", f"echo '{json.dumps([str(machine.site)])}'")
    ran = machine.call("doctor", "--dtype", "half")
    assert "To change: install 1.0+llama4.1: vllm-overlay install\n" in ran.out


@pytest.mark.parametrize("label", ["cu118", "acme.1"])
def test_another_build(machine: Machine, label: str) -> None:
    """Patched with its label kept, if its Python files are upstream's."""
    path = machine.folder / f"vllm-1.0+{label}-cp38-abi3-manylinux1_x86_64.whl"
    write_wheel(path, f"1.0+{label}", {**package("1.0"), "vllm/_C.abi3.so": b"another"})
    machine.unpack(path)
    found = machine.report("--gpu", "T4", "--dtype", "half")
    command = machine.command("--other-build")
    assert found["vllm"]["kind"] == "foreign"
    assert found["to_change"] == [f"install 1.0+{label}.llama4.1: {command}"]
    assert any("upstream's Python files" in note for note in found["notes"])
    (change,) = machine.report()["to_change"]
    assert "is not patched" in change
    assert change.endswith(f"; {command}")
    workspace = machine.upstream.workspace()
    shutil.rmtree(machine.site)
    machine.unpack(build_from(workspace, path, machine.folder).path)
    found = machine.report("--gpu", "T4", "--dtype", "half")
    assert (found["vllm"]["kind"], found["to_change"]) == ("patched", [])


def test_no_matrix_is_said(machine: Machine) -> None:
    for path in (machine.upstream.root / "matrix").iterdir():
        path.unlink()
    machine.install("1.0")
    (change,) = machine.report("--gpu", "A10")["to_change"]
    assert "vllm-overlay matrix RELEASE --stock" in change
