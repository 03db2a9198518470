"""Copying zip members without recompressing them.

A vLLM wheel is 290 to 440 MB, most of it a handful of compiled libraries; a patched wheel
differs in a few kilobytes of Python. Members are therefore copied as the compressed bytes
they are. New and changed members are stored, not deflated: what zlib writes depends on
its version, and two builds anywhere must be byte-identical.
"""

from __future__ import annotations

import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from overlay.base.errors import Exit, OverlayError
from overlay.base.paths import is_safe_path

CHUNK = 1 << 20
Write = Callable[[bytes], object]
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
#: 1980-01-01 00:00, the oldest time a zip can hold.
_DATE, _TIME = (1 << 5) | 1, 0
_UNIX, _VERSION = 3, 20
_UTF8 = 0x800
_ENCRYPTED = 0x1
#: Beyond these a zip needs the zip64 extensions, which no vLLM wheel does.
_MAX_SIZE, _MAX_MEMBERS = 0xFFFFFFFF, 0xFFFF
#: deflate cannot expand by more than 1032 to 1.
_MAX_RATIO = 1033
#: Bytes of a member that is read whole: Python and metadata, the largest 3 MB in any vLLM wheel.
MAX_READ = 64 << 20


@dataclass(frozen=True)
class Member:
    """A member of an existing zip file."""

    name: str
    method: int
    crc: int
    compressed_size: int
    """Bytes in the archive."""
    size: int
    """Bytes when unpacked."""
    header_offset: int
    """Of its local header in the archive."""
    offset: int
    """Of the first compressed byte in the archive."""
    executable: bool


def members(stream: IO[bytes], name: str) -> list[Member]:
    """The members of the zip file `stream`, in the order of their data; `name` is for errors.

    Raises:
        OverlayError: no zip file, damaged, or with a member no honest wheel has: absolute,
            leaving its root, a symlink, a directory, encrypted, listed twice, overlapping, or
            claiming a size that deflate cannot reach.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
        found = [_member(stream, info) for info in infos]
    except (
        zipfile.BadZipFile, struct.error, OSError, NotImplementedError, ValueError, OverflowError
    ) as error:  # fmt: skip
        raise _refused(name, f"it cannot be read as a zip file ({error})") from error
    found.sort(key=lambda m: m.offset)
    for info in infos:
        if why := _why_refused(info):
            raise _refused(name, f"member {info.filename!r} {why}")
    if len({info.filename for info in infos}) != len(infos):
        raise _refused(name, "a member stands twice")
    if nested := _file_and_folder({info.filename for info in infos}):
        raise _refused(name, f"{nested!r} is a file and a folder")
    for one, following in itertools.pairwise(found):
        if one.offset + one.compressed_size > following.header_offset:
            raise _refused(name, f"members {one.name!r} and {following.name!r} overlap")
    return found


def _why_refused(info: zipfile.ZipInfo) -> str | None:
    kind = (info.external_attr >> 16) & 0o170000
    # The library cuts a name at a NUL; what it was stands in orig_filename.
    if not is_safe_path(info.orig_filename) or info.orig_filename != info.filename:
        return "leaves its root or is no plain file name"
    if kind not in (0, 0o100000):
        return "is no regular file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}"
    if max(info.file_size, info.compress_size, info.header_offset) >= _MAX_SIZE:
        return "is larger than any wheel without zip64"
    if info.file_size > max(info.compress_size, 1) * _MAX_RATIO:
        return "claims a size that its bytes cannot unpack to"
    return None


def _file_and_folder(names: set[str]) -> str | None:
    """A name that is also a folder of another one."""
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return min(names & folders, default=None)


def _refused(name: str, why: str) -> OverlayError:
    return OverlayError(
        f"{name} is refused", why, "Delete it and get it again from a source you trust",
        Exit.INTEGRITY,
    )  # fmt: skip


def _member(stream: IO[bytes], info: zipfile.ZipInfo) -> Member:
    stream.seek(info.header_offset)
    fields = _LOCAL.unpack(stream.read(_LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename!r}")
    offset = info.header_offset + _LOCAL.size + fields[9] + fields[10]
    # Tools that read front to back would see the other name.
    if stream.read(fields[9]) != info.orig_filename.encode(
        "utf-8" if fields[2] & _UTF8 else "cp437"
    ):
        raise zipfile.BadZipFile(f"the local header of {info.filename!r} has another name")
    return Member(
        info.filename,
        info.compress_type,
        info.CRC,
        info.compress_size,
        info.file_size,
        info.header_offset,
        offset,
        bool(info.external_attr >> 16 & 0o100),
    )


def chunks(stream: IO[bytes], member: Member) -> Iterator[bytes]:
    """The compressed bytes of `member`.

    Raises:
        zipfile.BadZipFile: the file ends before they do.
    """
    stream.seek(member.offset)
    left = member.compressed_size
    while left:
        data = stream.read(min(CHUNK, left))
        if not data:
            raise zipfile.BadZipFile(f"{member.name!r} is cut short")
        left -= len(data)
        yield data


def read(stream: IO[bytes], member: Member) -> bytes:
    """The unpacked bytes of a (small) member, checked against its CRC.

    Raises:
        zipfile.BadZipFile: damaged, or not of the size it claims.
    """
    if max(member.size, member.compressed_size) > MAX_READ:
        raise zipfile.BadZipFile(
            f"{member.name!r} is too large for what it is: {member.size} bytes"
        )
    raw = b"".join(chunks(stream, member))
    if member.method == zipfile.ZIP_DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            raw = unpacker.decompress(raw, member.size + 1)
        except zlib.error as error:
            raise zipfile.BadZipFile(f"{member.name!r}: {error}") from error
    if len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise zipfile.BadZipFile(f"{member.name!r} is not what the archive says it is")
    return raw


class DifferentError(Exception):
    """A file is not what is written; `at` is the first byte that differs."""

    def __init__(self, at: int) -> None:
        super().__init__(f"byte {at} differs")
        self.at = at


class Comparer:
    """Takes bytes as a file's `write` does, and compares them with a file that is there."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Begin at the start of `stream`, of which nobody else reads meanwhile."""
        self._stream, self._at = stream, 0
        stream.seek(0)

    def write(self, data: bytes) -> None:
        """Compare the next bytes.

        Raises:
            DifferentError: they are others, or fewer.
        """
        found = self._stream.read(len(data))
        if found != data:
            pairs = zip(found, data, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(data)))
            raise DifferentError(self._at + same)
        self._at += len(data)

    def close(self) -> None:
        """Compare the end.

        Raises:
            DifferentError: there is more.
        """
        if self._stream.read(1):
            raise DifferentError(self._at)


