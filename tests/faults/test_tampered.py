"""Altered wheels: whatever is changed in one, by whoever knows how it is written, verify tells.

With the official wheel in the cache and without it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_upstream import Upstream
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.wheels import rawzip, record, simple_index, verify
from overlay.wheels.build import build_wheel
from overlay.wheels.rawzip import Member

INFO = "vllm-1.0+llama4.1.dist-info"
NAME = "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"
LOCAL, CENTRAL = 30, 46
PTH = b"import os; os.system('id')\n"

Bytes = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Built:
    """A wheel that was built, and the overlay that knows it."""

    path: Path
    upstream: Upstream
    empty: Path

    def workspace(self, has_official: bool) -> Workspace:
        """With the official wheel in the cache, or with nothing in it and no network."""
        if has_official:
            return self.upstream.workspace(offline=True)
        alone = Upstream(self.upstream.served, self.upstream.root, self.empty)
        return alone.workspace(offline=True)


@pytest.fixture(scope="module")
def built(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    workspace = patched.workspace()
    made = build_wheel(workspace, workspace.versions.get("1.0"), folder)
    return Built(made.path, patched, folder / "empty")


# -- the zip file, byte by byte


def end_of(data: bytes) -> int:
    return data.rindex(b"PK\x05\x06")


def directory_at(data: bytes) -> int:
    return int(struct.unpack_from("<L", data, end_of(data) + 16)[0])


def central(data: bytes) -> Iterator[tuple[int, str, int]]:
    """Offset of each entry of the directory, its name, and offset of its local header."""
    at = directory_at(data)
    while data[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<3H", data, at + 28)
        yield at, data[at + CENTRAL :][:name].decode(), struct.unpack_from("<L", data, at + 42)[0]
        at += CENTRAL + name + extra + comment


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def insert(data: bytes, at: int, new: bytes) -> bytes:
    """Put bytes in, and move what points behind them."""
    moved = bytearray(data)
    for entry, _, local in central(data):
        if local >= at:
            struct.pack_into("<L", moved, entry + 42, local + len(new))
    if directory_at(data) >= at:
        struct.pack_into("<L", moved, end_of(data) + 16, directory_at(data) + len(new))
    return bytes(moved[:at]) + new + bytes(moved[at:])


def entry_of(data: bytes, name: str) -> tuple[int, int]:
    return next((at, local) for at, each, local in central(data) if each == name)


def hidden(data: bytes = PTH, name: bytes = b"x.pth") -> bytes:
    """A local entry that no directory lists."""
    head = (20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0)
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", *head) + name + data


def second_local(data: bytes) -> int:
    return sorted(local for _, _, local in central(data))[1]


def local_field(offset: int, new: bytes, name: str = "vllm/__init__.py") -> Bytes:
    return lambda data: put(data, entry_of(data, name)[1] + offset, new)


def central_field(offset: int, new: bytes, name: str = "vllm/__init__.py") -> Bytes:
    return lambda data: put(data, entry_of(data, name)[0] + offset, new)


def local_extra(data: bytes) -> bytes:
    extra = b"\xfe\xca\x04\x00evil"
    local = entry_of(data, "vllm/__init__.py")[1]
    size = struct.unpack_from("<H", data, local + 26)[0]
    data = put(data, local + 28, struct.pack("<H", len(extra)))
    return insert(data, local + LOCAL + size, extra)


def central_grown(field: int, new: bytes) -> Bytes:
    """An extra field or a comment of an entry in the directory."""

    def change(data: bytes) -> bytes:
        at, _ = entry_of(data, "vllm/__init__.py")
        size = struct.unpack_from("<H", data, at + 28)[0]
        data = put(data, at + field, struct.pack("<H", len(new)))
        grown = data[: at + CENTRAL + size] + new + data[at + CENTRAL + size :]
        end = end_of(grown)
        was = struct.unpack_from("<L", grown, end + 12)[0]
        return put(grown, end + 12, struct.pack("<L", was + len(new)))

    return change


def swapped_directory(data: bytes) -> bytes:
    """Its first two entries; their local headers stay."""
    first, second, third = [at for at, _, _ in central(data)][:3]
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def archive_comment(data: bytes) -> bytes:
    end = end_of(data)
    return put(data, end + 20, struct.pack("<H", 4)) + b"evil"


def second_end(data: bytes) -> bytes:
    """Another end of the archive in the comment, for tools that look from the front."""
    end = data[end_of(data) :]
    return put(data, end_of(data) + 20, struct.pack("<H", len(end))) + end


def zip64(data: bytes) -> bytes:
    """Records that the directory does not need."""
    end = end_of(data)
    count = sum(1 for _ in central(data))
    size, at = struct.unpack_from("<2L", data, end + 12)
    large = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return data[:end] + large + locator + data[end:]


def recompressed(data: bytes) -> bytes:
    """A library's bytes as another deflate writes them."""
    return rewritten(data, compress={"vllm/_C.abi3.so": 1})


