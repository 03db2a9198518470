"""GPUs by name: which CUDA compute capability each has."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from overlay.base.errors import Exit, OverlayError


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    name: str
    """As people call it, without the maker."""
    capability: str
    """Its compute capability, e.g. 7.5."""
    aliases: tuple[str, ...] = ()
    """Other names that `find` takes."""


def version(capability: str) -> tuple[int, int]:
    """A capability, comparable.

    >>> version("10.0") > version("9.0")
    True
    """
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def _geforce(capability: str, *numbers: str) -> tuple[Gpu, ...]:
    # The Ti, SUPER, D and laptop variants of a number share its capability.
    return tuple(Gpu(f"RTX {number}", capability, (number,)) for number in numbers)


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
    Gpu("GH200", "9.0"),
    Gpu("H20", "9.0"),
    Gpu("H100", "9.0"),
    Gpu("H200", "9.0"),
    Gpu("H800", "9.0"),
    Gpu("B200", "10.0"),
    Gpu("GB200", "10.0"),
    Gpu("B300", "10.3"),
    Gpu("GB300", "10.3"),
    *_geforce("12.0", "5050", "5060", "5070", "5080", "5090"),
    Gpu("RTX PRO 2000 Blackwell", "12.0", ("RTX PRO 2000",)),
    Gpu("RTX PRO 4000 Blackwell", "12.0", ("RTX PRO 4000",)),
    Gpu("RTX PRO 4500 Blackwell", "12.0", ("RTX PRO 4500",)),
    Gpu("RTX PRO 5000 Blackwell", "12.0", ("RTX PRO 5000",)),
    Gpu("RTX PRO 6000 Blackwell", "12.0", ("RTX PRO 6000",)),
    Gpu("GB10", "12.1", ("DGX Spark",)),
)
#: By capability, then name.
GPUS: tuple[Gpu, ...] = tuple(sorted(_TABLE, key=lambda gpu: (version(gpu.capability), gpu.name)))

#: What drivers put before a name. Quadro is none: Quadro RTX 6000 and RTX 6000 Ada differ.
_MAKERS = {"nvidia", "tesla", "geforce", "grid"}
#: What drivers put after it: form, memory, a slice, a variant. Numbers may stand there too.
_TAIL = re.compile(
    r"\d+|gb|g|sxm|pcie?|hbm|e|nvl|mig|ti|super|[bcdhmqs]|laptop|notebook|mobile|gpu|max|with|"
    r"design|generation|workstation|server|edition|sff|lhr"
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


_KNOWN = {"".join(_words(name)): gpu for gpu in GPUS for name in (gpu.name, *gpu.aliases)}


def find(name: str) -> Gpu:
    """The GPU called `name`, by a person or by its driver ("NVIDIA A100-SXM4-80GB").

    Raises:
        OverlayError: unknown, or said of several; near names are listed.
    """
    words = _words(name)
    for end in range(len(words), 0, -1):
        gpu = _KNOWN.get("".join(words[:end]))
        if gpu and all(map(_TAIL.fullmatch, words[end:])):
            return gpu
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