class Writer:
    """Writes a zip file front to back, each byte a function of its members alone.

    Times are 1980-01-01, modes 0644 (0755 where the source was executable), the creator is
    always Unix; there are no extra fields, data descriptors or comments. `write` gets every
    byte once, in order.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._at = 0
        self._directory: list[bytes] = []

    def copy(self, stream: IO[bytes], member: Member, name: str) -> None:
        """Add `member` of the zip file `stream` under `name`, its bytes as they are."""
        self._start(name, member.method, member.crc, member.compressed_size, member.size,
                    member.executable)  # fmt: skip
        for data in chunks(stream, member):
            self._put(data)

    def store(self, name: str, data: bytes) -> None:
        """Add `data` as the member `name`, uncompressed."""
        self._start(name, zipfile.ZIP_STORED, zlib.crc32(data), len(data), len(data), False)
        self._put(data)

    def close(self) -> None:
        """Write the central directory. Nothing may be added after it.

        Raises:
            OverflowError: it is too large for a zip file without zip64.
        """
        start, directory = self._at, b"".join(self._directory)
        count = len(self._directory)
        if start + len(directory) > _MAX_SIZE or count >= _MAX_MEMBERS:
            raise OverflowError("a wheel over 4 GiB or 65,534 members needs zip64")
        self._put(directory)
        self._put(_END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0))

    def _start(
        self, name: str, method: int, crc: int, compressed: int, size: int, executable: bool
    ) -> None:
        raw = name.encode()
        flags = 0 if name.isascii() else _UTF8
        common = (_VERSION, flags, method, _TIME, _DATE, crc, compressed, size, len(raw), 0)
        mode = (0o100755 if executable else 0o100644) << 16
        self._directory.append(
            _CENTRAL.pack(b"PK\x01\x02", _UNIX << 8 | _VERSION, *common, 0, 0, 0, mode, self._at)
            + raw
        )
        self._put(_LOCAL.pack(b"PK\x03\x04", *common) + raw)

    def _put(self, data: bytes) -> None:
        self._write(data)
        self._at += len(data)
