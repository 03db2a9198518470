"""GPUs by name: which CUDA compute capability each has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from overlay.base.errors import Exit, OverlayError

#: What a GPU is sold in.
Host = Literal["x86_64", "aarch64", "jetson"]


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    name: str
    """As people call it, without the maker."""
    capability: str
    """Its compute capability, e.g. 7.5."""
    aliases: tuple[str, ...] = ()
    """Other names that `find` takes."""
    host: Host = "x86_64"
    """What it is sold in, if that is one: aarch64 with a Grace or GB10 processor, or a Jetson."""


def version(capability: str) -> tuple[int, int]:
    """A capability, comparable.

    >>> version("10.0") > version("9.0")
    True
    """
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def column(capability: str, columns: Sequence[str]) -> str | None:
    """Which of some capabilities answers for one: its own, else the next lower one of its major
    version, whose kernels it runs; None if there is none.

    >>> column("8.7", ("8.0", "8.6", "9.0")), column("10.0", ("8.0", "9.0"))
    ('8.6', None)
    """
    mine = version(capability)
    lower = [one for one in columns if version(one)[0] == mine[0] and version(one) <= mine]
    return max(lower, key=version, default=None)


def _geforce(capability: str, *numbers: str) -> tuple[Gpu, ...]:
    # The Ti, SUPER, D and laptop variants of a number share its capability.
    return tuple(Gpu(f"RTX {number}", capability, (number,)) for number in numbers)


#: What is to be known of a host that is no x86_64 server or desktop; `{}` are the releases with an
#: official wheel for it.
_HOSTS = {
    "aarch64": "its processor is 64-bit Arm. There is a wheel of {} for it (vllm-overlay build "
    "RELEASE --platform aarch64); others are to be built from source. The package index has no "
    "xformers and no Triton for it, and a torch without CUDA: this takes it that torch with CUDA "
    "and its Triton come from PyTorch's own. XFormers backends do not start. Nothing was run on "
    "one",
    "jetson": "the package index has no wheel for a Jetson; vllm-overlay install --other-build "
    "patches a build that has upstream's Python files. Nothing was run on one",
}


def host(name: str) -> Host:
    """What the GPU called `name` in the table is sold in."""
    return next((gpu.host for gpu in GPUS if gpu.name == name), "x86_64")


def caveat(name: str, for_arm: str) -> str:
    """What is to be known of that host; `for_arm` are the releases with a wheel for aarch64."""
    return _HOSTS.get(host(name), "").format(for_arm)


_TABLE = (
    Gpu("P100", "6.0"),
    Gpu("GTX 1080", "6.1"),
    Gpu("P4", "6.1"),
    Gpu("P40", "6.1"),
    Gpu("Quadro GV100", "7.0", ("GV100",)),
    Gpu("TITAN V", "7.0"),
    Gpu("V100", "7.0", ("V100S",)),
    Gpu("GTX 1650", "7.5"),
    Gpu("GTX 1660", "7.5"),
    Gpu("Quadro RTX 3000", "7.5", ("RTX 3000",)),
    Gpu("Quadro RTX 4000", "7.5"),
    Gpu("Quadro RTX 5000", "7.5"),
    Gpu("Quadro RTX 6000", "7.5"),
    Gpu("Quadro RTX 8000", "7.5", ("RTX 8000",)),
    *_geforce("7.5", "2060", "2070", "2080"),
    Gpu("T4", "7.5", ("T4G",)),
    Gpu("T1000", "7.5", ("Quadro T1000",)),
    Gpu("TITAN RTX", "7.5"),
    Gpu("A30", "8.0"),
    Gpu("A100", "8.0", ("A100X",)),
    Gpu("A800", "8.0"),
    Gpu("A2", "8.6"),
    Gpu("A10", "8.6"),
    Gpu("A10G", "8.6"),
    Gpu("A16", "8.6"),
    Gpu("A40", "8.6"),
    *_geforce("8.6", "3050", "3060", "3070", "3080", "3090"),
    Gpu("RTX A2000", "8.6", ("A2000",)),
    Gpu("RTX A4000", "8.6", ("A4000",)),
    Gpu("RTX A4500", "8.6", ("A4500",)),
    Gpu("RTX A5000", "8.6", ("A5000",)),
    Gpu("RTX A5500", "8.6", ("A5500",)),
    Gpu("RTX A6000", "8.6", ("A6000",)),
    Gpu("L4", "8.9"),
    Gpu("L20", "8.9"),
    Gpu("L40", "8.9", ("L40G",)),
    Gpu("L40S", "8.9"),
    Gpu("RTX 2000 Ada", "8.9"),
    *_geforce("8.9", "4050", "4060", "4070", "4080", "4090"),
    Gpu("RTX 4000 Ada", "8.9", ("RTX 4000 SFF Ada",)),
    Gpu("RTX 4500 Ada", "8.9"),
    Gpu("RTX 5000 Ada", "8.9"),
    Gpu("RTX 6000 Ada", "8.9", ("6000 Ada",)),
    Gpu("GH200", "9.0", host="aarch64"),
    Gpu("H20", "9.0"),
    Gpu("H100", "9.0"),
    Gpu("H200", "9.0"),
    Gpu("H800", "9.0"),
    Gpu("B200", "10.0"),
    Gpu("GB200", "10.0", host="aarch64"),
    Gpu("B300", "10.3"),
    Gpu("GB300", "10.3", host="aarch64"),
    *_geforce("12.0", "5050", "5060", "5070", "5080", "5090"),
    Gpu("RTX PRO 2000 Blackwell", "12.0", ("RTX PRO 2000",)),
    Gpu("RTX PRO 4000 Blackwell", "12.0", ("RTX PRO 4000",)),
    Gpu("RTX PRO 4500 Blackwell", "12.0", ("RTX PRO 4500",)),
    Gpu("RTX PRO 5000 Blackwell", "12.0", ("RTX PRO 5000",)),
    Gpu("RTX PRO 6000 Blackwell", "12.0", ("RTX PRO 6000",)),
    Gpu("GB10", "12.1", ("DGX Spark",), host="aarch64"),
    Gpu("Jetson Xavier", "7.2", ("Xavier", "Jetson AGX Xavier", "Jetson Xavier NX"), "jetson"),
    Gpu(
        "Jetson Orin",
        "8.7",
        ("Orin", "Jetson AGX Orin", "AGX Orin", "Jetson Orin NX", "Jetson Orin Nano"),
        "jetson",
    ),
    Gpu("Jetson Thor", "11.0", ("Thor", "Jetson AGX Thor", "AGX Thor"), "jetson"),
)
#: By capability, then name.
GPUS: tuple[Gpu, ...] = tuple(sorted(_TABLE, key=lambda gpu: (version(gpu.capability), gpu.name)))

#: What drivers put before a name. Quadro is none: Quadro RTX 6000 and RTX 6000 Ada differ.
_MAKERS = {"nvidia", "tesla", "geforce", "grid"}
#: What drivers put after it: form, memory, a slice, a variant. Numbers may stand there too.
_TAIL = re.compile(
    r"\d+|gb|g|pg|sxm|pcie?|hbm|e|nvl|mig|ti|super|[bcdhmqs]|laptop|notebook|mobile|gpu|max|with|"
    r"design|generation|workstation|server|edition|sff|lhr|nvgpu|developer|kit"
)


def _words(name: str) -> list[str]:
    """The words and numbers of a name, without its makers.

    >>> _words("NVIDIA GeForce RTX4090-Ti")
    ['rtx', '4090', 'ti']
    """
    parts = re.findall(r"[a-z]+|\d+", name.casefold())
    while parts and parts[0] in _MAKERS:
        del parts[0]
    return parts


#: What is no NVIDIA GPU, by words of its name, and why this overlay says nothing of it.
_OTHERS = (
    (
        r"\b(amd|instinct|radeon|mi\d{2,3}[ax]?|rx|gfx\d+)\b",
        "it runs ROCm: vLLM for it is another build, with attention backends of its own",
    ),
    (
        r"\b(intel|arc|gaudi\d?|hpu|xpu|ponte|xeon)\b",
        "vLLM for Intel's GPUs, Gaudi and CPUs is another build, with backends of its own",
    ),
    (r"\b(tpu|v[2-6][ep]?)\b", "vLLM for TPUs is another build, in which XLA computes attention"),
    (r"\b(trainium\d?|trn\d|inferentia\d?|inf\d)\b", "vLLM for Neuron is another build"),
    (
        r"\b(cpu|epyc|ryzen|apple|m[1-5]|mps)\b",
        "vLLM for CPUs is another build, with backends of its own",
    ),
)


_KNOWN = {"".join(_words(name)): gpu for gpu in GPUS for name in (gpu.name, *gpu.aliases)}


def find(name: str) -> Gpu:
    """The GPU called `name`, by a person or by its driver ("NVIDIA A100-SXM4-80GB").

    Raises:
        OverlayError: unknown, or said of several (near names are listed), or no NVIDIA GPU.
    """
    words = _words(name)
    for end in range(len(words), 0, -1):
        gpu = _KNOWN.get("".join(words[:end]))
        if gpu and all(map(_TAIL.fullmatch, words[end:])):
            return gpu
    why = next((why for pattern, why in _OTHERS if re.search(pattern, name.casefold())), None)
    if why:
        raise OverlayError(
            f"{name!r} is not covered", f"{why}, and nothing of it was run with these patches",
            "Use an NVIDIA GPU, or a vLLM after 0.11.0, whose V1 attends within chunks", Exit.USAGE,
        )  # fmt: skip
    near = ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in _near(words))
    raise OverlayError(
        f"unknown GPU {name!r}",
        f"near it are {near}" if near else "no name in the table is near it",
        "Name one that is known, or pass its compute capability, such as --capability 7.5",
        Exit.USAGE,
    )


def _near(words: list[str]) -> list[Gpu]:
    """At most six: those that have all of these words, else names spelt alike."""
    sharing = [gpu for gpu in GPUS if words and set(words) <= set(_words(gpu.name))]
    alike = difflib.get_close_matches("".join(words), _KNOWN, n=3, cutoff=0.5)
    return (sharing or list(dict.fromkeys(_KNOWN[key] for key in alike)))[:6]
