"""Wheels and sdists that no honest project publishes: refused, and nothing is written.

Upstream's files are pinned by hash, so each comes with a lock made for it.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from made_upstream import SDIST, WHEEL, Upstream, package, pin, source_tree, write_wheel
from overlay.base.errors import OverlayError
from overlay.releases import archive
from overlay.wheels import rawzip, verify
from overlay.wheels.build import build_wheel

INFO = "vllm-1.0.dist-info"
#: Stands for the tool's own limits, to spare this machine's memory.
MEMBER, TOTAL = 1 << 20, 8 << 20


def repinned(upstream: Upstream, kind: str, data: bytes) -> None:
    """Serve other bytes as 1.0's wheel or sdist, and pin them."""
    file = upstream.served / (WHEEL if kind == "wheel" else SDIST)
    versions = upstream.root / "VERSIONS.toml"
    before = pin(file, kind, "1.0")
    file.write_bytes(data)
    text = versions.read_text()
    assert before in text
    versions.write_text(text.replace(before, pin(file, kind, "1.0")))
    shutil.rmtree(upstream.cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBER", MEMBER)
    monkeypatch.setattr(archive, "MAX_TOTAL", TOTAL)
    monkeypatch.setattr(rawzip, "MAX_READ", MEMBER)


def entries(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refusal(upstream: Upstream, dist: Path) -> str:
    """The error of a build, which must leave no wheel and write nothing else."""
    outside = dist.parent.parent
    before = entries(outside)
    workspace = upstream.workspace()
    try:
        said = f"built {build_wheel(workspace, workspace.versions.get('1.0'), dist)}"
        shutil.rmtree(dist)
    except OverlayError as error:
        said = f"{error.status.name} {error}"
    new = entries(outside) - before
    allowed = {upstream.cache, dist, dist.parent}
    assert not [p for p in new if upstream.cache not in p.parents and p not in allowed]
    assert not dist.exists() or not list(dist.iterdir())
    return said


def wrong(said: Mapping[str, str], cases: Mapping[str, tuple[object, str]]) -> dict[str, str]:
    """Where what was said is not an honest error with the reason expected."""
    return {
        what: said[what]
        for what, (_, why) in cases.items()
        if not re.match(f"(INTEGRITY|PATCH) .*({why})", said[what], re.DOTALL)
    }


# -- wheels: bytes to bytes, or members to members


def rezipped(change: Callable[[dict[str, bytes]], object]) -> Callable[[bytes], bytes]:
    """A wheel with other members, and a RECORD that is changed as `change` says or not at all."""

    def make(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = {name: file.read(name) for name in file.namelist()}
        change(members)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packing:
            for name, content in members.items():
                packing.writestr(name, content)
        return out.getvalue()

    return make


def listed(name: str) -> Callable[[bytes], bytes]:
    """A wheel with one more member, well listed in its RECORD."""

    def make(data: bytes) -> bytes:
        file = io.BytesIO()
        write_wheel(file, "1.0", {**package("1.0"), name: "x"})
        return file.getvalue()

    return make


def with_info(**changes: object) -> Callable[[bytes], bytes]:
    """A wheel with one more member that has these fields of a ZipInfo."""

    def make(data: bytes) -> bytes:
        out = io.BytesIO(data)
        info = zipfile.ZipInfo("vllm/more.py")
        for key, value in changes.items():
            setattr(info, key, value)
        with zipfile.ZipFile(out, "a") as packing:
            packing.writestr(info, b"/etc/passwd")
        return out.getvalue()

    return make


def central(pattern: bytes, at: int, form: str, *values: int) -> Callable[[bytes], bytes]:
    """A wheel whose central directory says `values` at byte `at` of the entry of a member."""

    def make(data: bytes) -> bytes:
        changed = bytearray(data)
        start = data.rindex(pattern) - 46
        assert data[start : start + 4] == b"PK\x01\x02"
        struct.pack_into(form, changed, start + at, *values)
        return bytes(changed)

    return make


def edit_record(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    name = f"{INFO}/RECORD"
    return rezipped(lambda m: m.update({name: change(m[name].decode()).encode()}))


def zip64(data: bytes) -> bytes:
    """A member whose sizes stand in a zip64 field and claim 5 GiB."""
    changed = bytearray(with_info(extra=struct.pack("<HHQQ", 1, 16, 5 << 30, 5 << 30))(data))
    start = bytes(changed).rindex(b"vllm/more.py") - 46
    struct.pack_into("<LL", changed, start + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    return bytes(changed)


def twice(data: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as packing, pytest.warns(UserWarning, match="Duplicate"):
        packing.writestr("vllm/attention.py", "other")
    return out.getvalue()


def renamed_locally(data: bytes) -> bytes:
    """The local header has another name than the central directory."""
    return data.replace(b"vllm/__init__.py", b"vllm/__evil__.py", 1)


def bomb(member: str) -> Callable[[bytes], bytes]:
    """A member that deflate has made as small as it can: 1000 to 1, honestly listed."""

    def make(data: bytes) -> bytes:
        file = io.BytesIO()
        write_wheel(file, "1.0", {**package("1.0"), member: b"\n" * (MEMBER + 1)})
        return file.getvalue()

    return make


def without(name: str) -> Callable[[bytes], bytes]:
    return rezipped(lambda m: m.pop(name))


ATTENTION = b"vllm/attention.py"
WHEELS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    **{
        f"a member {name!r}": (listed(name), "leaves its root or is no plain file name")
        for name in (
            "../evil.py", "/etc/evil", "a/../../evil", "vllm//x.py", "./x.py", "vllm/.", "vllm/..",
            "vllm\\x.py", "C:\\evil.py", "vllm/x\n.py", "vllm/\x1b[2J.py", ".git/hooks/x",
            "vllm/.GIT/config", "x" * 300, "vllm/",
        )
    },
    "a NUL in a name": (
        lambda d: with_info()(d).replace(b"vllm/more.py", b"vllm/mor\0.py"),
        "leaves its root or is no plain file name",
    ),
    "a file that is a folder": (listed("vllm/attention.py/x.py"), "is a file and a folder"),
    "a symlink": (with_info(external_attr=0o120777 << 16), "is no regular file"),
    "a device": (with_info(external_attr=0o060644 << 16), "is no regular file"),
    "a folder's mode": (with_info(external_attr=0o040755 << 16), "is no regular file"),
    "a member twice": (twice, "stands twice"),
    "another name in the local header": (renamed_locally, "has another name"),
    "an encrypted member": (central(ATTENTION, 8, "<H", 1), "is encrypted"),
    "an unknown method": (central(ATTENTION, 10, "<H", 97), "compressed by method 97"),
    "a size that cannot be": (central(ATTENTION, 24, "<L", 1 << 30), "cannot unpack to"),
    "a size that is not so": (central(ATTENTION, 24, "<L", 400), "is not what the archive says"),
    "a CRC that is not so": (central(ATTENTION, 16, "<L", 7), "is not what the archive says"),
    "members that overlap": (central(ATTENTION, 20, "<L", 1 << 20), "overlap|cut short"),
    "an offset beyond the end": (central(ATTENTION, 42, "<L", 1 << 28), "cannot be read"),
    "zip64 sizes": (zip64, "without zip64"),
    "zip64 without its field": (
        central(ATTENTION, 20, "<LL", 0xFFFFFFFF, 0xFFFFFFFF), "cannot be read|without zip64"
    ),
    "a bomb of METADATA": (bomb(f"{INFO}/METADATA"), "is too large"),
    "a bomb of a patched file": (bomb("vllm/attention.py"), "is too large|other text"),
    "no RECORD": (without(f"{INFO}/RECORD"), "there is no .*RECORD"),
    "no METADATA": (without(f"{INFO}/METADATA"), "there is no .*METADATA"),
    "no version": (without("vllm/_version.py"), "there is no vllm/_version.py"),
    "METADATA that is not UTF-8": (
        rezipped(lambda m: m.update({f"{INFO}/METADATA": b"\xff\xfe"})), "is not UTF-8"
    ),
    "RECORD that is not UTF-8": (
        rezipped(lambda m: m.update({f"{INFO}/RECORD": b"\xff\xfe"})), "is not UTF-8"
    ),
    "RECORD without a member": (
        edit_record(lambda t: re.sub(r"vllm/__init__.*\n", "", t)), "does not list vllm/__init__"
    ),
    "RECORD with another size": (
        edit_record(lambda t: re.sub(r"(vllm/__init__.*),\d+", r"\1,7", t)), "is wrong about"
    ),
    "RECORD without a hash": (
        edit_record(lambda t: re.sub(r"(vllm/__init__.py),[^,]*", r"\1,", t)), "is wrong about"
    ),
    "RECORD with a weak hash": (
        edit_record(lambda t: re.sub(r"(vllm/__init__.py),[^,]*", r"\1,md5=abc", t)),
        "is wrong about",
    ),
    "RECORD with a short line": (edit_record(lambda t: t + "x\n"), "RECORD is broken"),
    "RECORD with a member twice": (
        edit_record(lambda t: t + "vllm/__init__.py,,\n"), "lists vllm/__init__.py twice"
    ),
    "RECORD with an open quote": (edit_record(lambda t: t + '"x'), "RECORD is broken"),
    "RECORD with a NUL": (
        edit_record(lambda t: t + "\0,,\n"), "RECORD is broken|which is not in it"
    ),
    "RECORD with a file that is not there": (
        edit_record(lambda t: t + "vllm/gone.py,,\n"), "which is not in it"
    ),
    "no zip file": (lambda d: b"hello", "cannot be read as a zip file"),
    "an empty file's worth": (lambda d: b"PK\x05\x06" + bytes(18), "there is no|wheel"),
    "half of it": (lambda d: d[: len(d) // 2], "cannot be read as a zip file"),
}  # fmt: skip


def test_wheels(upstream: Upstream, tmp_path: Path) -> None:
    honest = (upstream.served / WHEEL).read_bytes()
    said = {}
    for number, (what, (make, _)) in enumerate(WHEELS.items()):
        repinned(upstream, "wheel", make(honest))
        said[what] = refusal(upstream, tmp_path / "dist" / str(number))
    assert wrong(said, WHEELS) == {}
    assert len(said) == 50


def unlock_sums(upstream: Upstream) -> None:
    """Forget what the patched wheels are."""
    pins = upstream.root / "VERSIONS.toml"
    pins.write_text(re.sub(r"(?m)^patched_.*\n", "", pins.read_text()))


def test_bytes_before_the_wheel_are_left_out(upstream: Upstream, tmp_path: Path) -> None:
    honest = (upstream.served / WHEEL).read_bytes()
    repinned(upstream, "wheel", b"#!/bin/sh\n" * 9 + honest)
    unlock_sums(upstream)
    workspace = upstream.workspace()
    built = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist")
    assert built.path.read_bytes().startswith(b"PK\x03\x04")


def test_a_hash_in_record_that_is_not_so_is_found(upstream: Upstream, tmp_path: Path) -> None:
    """By build if RECORD's digest is locked; if not, build takes it unread, and verify finds it."""
    wrong = edit_record(lambda t: re.sub(r"(vllm/__init__.py,sha256=).{43}", r"\1" + "A" * 43, t))
    repinned(upstream, "wheel", wrong((upstream.served / WHEEL).read_bytes()))
    assert "RECORD is not the one locked" in refusal(upstream, tmp_path / "a/dist")
    pins = upstream.root / "VERSIONS.toml"
    pins.write_text(re.sub(r"(?m)^record.*\n", "", pins.read_text()))
    unlock_sums(upstream)
    workspace = upstream.workspace()
    built = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist")
    problems = {check.name: check.problems for check in verify.verify(workspace, built.path)}
    assert "vllm/__init__.py" in " ".join(problems["RECORD"])


# -- sdists


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", 1, out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=form) as packing,
    ):
        for info, data in members:
            packing.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def honest() -> Iterable[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"vllm-1.0/{name}", text.encode()) for name, text in source_tree("1.0").items()]


def after_honest(name: str, data: bytes = b"x", **fields: object) -> bytes:
    return tar(*honest(), member(name, data, **fields))


def huge_header() -> bytes:
    """A pax header that claims 2 GiB, which a careless reader would allocate."""
    info = tarfile.TarInfo("vllm-1.0/x")
    info.type, info.size = tarfile.XHDTYPE, 2 << 30
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(MEMBER))


OUTSIDE, SPECIAL = "lies outside the archive's top folder", "is no regular file"
SDISTS: dict[str, tuple[bytes, str]] = {
    **{
        f"a member {name!r}": (after_honest(name), OUTSIDE)
        for name in (
            "../evil", "/etc/evil", "vllm-1.0/../evil", "vllm-1.0/a/../../../evil", "other/x",
            "vllm-1.0//x", "vllm-1.0/./x", "vllm-1.0", "vllm-1.0/a\\b", "vllm-1.0/a\nb",
            "vllm-1.0/.git/hooks/x", "vllm-1.0/vllm/.Git/config", "vllm-1.0/" + "x" * 300,
            "vllm-1.0/" + "x/" * 999 + "x", "vllm-1.0/\udcff",
        )
    },
    "a symlink": (after_honest("vllm-1.0/l", b"", type=tarfile.SYMTYPE, linkname="/etc"), SPECIAL),
    "a file below a symlink": (
        tar(*honest(), member("vllm-1.0/l", b"", type=tarfile.SYMTYPE, linkname="/tmp"),
            member("vllm-1.0/l/evil")), SPECIAL,
    ),
    "a hard link": (
        after_honest("vllm-1.0/l", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), SPECIAL
    ),
    "a pipe": (after_honest("vllm-1.0/p", b"", type=tarfile.FIFOTYPE), SPECIAL),
    "a device": (after_honest("vllm-1.0/d", b"", type=tarfile.CHRTYPE), SPECIAL),
    "a member twice": (after_honest("vllm-1.0/setup.py"), "it stands twice"),
    "a large member": (after_honest("vllm-1.0/x", bytes(MEMBER + 1)), "too large"),
    "large members": (
        tar(*(member(f"vllm-1.0/{n}", bytes(MEMBER)) for n in range(9))), "too large"
    ),
    "a large header": (huge_header(), "too large|cannot be read"),
    "a file and a folder": (
        tar(*honest(), member("vllm-1.0/vllm/attention.py/x")), "not the one pinned"
    ),
    "no member": (tar(), "not the one pinned|cannot use"),
    "another tree": (after_honest("vllm-1.0/more"), "not the one pinned"),
    "no gzip": (b"hello", "cannot be read as a gzipped tar"),
    "no tar": (gzip.compress(b"hello" * 999), "cannot be read as a gzipped tar"),
    "an empty gzip": (gzip.compress(b""), "cannot be read|not the one pinned"),
    "half of it": (tar(*honest())[:-200], "cannot be read as a gzipped tar"),
    "a number that is none": (
        gzip.compress(
            gzip.decompress(tar(*honest()))[:124] + b"nonsense\0\0\0\0" + bytes(2000)
        ), "cannot be read as a gzipped tar",
    ),
}  # fmt: skip


def test_sdists(upstream: Upstream, tmp_path: Path) -> None:
    said = {}
    for number, (what, (data, _)) in enumerate(SDISTS.items()):
        repinned(upstream, "sdist", data)
        said[what] = refusal(upstream, tmp_path / "dist" / str(number))
    assert wrong(said, SDISTS) == {}
    assert len(said) == 32
