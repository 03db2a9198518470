"""For which GPUs the libraries of a wheel have code: of the kernels needed, or of all of them."""

from __future__ import annotations

import re
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from overlay.base.console import Progress
from overlay.base.errors import Exit, OverlayError
from overlay.kernels import fatbin
from overlay.kernels.code import Code, code_of
from overlay.kernels.fatbin import Unit

Advance = Callable[[int], None]
_CHUNK = 1 << 20


def kernels_in(library: IO[bytes], names: Collection[str]) -> dict[str, set[Code]]:
    """The code of kernels by name, as `needed` has them; those that are not there are left out.

    A kernel may be compiled in several units, as a template is; a GPU runs it if it has code in
    each. They are equal almost always: then there is one.

    Raises:
        DamagedError: it is no library, or broken.
    """
    found: dict[str, set[Code]] = defaultdict(set)
    for unit in fatbin.units(library):
        for name, cubins in _holders(library, unit, names).items():
            found[name].add(code_of(cubins, unit.ptx))
    return dict(found)


def _holders(library: IO[bytes], unit: Unit, names: Collection[str]) -> Mapping[str, list[str]]:
    """The architectures of a unit's cubins by the names that are in them."""
    # In a mangled name, its length is before each part of it.
    wanted = {f"{len(name)}{name}": name for name in names}
    pattern = re.compile("|".join(wanted))
    holders: dict[str, list[str]] = defaultdict(list)
    for cubin in unit.cubins:
        text = "\n".join(fatbin.kernels(library, cubin))
        for part in set(pattern.findall(text)):
            holders[wanted[part]].append(cubin.architecture)
    return holders


def in_every_unit(library: IO[bytes]) -> set[Code]:
    """The code of each unit that has no more than another one: what serves them serves all.

    Raises:
        DamagedError: it is no library, or broken.
    """
    codes = {
        code_of([cubin.architecture for cubin in unit.cubins], unit.ptx)
        for unit in fatbin.units(library)
    }
    return {code for code in codes if not any(other.is_less_than(code) for other in codes)}


def each(
    wheel: Path, names: Sequence[str], folder: Path, progress: Progress, what: str
) -> Iterator[tuple[str, IO[bytes]]]:
    """The libraries of a wheel by name, each unpacked into an unnamed file on the disk of `folder`
    (a library has up to 1 GB) until the next one is.

    Raises:
        OverlayError: the wheel is damaged, or has no such library.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if missing := [name for name in names if name not in sizes]:
                raise broken(wheel.name, f"there is no {missing[0]} in it")
            total = sum(sizes[name] for name in names)
            with progress.bytes(what, total, 0) as advance:
                for name in names:
                    with tempfile.TemporaryFile(dir=folder) as library:
                        _unpack(archive, name, library, advance)
                        yield name, library
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise broken(wheel.name, str(error)) from error


def has(wheel: Path, name: str) -> bool:
    """Whether a wheel has a library.

    Raises:
        OverlayError: the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return name in archive.namelist()
    except zipfile.BadZipFile as error:
        raise broken(wheel.name, str(error)) from error


def _unpack(archive: zipfile.ZipFile, name: str, out: IO[bytes], advance: Advance) -> None:
    """Copy a member, which is checked against its CRC."""
    with archive.open(name) as member:
        while data := member.read(_CHUNK):
            out.write(data)
            advance(len(data))


def broken(name: str, why: str) -> OverlayError:
    """The error for a wheel whose libraries can't be read."""
    return OverlayError(
        f"cannot tell the GPUs of {name}", why,
        "Delete it and fetch it again; if it is whole, report it", Exit.INTEGRITY,
    )  # fmt: skip