def deflated(name: str) -> Bytes:
    return lambda data: rewritten(data, compress={name: 9})


def executable(name: str) -> Bytes:
    return lambda data: rewritten(data, executables={name})


RAW: dict[str, Bytes] = {
    "a prefix": lambda data: b"#!/bin/sh\nid\n" + data,
    "a prefix that offsets know of": lambda data: insert(data, 0, b"#!/bin/sh\nid\n"),
    "bytes at the end": lambda data: data + b"evil",
    "a line at the end": lambda data: data + b"\n",
    "another archive at the end": lambda data: data + data,
    "a comment": archive_comment,
    "a second end in the comment": second_end,
    "zip64 records": zip64,
    "a hidden entry at the start": lambda data: insert(data, 0, hidden()),
    "a hidden entry between two": lambda data: insert(data, second_local(data), hidden()),
    "a hidden entry before the directory": lambda d: insert(d, directory_at(d), hidden()),
    "a hidden module of a name that is there":
        lambda d: insert(d, directory_at(d), hidden(PTH, b"vllm/__init__.py")),
    "bytes between two": lambda data: insert(data, second_local(data), b"\0" * 8),
    "bytes before the directory": lambda data: insert(data, directory_at(data), b"\0" * 8),
    "an extra field in a local header": local_extra,
    "an extra field in the directory": central_grown(30, b"\xfe\xca\x04\x00evil"),
    "a comment in the directory": central_grown(32, b"evil"),
    "the directory in another order": swapped_directory,
    "a local header with another crc": local_field(14, b"\1\2\3\4"),
    "a local header with another size": local_field(22, b"\1\0\0\0"),
    "a local header with another compressed size": local_field(18, b"\1\0\0\0"),
    "a local header with another method": local_field(8, b"\0\0"),
    "a local header with another time": local_field(10, b"\1\0"),
    "a local header with another date": local_field(12, b"\x21\x50"),
    "a local header with a data descriptor": local_field(6, b"\x08\0"),
    "a local header with another version": local_field(4, b"\x3f\0"),
    "another time in the directory": central_field(12, b"\1\0"),
    "another date in the directory": central_field(14, b"\x21\x50"),
    "mode 0777": central_field(38, struct.pack("<L", 0o100777 << 16)),
    "mode 0600": central_field(38, struct.pack("<L", 0o100600 << 16)),
    "set-uid": central_field(38, struct.pack("<L", 0o104755 << 16)),
    "no mode": central_field(38, b"\0\0\0\0"),
    "DOS attributes": central_field(38, struct.pack("<L", 0o100644 << 16 | 0x22)),
    "a symlink": central_field(38, struct.pack("<L", 0o120777 << 16)),
    "made on DOS": central_field(5, b"\0"),
    "made by another version": central_field(4, b"\x3f"),
    "internal attributes": central_field(36, b"\1\0"),
    "another disk": central_field(34, b"\1\0"),
    "a flag in the directory": central_field(8, b"\0\x08"),
    "an encrypted member": central_field(8, b"\1\0"),
    "a library executable": executable("vllm/_C.abi3.so"),
    "a module executable": executable("vllm/attention.py"),
    "a library compressed anew": recompressed,
    "a patched module compressed": deflated("vllm/attention.py"),
    "METADATA compressed": deflated(f"{INFO}/METADATA"),
    "RECORD compressed": deflated(f"{INFO}/RECORD"),
    "cut short": lambda data: data[:-5],
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda _: b"",
}  # fmt: skip


# -- its contents, written as build writes them, with a RECORD that fits

Files = dict[str, bytes]
Change = Callable[[Files], None]


def members_of(stream: io.BytesIO) -> list[Member]:
    return rawzip.members(stream, "it")


