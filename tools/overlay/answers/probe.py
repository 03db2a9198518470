"""What is installed, plugged in and set on this machine. vLLM is not imported for it."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from overlay.answers import gpus
from overlay.base.errors import Exit, OverlayError
from overlay.base.journal import IN_SITE, Journal
from overlay.wheels import record

#: In dist-info: which file or folder a distribution was installed from, if not from an index.
ORIGIN = "direct_url.json"
#: Seconds that another Python has to start.
PYTHON_TIMEOUT = 30.0
#: Seconds; it takes one or two, and hangs where a driver does.
NVIDIA_SMI_TIMEOUT = 15.0


@dataclass(frozen=True)
class Python:
    """An interpreter, and where it imports from."""

    executable: str
    paths: tuple[str, ...]
    is_named: bool = False
    """Whether commands have to name it; else they find it themselves."""

    @property
    def flag(self) -> str:
        """What a command line says of it, after a blank: --python and its path; or nothing."""
        return f" --python {shlex.quote(self.executable)}" if self.is_named else ""


@dataclass(frozen=True)
class Installed:
    """vLLM in an environment."""

    version: str
    """Empty if its metadata has none."""
    folder: Path
    """What it lies in: site-packages."""
    bill: str | None
    """This overlay's SBOM, if it has one."""
    damaged: tuple[str, ...]
    """Python files that are missing or not as RECORD has them."""
    checked: int
    """Python files compared with RECORD; 0 if it has none."""
    info: str = ""
    """Name of its dist-info folder."""
    infos: tuple[str, ...] = ()
    """All dist-info folders of vLLM beside it, its own too."""
    interrupted: str | None = None
    """Which run of `install` was begun there and not ended: install, revert, repair, or empty if it
    had changed nothing yet."""
    changed_since: str | None = None
    """A file that somebody has changed since."""
    is_editable: bool = False
    """Whether its files are those of a source tree, of which RECORD says nothing."""
    has_originals: bool = False
    """Whether what `install` replaced is there."""
    lists_originals: bool = False
    """Whether RECORD lists that."""

    @property
    def is_in_place(self) -> bool:
        """Whether `install` patched it."""
        return self.has_originals or self.lists_originals

    def read(self, name: str) -> bytes | None:
        """A file below the folder; None if there is none."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None


@dataclass(frozen=True)
class Device:
    """A GPU as its driver tells."""

    index: int
    name: str
    capability: str
    """Empty if neither the driver nor the name tells."""
    uuid: str = ""


@dataclass(frozen=True)
class Devices:
    """The GPUs of this machine."""

    found: tuple[Device, ...]
    source: str
    """What told of them: NVML or nvidia-smi."""
    problem: str = ""
    """Why there are none."""


def choose_python(named: str | None, environ: Mapping[str, str]) -> Python:
    """The named Python or virtual environment's; else this one if it has vLLM, $VIRTUAL_ENV's, or
    the PATH's first.

    Raises:
        OverlayError: it can't be run.
    """
    this = Python(sys.executable, tuple(sys.path))
    if named:
        inside = Path(named, "bin", "python")
        return replace(ask_python(str(inside) if inside.is_file() else named), is_named=True)
    if find_vllm(this.paths):
        return this
    active = Path(environ.get("VIRTUAL_ENV") or os.devnull, "bin", "python")
    other = str(active) if active.is_file() else shutil.which("python3", path=environ.get("PATH"))
    return ask_python(other) if other and other != this.executable else this


def ask_python(executable: str) -> Python:
    """Where another interpreter imports from.

    Raises:
        OverlayError: it can't be run.
    """
    # The first entry is the folder of the command, which is no part of the environment.
    command = [executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PYTHON_TIMEOUT, check=True
        )
        return Python(executable, tuple(json.loads(done.stdout)))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        raise OverlayError(
            f"cannot look into the environment of {executable}", str(error),
            "Name the Python that vLLM runs on: --python /path/to/venv/bin/python", Exit.USAGE,
        ) from error  # fmt: skip


def find_vllm(paths: Sequence[str], project: str = "vllm") -> Distribution | None:
    """The first distribution of vLLM on an interpreter's paths; of several in a folder, the one
    that was patched there."""
    found = list(distributions(name=project, path=list(paths)))
    here = [each for each in found if each.locate_file("") == found[0].locate_file("")]
    return next((each for each in here if _is_in_place(each)), next(iter(found), None))


def _is_in_place(found: Distribution) -> bool:
    return Path(str(getattr(found, "_path", "")), record.ORIGINALS).exists()


def inspect(found: Distribution) -> Installed:
    """What the metadata of an installed vLLM says, and whether its files are as it says."""
    version = HeaderParser().parsestr(found.read_text("METADATA") or "")["Version"]
    folder = Path(str(found.locate_file("")))
    rows = dict(_record(found))
    python = [name for name in rows if name.endswith(".py")]
    damaged = [name for name in python if record.hash_of(folder / name) != rows[name]]
    info = Path(str(getattr(found, "_path", ""))).name
    kept, run = f"{info}/{record.ORIGINALS}", Journal(folder, folder / IN_SITE)
    return Installed(
        version or "", folder, found.read_text(f"sboms/{record.SBOM}"), tuple(damaged),
        len(python), info, dist_infos(folder, info.partition("-")[0]),
        run.label().split(" ")[-1] if run.is_left() else None, run.changed(),
        is_editable(folder / info), (folder / kept).exists(), kept in rows,
    )  # fmt: skip


def dist_infos(folder: Path, project: str) -> tuple[str, ...]:
    """Names of the dist-info folders of a project in a site-packages folder."""
    wanted = canonicalize_name(project)
    names = (path.name for path in folder.glob("*.dist-info"))
    return tuple(sorted(n for n in names if canonicalize_name(n.partition("-")[0]) == wanted))


def is_editable(info: Path) -> bool:
    """Whether the distribution of a dist-info folder is a source tree's files, left there."""
    try:
        origin = json.loads((info / ORIGIN).read_bytes())
        return bool(origin.get("dir_info", {}).get("editable"))
    except (OSError, ValueError, AttributeError):
        return False


