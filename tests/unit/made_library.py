"""Made-up libraries with GPU code: ELF files with fat binaries, as nvcc leaves them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import lz4.block

from overlay.kernels import fatbin, needed

_ELF = struct.Struct("<16sHHLQQQLHHHHHH")
_SECTION = struct.Struct("<LLQQQQLLQQ")
_EXEC, _CUDA, _PROGBITS, _STRTAB = 2, 190, 1, 3


def elf(sections: Mapping[str, bytes], machine: int = 62) -> bytes:
    """A 64-bit ELF file of these sections."""
    names, body, headers = b"\0", b"", [bytes(_SECTION.size)]
    everything = {**sections, ".shstrtab": b""}
    for name in everything:
        names += name.encode() + b"\0"
    for name, data in everything.items():
        content = names if name == ".shstrtab" else data
        kind = _STRTAB if name == ".shstrtab" else _PROGBITS
        place = names.index(name.encode() + b"\0")
        at = _ELF.size + len(body)
        headers.append(_SECTION.pack(place, kind, 0, 0, at, len(content), 0, 0, 1, 0))
        body += content
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    at, count = _ELF.size + len(body), len(headers)
    head = _ELF.pack(ident, _EXEC, machine, 1, 0, 0, at, 0, _ELF.size, 0, 0, _SECTION.size, count,
                     count - 1)  # fmt: skip
    return head + body + b"".join(headers)


def cubin(*kernels: str) -> bytes:
    """A cubin with kernels of these mangled names."""
    return elf({f".text.{name}": b"code" for name in kernels}, _CUDA)


def mangled(name: str) -> str:
    """As a template of namespace vllm is: rms_norm_kernel -> _ZN4vllm15rms_norm_kernelIfEEvPT_."""
    return f"_ZN4vllm{len(name)}{name}IfEEvPT_"


def entry(architecture: str, code: bytes, *, kind: int = 2, lz4ed: bool = False) -> bytes:
    """The code of a unit for one architecture."""
    exact, number = architecture.endswith("a"), architecture.rstrip("a").replace(".", "")
    stored = lz4.block.compress(code, store_size=False) if lz4ed else code
    flags = 0x11 | fatbin.EXACT * exact | fatbin.LZ4 * lz4ed
    padded = stored + bytes(-len(stored) % 8)
    sizes = (len(stored), len(code)) if lz4ed else (0, 0)
    head = fatbin.ENTRY.pack(
        kind, 0x101, 72, len(padded), sizes[0], 0, 7, 1, int(number), 0, 0, flags, 0, sizes[1]
    )
    return head + bytes(8) + padded


def unit(*entries: bytes) -> bytes:
    """What is made of one file."""
    body = b"".join(entries)
    return fatbin.HEADER.pack(fatbin.MAGIC, fatbin.VERSION, fatbin.HEADER.size, len(body)) + body


def library(*units: bytes) -> bytes:
    """A shared library with that GPU code."""
    return elf({".text": b"host code", fatbin.SECTION: b"".join(units), ".data": b"data"})


def libraries(cubins: Sequence[str] = ("7.5", "8.0"), ptx: Sequence[str] = ()) -> dict[str, bytes]:
    """What a vLLM wheel has of them: every kernel needed, in one unit of each library."""
    found = {}
    for name in needed.LIBRARIES:
        code = cubin(*map(mangled, sorted(needed.names_in(name))))
        entries = [entry(one, code) for one in cubins]
        entries += [entry(one, b"text", kind=1) for one in ptx]
        found[name] = library(unit(*entries))
    return found