def rewritten(
    data: bytes,
    change: Change = lambda _: None,
    *,
    compress: dict[str, int] | None = None,
    executables: set[str] | None = None,
    fits: bool = True,
) -> bytes:
    """The wheel with other files, in its own writer's words: who alters it knows those."""
    stream = io.BytesIO(data)
    found = {member.name: member for member in members_of(stream)}
    old = {name: rawzip.read(stream, member) for name, member in found.items()}
    files = dict(old)
    change(files)
    if fits and list(files.items()) != list(old.items()):
        fit(files)
    out = io.BytesIO()
    writer = rawzip.Writer(out.write)
    for name, text in files.items():
        level = (compress or {}).get(name)
        is_executable = name in (executables or set())
        if name in found and files[name] == old[name] and level is None and not is_executable:
            writer.copy(stream, found[name], name)
            continue
        packer = zlib.compressobj(level or 9, zlib.DEFLATED, -15)
        packed = text if level is None else packer.compress(text) + packer.flush()
        method = zipfile.ZIP_STORED if level is None else zipfile.ZIP_DEFLATED
        one = Member(
            name, method, zlib.crc32(text), len(packed), len(text), 0, 0, is_executable
        )  # fmt: skip
        writer.copy(io.BytesIO(packed), one, name)
    writer.close()
    return out.getvalue()


def fit(files: Files) -> None:
    """Make RECORD say what is there."""
    name = f"{INFO}/RECORD"
    files.pop(name)
    rows = [record.line(each, data) for each, data in files.items()]
    files[name] = record.write([*rows, (name, "", "")])


def add(name: str, data: bytes) -> Change:
    """A file more, where build puts those of the package."""

    def change(files: Files) -> None:
        info = {each: files.pop(each) for each in list(files) if ".dist-info/" in each}
        files[name] = data
        files.update(info)

    return change


def replace(name: str, old: bytes, new: bytes) -> Change:
    def change(files: Files) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


def remove(name: str) -> Change:
    def change(files: Files) -> None:
        del files[name]

    return change


def rename(old: str, new: str) -> Change:
    def change(files: Files) -> None:
        items = list(files.items())
        files.clear()
        files.update((new if name == old else name, data) for name, data in items)

    return change


def exchange(files: Files) -> None:
    """The first two files, in another order."""
    items = list(files.items())
    files.clear()
    files.update([items[1], items[0], *items[2:]])


CONTENTS: dict[str, Change] = {
    "a .pth file": add("x.pth", PTH),
    "a module": add("vllm/backdoor.py", PTH),
    "a module of another package": add("torch/__init__.py", PTH),
    "a sitecustomize": add("sitecustomize.py", PTH),
    "bytecode": add("vllm/__pycache__/attention.cpython-312.pyc", PTH),
    "a script": add("vllm-1.0+llama4.1.data/scripts/vllm", PTH),
    "a file in bin": add("bin/vllm", PTH),
    "a second dist-info": add("vllm-1.0.dist-info/METADATA", b"Name: vllm\nVersion: 1.0\n"),
    "another package's dist-info": add("pip-99.dist-info/METADATA", b"Name: pip\n"),
    "a file in dist-info": add(f"{INFO}/INSTALLER", b"me\n"),
    "direct_url.json": add(f"{INFO}/direct_url.json", b"{}"),
    "a signature of RECORD": add(f"{INFO}/RECORD.jws", b"{}"),
    "another SBOM": add(f"{INFO}/sboms/other.cdx.json", b"{}"),
    "a library replaced": lambda files: files.update({"vllm/_C.abi3.so": PTH}),
    "a bit of a library":
        lambda files: files.update({"vllm/_C.abi3.so": b"\1" + files["vllm/_C.abi3.so"][1:]}),
    "a module changed": replace("vllm/__init__.py", b"\n", b"\nimport os\n"),
    "a patched module changed": replace("vllm/attention.py", b"import math", b"import cmath"),
    "a patch taken back": replace("vllm/attention.py", b", use_irope=False", b""),
    "code after the version": lambda files: files.update(
        {"vllm/_version.py": files["vllm/_version.py"] + PTH}
    ),
    "another version": replace(f"{INFO}/METADATA", b"+llama4.1", b"+llama4.2"),
    "a dependency": replace(f"{INFO}/METADATA", b"Version:", b"Requires-Dist: evil\nVersion:"),
    "an entry point": replace(f"{INFO}/entry_points.txt", b"vllm:main", b"os:abort"),
    "another tag": replace(f"{INFO}/WHEEL", b"cp38", b"cp39"),
    "a build number": replace(f"{INFO}/WHEEL", b"Tag:", b"Build: 2\nTag:"),
    "an SBOM without a patch": replace(f"{INFO}/sboms/vllm-overlay.cdx.json", b"llama4", b"llama5"),
    "an SBOM that is not UTF-8":
        lambda files: files.update({f"{INFO}/sboms/vllm-overlay.cdx.json": b"\xff\xfe{"}),
    "METADATA that is not UTF-8":
        lambda files: files.update({f"{INFO}/METADATA": files[f"{INFO}/METADATA"] + b"\xff"}),
    "a version module that is no Python":
        lambda files: files.update({"vllm/_version.py": b"def ("}),
    "no SBOM": remove(f"{INFO}/sboms/vllm-overlay.cdx.json"),
    "no METADATA": remove(f"{INFO}/METADATA"),
    "no WHEEL": remove(f"{INFO}/WHEEL"),
    "no library": remove("vllm/_C.abi3.so"),
    "no patched module": remove("vllm/attention.py"),
    "a module under another name": rename("vllm/__init__.py", "vllm/__main__.py"),
    "a name in other letters": rename("vllm/__init__.py", "vllm/__INIT__.py"),
    "a path that leaves the root": rename("vllm/__init__.py", "../vllm/__init__.py"),
    "an absolute path": rename("vllm/__init__.py", "/vllm/__init__.py"),
    "a file that is a folder, too": add("vllm/__init__.py/x", b""),
    "files in another order": exchange,
}  # fmt: skip


