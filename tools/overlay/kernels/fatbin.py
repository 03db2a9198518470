"""CUDA's fat binaries: what nvcc leaves of GPU code in a library.

They lie in the section `.nv_fatbin`, end to end or with zeros between them, one for each file that
was compiled (a unit):

- a header of 16 bytes: magic, version, its own size, and the size of all that follows;
- entries: a header of 64 bytes or more with kind, architecture, flags and sizes, then the code.

Code is a cubin, which is an ELF file with a section `.text.NAME` for each kernel, or PTX; it may be
compressed. NVIDIA describes none of this; it was compared with what its `cuobjdump` lists. What is
in `__nv_relfatbin` is for the linker: what comes of it is in `.nv_fatbin`.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import lz4.block
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

SECTION = ".nv_fatbin"
MAGIC, VERSION = 0xBA55ED50, 1
#: Magic, version, size of itself, size of the entries.
HEADER = struct.Struct("<LHHQ")
#: Kind, version, size of itself, stored size (padded); compressed size, where options are, the
#: version of the code (minor, major), architecture; where a name is and its length, flags; zero,
#: size when unpacked.
ENTRY = struct.Struct("<HHLQLLHHLLLQQQ")
KINDS: dict[int, Literal["ptx", "cubin"]] = {1: "ptx", 2: "cubin"}
#: Flags: for that architecture alone (`a`); how it is compressed.
EXACT, LZ4, ANY_COMPRESSION = 0x100000, 0x2000, 0xF000
#: Bytes of a cubin, unpacked; the largest in vLLM and torch has 71 MB.
MAX_CUBIN = 256 << 20
_KERNEL = re.compile(rb"(?<=\0)\.text\.([^\0]+)\0")


class DamagedError(ValueError):
    """It is no ELF file, or its fat binaries are not as they should be."""


@dataclass(frozen=True)
class Entry:
    """The code of a unit for one architecture."""

    kind: Literal["ptx", "cubin"]
    architecture: str
    """9.0, or 9.0a."""
    flags: int
    offset: int
    """Of the code in the library."""
    stored: int
    """Bytes of it in the library."""
    unpacked: int
    """Bytes of it when unpacked, if it is compressed."""


@dataclass(frozen=True)
class Unit:
    """What was compiled from one file."""

    entries: tuple[Entry, ...]

    @property
    def cubins(self) -> list[Entry]:
        """Machine code."""
        return [entry for entry in self.entries if entry.kind == "cubin"]

    @property
    def ptx(self) -> list[str]:
        """The architectures that there is PTX for."""
        return [entry.architecture for entry in self.entries if entry.kind == "ptx"]


def units(library: IO[bytes]) -> Iterator[Unit]:
    """The units of a library, of which only the headers are read; none if it has no GPU code.

    Raises:
        DamagedError: it is no library, or broken.
    """
    at, end = _fat_binaries(library)
    while (at := _after_padding(library, at, end)) < end:
        magic, version, header, size = HEADER.unpack(_read(library, at, HEADER.size))
        if (magic, version) != (MAGIC, VERSION) or header < HEADER.size:
            raise DamagedError(f"there is no fat binary at byte {at}")
        first, at = at + header, at + header + size
        if at > end:
            raise DamagedError(f"the fat binary before byte {at} is cut short")
        yield Unit(tuple(_entries(library, first, at)))


def _after_padding(library: IO[bytes], at: int, end: int) -> int:
    """Where the next fat binary is, from `at`: they are aligned, in libraries for aarch64."""
    while at < end:
        zeros = _read(library, at, min(8, end - at))
        if zeros.strip(b"\0"):
            return at
        at += len(zeros)
    return at


def _entries(library: IO[bytes], at: int, end: int) -> Iterator[Entry]:
    """The entries from byte `at` to `end`, but for kinds that no GPU runs."""
    while at < end:
        fields = ENTRY.unpack(_read(library, at, ENTRY.size))
        kind, _, header, stored, compressed, _, _, _, number, _, _, flags, _, unpacked = fields
        start, at = at + header, at + header + stored
        if header < ENTRY.size or at > end or compressed > stored:
            raise DamagedError(f"the code before byte {at} is cut short")
        if kind in KINDS:
            exact = "a" if flags & EXACT else ""
            architecture = f"{number // 10}.{number % 10}{exact}"
            size = compressed if flags & ANY_COMPRESSION else stored
            yield Entry(KINDS[kind], architecture, flags, start, size, unpacked)


def kernels(library: IO[bytes], cubin: Entry) -> frozenset[str]:
    """The mangled names of a cubin's kernels.

    Raises:
        DamagedError: it is broken, or compressed in a way that is not known here.
    """
    code = _unpacked(_read(library, cubin.offset, cubin.stored), cubin)
    return frozenset(name.decode("utf-8", "replace") for name in _KERNEL.findall(_names(code)))


def _unpacked(code: bytes, entry: Entry) -> bytes:
    if not entry.flags & ANY_COMPRESSION:
        return code
    if not entry.flags & LZ4 or entry.unpacked > MAX_CUBIN:
        raise DamagedError(
            f"the cubin at byte {entry.offset} is compressed in another way than LZ4, or too large"
        )
    try:
        unpacked: bytes = lz4.block.decompress(code, uncompressed_size=entry.unpacked)
    except lz4.block.LZ4BlockError as error:
        raise DamagedError(f"the cubin at byte {entry.offset} does not unpack") from error
    return unpacked


def _fat_binaries(library: IO[bytes]) -> tuple[int, int]:
    """Where the section begins and ends; it is empty if there is none."""
    try:
        found = ELFFile(library).get_section_by_name(SECTION)
    except (ELFError, ValueError, OverflowError) as error:
        raise DamagedError(f"it is no ELF file ({error})") from error
    if found is None:
        return 0, 0
    return found["sh_offset"], found["sh_offset"] + found["sh_size"]


def _names(cubin: bytes) -> bytes:
    """The names of a cubin's sections, which begin with a NUL and end with one.

    They are searched as they are: to make objects of the sections takes 30 times as long.
    """
    stream = io.BytesIO(cubin)
    try:
        file = ELFFile(stream)
        table = file.get_section(file.get_shstrndx())
    except (ELFError, ValueError, OverflowError) as error:
        raise DamagedError(f"a cubin is no ELF file ({error})") from error
    return _read(stream, table["sh_offset"], table["sh_size"])


def _read(stream: IO[bytes], at: int, size: int) -> bytes:
    """The bytes there.

    Raises:
        DamagedError: there are fewer.
    """
    end = stream.seek(0, os.SEEK_END)
    if at + size > end:
        raise DamagedError(f"it ends at byte {end}, and something is said to be at {at + size}")
    stream.seek(at)
    return stream.read(size)
