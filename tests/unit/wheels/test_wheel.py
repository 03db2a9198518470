"""Repacking: the same bytes every time, nothing else changed, and verify can tell."""

from __future__ import annotations

import hashlib
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from installer.sources import WheelFile

from made_upstream import WHEEL, Upstream, accept_use_irope, git, package, pin, write_wheel
from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.wheels import record, verify
from overlay.wheels.build import build_wheel

NAME = "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"


def build(upstream: Upstream, folder: Path) -> Path:
    workspace = upstream.workspace()
    return build_wheel(workspace, workspace.versions.get("1.0"), folder).path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_what_changes_and_what_does_not(upstream: Upstream, tmp_path: Path) -> None:
    path = build(upstream, tmp_path / "dist")
    assert path.name == NAME
    old = contents(upstream.served / WHEEL)
    new = contents(path)
    info = "vllm-1.0+llama4.1.dist-info"
    assert b"use_irope=False" in new["vllm/attention.py"]
    assert b"__version__ = version = '1.0+llama4.1'" in new["vllm/_version.py"]
    assert b"version_tuple = (1, 0, 'llama4.1')" in new["vllm/_version.py"]
    assert b"\nVersion: 1.0+llama4.1\n" in new[f"{info}/METADATA"]
    for name in ("vllm/_C.abi3.so", "vllm/__init__.py", "vllm/data/config.json"):
        assert new[name] == old[name]
    assert new[f"{info}/WHEEL"] == old["vllm-1.0.dist-info/WHEEL"]
    assert set(new) == {n.replace("vllm-1.0.dist-info", info) for n in old} | {
        f"{info}/sboms/vllm-overlay.cdx.json"
    }
    assert not any(name.startswith("tests/") for name in new)


def test_installer_accepts_it(upstream: Upstream, tmp_path: Path) -> None:
    with WheelFile.open(build(upstream, tmp_path)) as source:
        source.validate_record()
        assert source.version == "1.0+llama4.1"


def test_unchanged_members_keep_their_compressed_bytes(upstream: Upstream, tmp_path: Path) -> None:
    path = build(upstream, tmp_path)
    with zipfile.ZipFile(path) as archive:
        kinds = {i.filename: i.compress_type for i in archive.infolist()}
    assert kinds["vllm/_C.abi3.so"] == zipfile.ZIP_DEFLATED
    assert kinds["vllm/attention.py"] == zipfile.ZIP_STORED  # zlib's version must not matter