# -- RECORD alone

Text = Callable[[str], str]


def row_of(name: str, data: bytes) -> str:
    return ",".join(record.line(name, data)) + "\n"


def with_row(row: str) -> Text:
    """One row more, before RECORD's own."""
    return lambda text: text.replace(f"{INFO}/RECORD,,", f"{row}{INFO}/RECORD,,")


def field(name: str, form: str, new: str) -> Text:
    """A hash or a size that is another one."""

    def change(text: str) -> str:
        changed = re.sub(rf"(?m)^({re.escape(name)},){form}$", rf"\g<1>{new}", text)
        assert changed != text
        return changed

    return change


SHA512 = "sha512=" + base64.urlsafe_b64encode(hashlib.sha512(b"").digest()).rstrip(b"=").decode()
ROWS: dict[str, Text] = {
    "a row of torch's, which uninstalling would delete": with_row(row_of("torch/__init__.py", b"")),
    "a row of torch's with no hash": with_row("torch/__init__.py,,\n"),
    "a row that leaves the root": with_row("../../../bin/ls,,\n"),
    "a row of bytecode": with_row("vllm/__pycache__/a.cpython-312.pyc,,\n"),
    "a row of a script": with_row("bin/vllm,,\n"),
    "a row of an absolute path": with_row("/etc/passwd,,\n"),
    "a row of what installers write": with_row(f"{INFO}/INSTALLER,,\n"),
    "a row twice": with_row(row_of("vllm/__init__.py", b"")),
    "another hash": field("vllm/__init__.py", r"sha256=[^,]+,(\d+)", "sha256=" + "A" * 43 + r",\2"),
    "no hash": field("vllm/attention.py", r"sha256=[^,]+,\d+", ","),
    "a hash of another kind": field("vllm/attention.py", r"sha256=[^,]+,(\d+)", SHA512 + r",\2"),
    "no hash of a library": field("vllm/_C.abi3.so", r"sha256=[^,]+,\d+", ","),
    "another size": field("vllm/attention.py", r"(sha256=[^,]+),\d+", r"\2,1"),
    "no size": field("vllm/attention.py", r"(sha256=[^,]+),\d+", r"\2,"),
    "a hash of its own": field(f"{INFO}/RECORD", ",", "sha256=" + "A" * 43 + ",1"),
    "no row of a module": lambda text: re.sub(r"(?m)^vllm/__init__\.py,.*\n", "", text),
    "no row of its own": lambda text: text.replace(f"{INFO}/RECORD,,\n", ""),
    "no rows": lambda _: "",
    "rows in another order": lambda text: "".join(sorted(text.splitlines(True), reverse=True)),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "quotes": lambda text: re.sub(r"(?m)^(vllm/attention\.py),", r'"\1",', text),
    "an empty line": lambda text: text + "\n",
    "a row of four fields": lambda text: text.replace(f"{INFO}/RECORD,,", f"{INFO}/RECORD,,,"),
    "a NUL": lambda text: text + "\0",
}  # fmt: skip