def _record(found: Distribution) -> Iterator[tuple[str, str]]:
    """Path and hash of the files in RECORD. (`files` leaves out those that are missing.)"""
    for row in csv.reader((found.read_text("RECORD") or "").splitlines()):
        if len(row) == 3 and row[1].startswith("sha256="):
            yield row[0], row[1]


def has_flashinfer(paths: Sequence[str]) -> bool:
    """Whether vLLM could import FlashInfer: it only asks for the module."""
    return any(Path(path, "flashinfer", "__init__.py").is_file() for path in paths)


def devices() -> Devices:
    """The GPUs, from NVML if its bindings are installed, else from nvidia-smi."""
    return from_nvml() or from_nvidia_smi()


def from_nvml() -> Devices | None:
    """The GPUs that NVML tells of; None without it or where it fails."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no bindings, no library, no driver: nvidia-smi says it in words
        return None
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return Devices(
            tuple(
                Device(
                    index,
                    _text(nvml.nvmlDeviceGetName(handle)),
                    "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    _text(nvml.nvmlDeviceGetUUID(handle)),
                )
                for index, handle in enumerate(handles)
            ),
            "NVML",
        )
    except Exception:
        return None
    finally:
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def from_nvidia_smi() -> Devices:
    """The GPUs that nvidia-smi tells of; where it fails, why."""
    try:
        return _parsed(_nvidia_smi("index,uuid,name,compute_cap"))
    except OverlayError as error:
        problem = error.why
    except subprocess.CalledProcessError:
        # Drivers before 510 do not know compute_cap.
        try:
            return _parsed(_nvidia_smi("index,uuid,name"))
        except OverlayError as error:
            problem = error.why
        except subprocess.CalledProcessError as error:
            problem = f"nvidia-smi failed: {(error.stdout or error.stderr or '').strip()}"
    return Devices((), "nvidia-smi", " ".join(problem.split()))


def _nvidia_smi(fields: str) -> str:
    def failed(why: str) -> OverlayError:
        return OverlayError("cannot ask nvidia-smi", why, "Name the GPU: --gpu T4", Exit.USAGE)

    path = shutil.which("nvidia-smi")
    if path is None:
        raise failed("there is no nvidia-smi")
    command = [path, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        # No `with`, no run(): both would wait for a process that no signal ends.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise failed(f"nvidia-smi does not start: {error.strerror}") from error
    try:
        stdout, stderr = process.communicate(timeout=NVIDIA_SMI_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise failed(f"nvidia-smi gave no answer in {NVIDIA_SMI_TIMEOUT:g} s") from error
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stdout, stderr)
    return stdout


def _parsed(text: str) -> Devices:
    found = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) >= 3 and row[0].isdigit():
            capability = row[3] if len(row) > 3 else _by_name(row[2])
            found.append(Device(int(row[0]), row[2], capability, row[1]))
    problem = "" if found else "nvidia-smi lists none"
    return Devices(tuple(found), "nvidia-smi", problem)


def _by_name(name: str) -> str:
    try:
        return gpus.find(name).capability
    except OverlayError:
        return ""


def visible(found: Sequence[Device], setting: str | None) -> tuple[Device, ...]:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES, set to `setting`, leaves to a program.

    CUDA takes names up to the first that it does not know. What can't be matched here, a MIG
    slice, leaves all.
    """
    if setting is None:
        return tuple(found)
    chosen = list[Device]()
    for name in (part.strip() for part in setting.split(",")):
        if name.startswith("MIG-"):
            return tuple(found)
        one = [device for device in found if _is_called(device, name)]
        if len(one) != 1:
            break
        chosen += one
    return tuple(chosen)


def _is_called(device: Device, name: str) -> bool:
    return name == str(device.index) or (name.startswith("GPU-") and device.uuid.startswith(name))