def test_two_builds_are_byte_identical(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(upstream, tmp_path / "one").read_bytes()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    old = os.umask(0o077)
    try:
        elsewhere = Upstream(upstream.served, upstream.root, tmp_path / "other-cache")
        other = build(elsewhere, tmp_path / "two").read_bytes()
    finally:
        os.umask(old)
        monkeypatch.undo()
        time.tzset()
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


def test_verify_is_clean(upstream: Upstream, tmp_path: Path) -> None:
    path = build(upstream, tmp_path)
    for workspace, official in ((upstream.workspace(), ["official wheel"]), (alone(upstream), [])):
        checks = verify.verify(workspace, path)
        assert [c.name for c in checks] == [
            "sha256", "zip file", "RECORD", "version", "patched files", "other files", *official,
            "SBOM",
        ]  # fmt: skip
        assert not any(c.problems for c in checks)


def alone(upstream: Upstream) -> Workspace:
    """The checkout, an empty cache and no network."""
    return Upstream(upstream.served, upstream.root, upstream.root / "none").workspace(offline=True)


def tampered(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Rewrite the wheel with honest zip structure and dishonest contents."""
    members = contents(path)
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def fix_record(members: dict[str, bytes]) -> None:
    info = "vllm-1.0+llama4.1.dist-info"
    lines = [",".join(record.line(n, d)) for n, d in members.items() if "RECORD" not in n]
    members[f"{info}/RECORD"] = ("\n".join([*lines, f"{info}/RECORD,,"]) + "\n").encode()


def edit(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[name] = data
        fix_record(members)

    return change


def swap(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        assert old in members[name]
        members[name] = members[name].replace(old, new)
        fix_record(members)

    return change


def drop(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        del members[name]
        fix_record(members)

    return change


INFO = "vllm-1.0+llama4.1.dist-info"


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda m: m.update({"vllm/__init__.py": b"x"}), "RECORD"),
        (edit(f"{INFO}/METADATA", b"Metadata-Version: 2.4\nName: vllm\nVersion: 1.0\n"), "version"),
        (edit("vllm/_version.py", b"__version__ = version = '1.0'\n"), "version"),
        (edit("vllm/attention.py", b"pass\n"), "patched files"),
        (drop("vllm/attention.py"), "patched files"),
        (edit("vllm/_C.abi3.so", b"\0"), "other files"),
        (edit("vllm/backdoor.py", b"import os\n"), "other files"),
        (edit("vllm/__pycache__/attention.cpython-312.pyc", b"compiled"), "other files"),
        (edit(f"{INFO}/INSTALLER", b"me\n"), "other files"),
        (edit(f"{INFO}/entry_points.txt", b"[console_scripts]\nls = vllm:main\n"), "other files"),
        (swap("vllm/attention.py", b"query * self.scale", b"query"), "patched files"),
        (swap("vllm/attention.py", b"import math", b"import os"), "other files"),
        (drop("vllm/__init__.py"), "other files"),
        (edit(f"{INFO}/sboms/vllm-overlay.cdx.json", b"{}"), "SBOM"),
        (drop(f"{INFO}/sboms/vllm-overlay.cdx.json"), "SBOM"),
    ],
)
def test_verify_finds(
    upstream: Upstream, tmp_path: Path, change: Callable[[dict[str, bytes]], None], check: str
) -> None:
    path = build(upstream, tmp_path)
    tampered(path, change)
    found = {c.name for c in verify.verify(upstream.workspace(), path) if c.problems}
    # Without the official wheel, a line that patches leave alone may be upstream's or not.
    assert found & {check, "patched files"}
    assert check in {c.name for c in verify.verify(alone(upstream), path) if c.problems}


def test_verify_states_both_sums(upstream: Upstream, tmp_path: Path) -> None:
    path = build(upstream, tmp_path)
    locked = hashlib.sha256(path.read_bytes()).hexdigest()
    tampered(path, edit("vllm/attention.py", b"pass\n"))
    (problem,) = verify.verify(alone(upstream), path)[0].problems
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert problem.startswith(f"it is {found}, ")
    assert f"VERSIONS.toml locks {locked}, " in problem


def test_verify_fetches_the_official_wheel_if_it_is_to(upstream: Upstream, tmp_path: Path) -> None:
    path = build(upstream, tmp_path)
    with pytest.raises(OverlayError, match="offline"):
        verify.verify(alone(upstream), path, official=True)
    elsewhere = Upstream(upstream.served, upstream.root, tmp_path / "cache").workspace()
    checks = verify.verify(elsewhere, path, official=True)
    assert "vllm-1.0-cp38" in checks[6].detail


def test_verify_needs_the_lock_of_upstreams_record(upstream: Upstream, tmp_path: Path) -> None:
    """As it is after a port, until `lock` has looked at the new release's wheel."""
    path = build(upstream, tmp_path)
    versions_file = upstream.root / "VERSIONS.toml"
    text, count = re.subn(r"^record(_python)? = .*\n", "", versions_file.read_text(), flags=re.M)
    assert count == 4  # two releases
    versions_file.write_text(text)
    (problem,) = (p for c in verify.verify(alone(upstream), path) for p in c.problems)
    assert problem.endswith("vllm-overlay lock 1.0")
    upstream.lock()
    assert not any(c.problems for c in verify.verify(alone(upstream), path))


def test_verify_refuses_a_foreign_wheel(upstream: Upstream) -> None:
    stock = upstream.served / WHEEL
    with pytest.raises(OverlayError, match="none of this overlay's wheels") as caught:
        verify.verify(upstream.workspace(), stock)
    assert caught.value.status is Exit.USAGE


def change_file(name: str, text: str) -> Callable[[Path], None]:
    def change(tree: Path) -> None:
        accept_use_irope(tree)
        (tree / name).write_text(text)

    return change


@pytest.mark.parametrize(
    "name", ["csrc/kernel.cu", "setup.py", "vllm/data/new.json", "vllm/_version.py"]
)
def test_what_repacking_cannot_do_is_refused(
    bare_upstream: Upstream, tmp_path: Path, name: str
) -> None:
    bare_upstream.patch("topic-a/1.0.patch", change_file(name, "changed\n"), series=("1.0",))
    bare_upstream.lock()
    with pytest.raises(OverlayError, match="which repacking cannot") as caught:
        build(bare_upstream, tmp_path / "dist")
    assert name in str(caught.value)
    assert "--source --target" in str(caught.value)
    assert not (tmp_path / "dist").exists()


def test_new_and_deleted_modules(bare_upstream: Upstream, tmp_path: Path) -> None:
    def change(tree: Path) -> None:
        (tree / "vllm/chunked.py").write_text("CHUNK = 8192\n")
        git(tree, "rm", "-q", "vllm/attention.py")

    bare_upstream.patch("topic-a/1.0.patch", change, series=("1.0",))
    bare_upstream.lock()
    path = build(bare_upstream, tmp_path)
    names = contents(path)
    assert names["vllm/chunked.py"] == b"CHUNK = 8192\n"
    assert "vllm/attention.py" not in names
    assert not any(c.problems for c in verify.verify(bare_upstream.workspace(), path))


def test_a_file_that_wheel_and_sdist_disagree_on_is_refused(
    upstream: Upstream, tmp_path: Path
) -> None:
    official = upstream.served / WHEEL
    repin(upstream, official, {**package("1.0"), "vllm/attention.py": "# other\n"})
    with pytest.raises(OverlayError, match="has other text there than the sdist"):
        build(upstream, tmp_path)


def repin(upstream: Upstream, path: Path, files: dict[str, str]) -> None:
    """Serve another official wheel, and pin it."""
    versions = upstream.root / "VERSIONS.toml"
    before = pin(path, "wheel", "1.0")
    write_wheel(path, "1.0", files)
    versions.write_text(versions.read_text().replace(before, pin(path, "wheel", "1.0")))


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "vllm//x.py", "vllm\\x.py"])
def test_members_that_leave_their_root_are_refused(
    upstream: Upstream, tmp_path: Path, name: str
) -> None:
    official = upstream.served / WHEEL
    repin(upstream, official, {**package("1.0"), name: "x"})
    with pytest.raises(OverlayError, match="leaves its root") as caught:
        build(upstream, tmp_path / "dist")
    assert caught.value.status is Exit.INTEGRITY
    assert list((tmp_path).rglob("evil*")) == []


@pytest.mark.parametrize("at", [60, -200])
def test_a_wheel_damaged_in_the_cache_leaves_nothing_behind(
    upstream: Upstream, tmp_path: Path, at: int
) -> None:
    workspace = upstream.workspace()
    release = workspace.versions.get("1.0")
    path = workspace.fetcher.fetch(release, "wheel")
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OverlayError) as caught:
        build(upstream, tmp_path / "dist")
    assert caught.value.status is Exit.INTEGRITY
    left = list((tmp_path / "dist").glob("*")) if (tmp_path / "dist").exists() else []
    assert left == []


def test_a_wheel_whose_record_is_not_the_one_locked_is_not_built(
    upstream: Upstream, tmp_path: Path
) -> None:
    official = upstream.served / WHEEL
    repin(upstream, official, {**package("1.0"), "vllm/more.py": "# another build's\n"})
    with pytest.raises(OverlayError, match="RECORD is not the one locked") as caught:
        build(upstream, tmp_path)
    assert caught.value.status is Exit.INTEGRITY


def test_an_unlocked_tree_is_not_built(bare_upstream: Upstream, tmp_path: Path) -> None:
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    with pytest.raises(OverlayError, match="not the one locked"):
        build(bare_upstream, tmp_path)