def with_record(change: Text) -> Bytes:
    def apply(files: Files) -> None:
        name = f"{INFO}/RECORD"
        files[name] = change(files[name].decode()).encode()

    return lambda data: rewritten(data, apply, fits=False)


def with_contents(change: Change) -> Bytes:
    return lambda data: rewritten(data, change)


ALTERED: dict[str, Bytes] = {
    **RAW,
    **{name: with_contents(change) for name, change in CONTENTS.items()},
    **{f"RECORD with {name}": with_record(change) for name, change in ROWS.items()},
}

NAMES = {
    "another tag": NAME.replace("cp38", "cp39"),
    "another platform": NAME.replace("manylinux1", "manylinux2014"),
    "a build number": NAME.replace("-cp38", "-1-cp38"),
    "more tags": NAME.replace("manylinux1_x86_64", "manylinux1_x86_64.win_amd64"),
    "another spelling": NAME.replace("vllm", "VLLM"),
}


def problems(workspace: Workspace, path: Path) -> list[str]:
    """What verify says, however it ends."""
    try:
        checks = verify.verify(workspace, path)
    except OverlayError as error:
        return [] if error.status not in (Exit.INTEGRITY, Exit.USAGE) else [str(error)]
    return [problem for check in checks for problem in check.problems]


@pytest.mark.parametrize("has_official", [True, False], ids=["official", "alone"])
def test_what_was_built_is_verified(built: Built, has_official: bool) -> None:
    assert problems(built.workspace(has_official), built.path) == []


def test_the_tests_own_writer_writes_what_build_writes(built: Built) -> None:
    """So that nothing but what each test changes can be what is found."""
    data = built.path.read_bytes()
    assert rewritten(data) == data
    assert rewritten(data, fits=False) == data


@pytest.mark.parametrize("has_official", [True, False], ids=["official", "alone"])
@pytest.mark.parametrize("kind", ALTERED)
def test_altered(built: Built, tmp_path: Path, kind: str, has_official: bool) -> None:
    good = built.path.read_bytes()
    bad = ALTERED[kind](good)
    assert bad != good
    path = tmp_path / NAME
    path.write_bytes(bad)
    assert problems(built.workspace(has_official), path)


@pytest.mark.parametrize("has_official", [True, False], ids=["official", "alone"])
@pytest.mark.parametrize("kind", ALTERED)
def test_altered_and_not_locked(
    built: Built, tmp_path: Path, kind: str, has_official: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other checks do not lean on the sum. What a wheel that is alone can't tell is listed."""
    path = tmp_path / NAME
    path.write_bytes(ALTERED[kind](built.path.read_bytes()))
    monkeypatch.setattr(verify, "_sum", lambda *_: ())
    found = problems(built.workspace(has_official), path)
    assert bool(found) is (has_official or kind not in NEEDS_MORE)


NEEDS_MORE = {
    "a library executable",
    "a library compressed anew",
    "files in another order",
}
"""Told by the official wheel, or by the wheel's own sum, and by nothing else."""


@pytest.mark.parametrize("has_official", [True, False], ids=["official", "alone"])
@pytest.mark.parametrize("kind", NAMES)
def test_renamed(built: Built, tmp_path: Path, kind: str, has_official: bool) -> None:
    path = tmp_path / NAMES[kind]
    path.write_bytes(built.path.read_bytes())
    assert problems(built.workspace(has_official), path)


@pytest.mark.parametrize("kind", ["a hidden entry between two", "a .pth file", "a comment"])
def test_no_index_takes_it(built: Built, tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAME
    path.write_bytes(ALTERED[kind](built.path.read_bytes()))
    with pytest.raises(OverlayError):
        simple_index.write(built.workspace(False), tmp_path / "index", [path])
    assert not (tmp_path / "index/vllm" / NAME).exists()


@given(st.data())
def test_any_byte(built: Built, draw: st.DataObject) -> None:
    """Whichever it is, the sum tells; and the other checks too, but for compressed data, which may
    mean the same with another byte."""
    good = built.path.read_bytes()
    compressed = [
        range(each.offset, each.offset + each.compressed_size)
        for each in members_of(io.BytesIO(good))
        if each.method == zipfile.ZIP_DEFLATED
    ]
    at = draw.draw(st.integers(0, len(good) - 1))
    other = draw.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    path = built.empty.parent / "byte" / NAME
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(put(good, at, bytes([other])))
    assert problems(built.workspace(False), path)
    if not any(at in each for each in compressed):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(verify, "_sum", lambda *_: ())
            assert problems(built.workspace(False), path)
