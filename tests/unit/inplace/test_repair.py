"""Repair: what was patched in place is whole again, from what lies in site-packages."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream, accept_use_irope
from overlay.base.errors import Exit, OverlayError
from overlay.base.journal import IN_SITE, Journal
from overlay.inplace import site_files
from overlay.wheels import record
from overlay.wheels.build import build_wheel

from ..made_matrix import keep
from .test_inplace import (
    INFO,
    PATCHED,
    Change,
    Place,
    broken,
    each,
    edit,
    environments,
    make_place,
    place,
    put,
    remove,
    replace_a_module,
)

__all__ = ["each", "environments", "place"]
ORIGINALS = f"{PATCHED}/{record.ORIGINALS}"
REINSTALL = "pip install --force-reinstall --no-deps 'vllm==1.0', then vllm-overlay install"


@pytest.fixture
def patched(each: Place) -> Place:
    keep(each.upstream.root, "1.0", "1.1")
    each.install()
    assert each.doctor() == ()
    return each


def drop_row(name: str) -> Change:
    def change(site: Path) -> None:
        file = site / PATCHED / "RECORD"
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(f"{name},")]
        assert len(kept) == len(lines) - 1
        file.write_text("".join(kept))

    return change


def adapt(name: str, data: bytes) -> Change:
    """Another file, honestly recorded."""

    def change(site: Path) -> None:
        drop_row(name)(site)
        (site / name).write_bytes(data)
        with (site / PATCHED / "RECORD").open("ab") as file:
            file.write(record.write([record.line(name, data)]))

    return change


def both(*changes: Change) -> Change:
    def change(site: Path) -> None:
        for one in changes:
            one(site)

    return change


def put_back(site: Path) -> None:
    """The original, as an interrupted reinstallation may leave it."""
    with zipfile.ZipFile(site / ORIGINALS) as archive:
        (site / "vllm/attention.py").write_bytes(archive.read("vllm/attention.py"))


def half_of_the_old(site: Path) -> None:
    """What a run that was killed leaves, once somebody deletes its journal."""
    (site / INFO).mkdir()
    (site / INFO / "METADATA").write_text("Name: vllm\nVersion: 1.0\n")


HEALED = {
    "a patched file is gone": remove("vllm/attention.py"),
    "a patched file is changed": edit("vllm/attention.py", b"pass\n"),
    "a patched file is upstream's": put_back,
    "its row is adapted": adapt("vllm/attention.py", b"pass\n"),
    "the version is changed": edit("vllm/_version.py", b"__version__ = '1'\n"),
    "its row is gone": drop_row("vllm/attention.py"),
    "another row is gone": drop_row("vllm/__init__.py"),
    "the row of the originals is gone": drop_row(ORIGINALS),
    "RECORD is gone": remove(f"{PATCHED}/RECORD"),
    "RECORD is no RECORD": edit(f"{PATCHED}/RECORD", b"nothing\n"),
    "METADATA is gone": remove(f"{PATCHED}/METADATA"),
    "METADATA has another version": edit(f"{PATCHED}/METADATA", b"Name: vllm\nVersion: 1.1\n"),
    "the SBOM is gone": remove(f"{PATCHED}/sboms/vllm-overlay.cdx.json"),
    "the SBOM is damaged": edit(f"{PATCHED}/sboms/vllm-overlay.cdx.json", b"{}"),
    "there is another dist-info": half_of_the_old,
    "much of it": broken,
}


@pytest.mark.parametrize("change", HEALED.values(), ids=HEALED.keys())
def test_doctor_names_it_and_it_heals(patched: Place, change: Change) -> None:
    whole = patched.files
    change(patched.site)
    (said,) = patched.doctor()
    assert said.startswith("repair it: ")
    assert said.endswith("; vllm-overlay install --repair")
    done = patched.repair()
    assert (done.action, done.after, done.recovered) == ("repaired", "1.0+llama4.1", False)
    assert done.files
    assert patched.files == whole
    assert patched.doctor() == ()
    assert patched.repair().action == "nothing"
    patched.revert()


def test_new_and_deleted_modules(bare_upstream: Upstream, environments: Path) -> None:
    """Those that patches add come again, and those that they delete go again."""
    bare_upstream.patch("topic-a/1.0.patch", replace_a_module, series=("1.0",))
    bare_upstream.lock()
    place = make_place(bare_upstream, environments / "uv")
    place.install()
    whole = place.files
    shutil.rmtree(place.site / "vllm/new")
    put_back(place.site)
    assert place.repair().files == {"vllm/attention.py": "D", "vllm/new/chunked.py": "A"}
    assert place.files == whole


def test_stale_bytecode_goes(patched: Place) -> None:
    cached = patched.site / "vllm/__pycache__/attention.cpython-312.pyc"
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(b"of another text")
    (patched.site / "vllm/attention.py").write_text("pass\n")
    patched.repair()
    assert not cached.exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (remove(ORIGINALS), "is not what was kept of upstream's files (it is missing)"),
        (edit(ORIGINALS, b"no zip"), "is not what was kept of upstream's files (File is not a zip"),
        (both(remove(ORIGINALS), remove("vllm/attention.py")), "(it is missing)"),
        (edit("vllm/__init__.py", b"pass\n"), "not upstream's are vllm/__init__.py, which"),
        (adapt("vllm/__init__.py", b"pass\n"), "not upstream's are vllm/__init__.py, which"),
        (remove("vllm/data/config.json"), "not upstream's are vllm/data/config.json, which"),
        (remove(f"{PATCHED}/WHEEL"), f"not upstream's are {INFO}/WHEEL, which"),
        (edit("vllm/_C.abi3.so", b"\0"), "not upstream's are vllm/_C.abi3.so, which"),
    ],
)
def test_what_is_lost_is_refused_with_what_heals(patched: Place, change: Change, why: str) -> None:
    change(patched.site)
    before = patched.files
    with pytest.raises(OverlayError) as caught:
        patched.repair()
    assert why in str(caught.value)
    assert REINSTALL in str(caught.value)
    assert "==1.0+" not in str(caught.value)
    assert caught.value.status is Exit.INTEGRITY
    assert patched.files == before


@pytest.mark.parametrize("name", [ORIGINALS, "vllm/__init__.py"])
def test_pip_can_not_uninstall_what_has_no_record(patched: Place, name: str) -> None:
    """So the command is another one."""
    remove(name)(patched.site)
    remove(f"{PATCHED}/RECORD")(patched.site)
    with pytest.raises(OverlayError) as caught:
        patched.repair()
    command = f"rm -r {patched.site / PATCHED} && pip install --no-deps 'vllm==1.0'"
    assert f"{command}, then vllm-overlay install" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "command"),
    [
        (remove(ORIGINALS), REINSTALL),
        (edit("vllm/__init__.py", b"pass\n"), REINSTALL),
        (adapt("vllm/__init__.py", b"pass\n"), REINSTALL),
        (both(edit("vllm/__init__.py", b"pass\n"), remove(f"{PATCHED}/RECORD")), "rm -r "),
    ],
)
def test_doctor_names_what_heals_where_repair_does_not(
    patched: Place, change: Change, command: str
) -> None:
    change(patched.site)
    (said,) = {each.rpartition("; ")[2] for each in patched.doctor()}
    assert said.startswith(command)
    assert said.endswith("'vllm==1.0', then vllm-overlay install")


def test_what_others_say_of_it(patched: Place) -> None:
    """`install` and `revert` name the repair, and no version that no index has."""
    (patched.site / "vllm/attention.py").write_text("pass\n")
    for what in (patched.install, patched.revert):
        with pytest.raises(OverlayError, match="vllm-overlay install --repair") as caught:
            what()
        assert "==1.0+" not in str(caught.value)
    (patched.site / "vllm/__init__.py").write_text("pass\n")
    with pytest.raises(OverlayError) as caught:
        patched.install()
    assert REINSTALL in str(caught.value)
    (patched.site / PATCHED / "RECORD").unlink()
    with pytest.raises(OverlayError, match="vllm-overlay install --repair"):
        patched.install()


def test_not_patched(place: Place) -> None:
    with pytest.raises(OverlayError, match="is not of a patched vLLM") as caught:
        place.repair()
    assert str(caught.value).endswith("Patch it: vllm-overlay install.")
    assert caught.value.status is Exit.USAGE


def test_a_patched_wheel_kept_nothing(upstream: Upstream, tmp_path: Path) -> None:
    workspace = upstream.workspace()
    built = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist")
    place = Place(upstream, put("uv", built.path, tmp_path / "venv"))
    (place.site / "vllm/attention.py").unlink()
    with pytest.raises(OverlayError, match="installed as a patched wheel") as caught:
        place.repair()
    assert "vllm-overlay build 1.0, and install that wheel" in str(caught.value)
    with pytest.raises(OverlayError, match=r"vllm-overlay build 1\.0, and install that wheel"):
        place.install()


def test_another_revision(patched: Place) -> None:
    toml = patched.upstream.root / "VERSIONS.toml"
    toml.write_text(toml.read_text().replace("revision = 1", "revision = 2"))
    with pytest.raises(OverlayError, match="it is of revision 1, and the patches here are 2"):
        patched.repair()


def test_another_release_beside_it(patched: Place) -> None:
    other = patched.site / "vllm-0.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: vllm\nVersion: 0.9\n")
    before = patched.files
    with pytest.raises(OverlayError, match="there is not one dist-info folder") as caught:
        patched.repair()
    folders = f"{other} {patched.site / PATCHED}"
    command = f"rm -r {folders} && pip install --no-deps 'vllm==1.0'"
    assert str(caught.value).endswith(f"Heal it: {command}.")
    assert patched.files == before


@pytest.mark.parametrize("what", ["install", "revert"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_and_changed_since(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: str, when: str
) -> None:
    """Half of a run, and somebody changes a patched file: it ends patched, in whole."""
    keep(place.upstream.root, "1.0", "1.1")
    place.install()
    whole = place.files
    if what == "install":
        place.revert()
    real, name = site_files.journal(place.site), "vllm/attention.py"

    def stop(path: Path) -> None:
        if path.name == ("METADATA" if when == "before" else "attention.py"):
            raise SystemExit

    with monkeypatch.context() as patching:
        patching.setattr(site_files, "journal", lambda site: Journal(site, site / IN_SITE, stop))
        patching.setattr(Journal, "_undo", lambda *_: None)
        with pytest.raises(SystemExit):
            getattr(place, what)()
    assert real.is_planned()
    (place.site / name).write_text("# mine\n")
    (said,) = place.doctor()
    assert said.startswith(f"end the {what} that was interrupted; {name} was changed since")
    assert said.endswith("vllm-overlay install --repair")
    assert place.repair().recovered
    assert place.files == whole
    assert place.doctor() == ()


def test_a_repair_interrupted_and_changed_since(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(place.upstream.root, "1.0", "1.1")
    place.install()
    whole = place.files
    (place.site / "vllm/attention.py").unlink()
    with monkeypatch.context() as patching:
        patching.setattr(Journal, "_clear", lambda *_: (_ for _ in ()).throw(SystemExit))
        patching.setattr(Journal, "_undo", lambda *_: None)
        with pytest.raises(SystemExit):
            place.repair()
    (place.site / "vllm/attention.py").write_text("# mine\n")
    (said,) = place.doctor()
    assert said == (
        "end the repair that was interrupted; vllm/attention.py was changed since: "
        "vllm-overlay install --repair"
    )
    for what in (place.install, place.revert):
        with pytest.raises(OverlayError, match="vllm-overlay install --repair"):
            what()
    assert place.repair().recovered
    assert place.files == whole
    assert place.doctor() == ()


def test_the_command(place: Place, run: Callable[..., Ran], tmp_path: Path) -> None:
    keep(place.upstream.root, "1.0", "1.1")
    place.install()
    script = tmp_path / "python of vllm"
    script.write_text(f"#!/bin/sh\necho '{json.dumps([str(place.site)])}'\n")
    script.chmod(0o755)
    python = ("--python", str(script))
    (place.site / "vllm/attention.py").unlink()
    dry = run("install", *python, "--repair", "--dry-run")
    assert "A vllm/attention.py\n" in dry.out
    assert "would be repaired to 1.0+llama4.1: 1 of 1 patch applied, 0 files changed" in dry.out
    assert not (place.site / "vllm/attention.py").exists()
    refused = run("install", *python)
    assert f"vllm-overlay install --python '{script}' --repair" in " ".join(refused.err.split())
    done = run("install", *python, "--repair")
    assert (done.status, done.err) == (0, "")
    assert "is patched already" in run("install", *python, "--repair").out
    found = json.loads(run("install", *python, "--repair", "--json").out)
    assert found["action"] == "nothing"
    for flags in (("--revert",), ("--other-build",)):
        assert run("install", "--repair", *flags).status == 2


def test_two_topics(bare_upstream: Upstream, environments: Path) -> None:
    """A file that one patch changes and a later one adds to is made by both."""
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))

    def add(tree: Path) -> None:
        file = tree / "vllm/attention.py"
        file.write_text(f"{file.read_text()}\n\nCHUNK = 8192\n")

    bare_upstream.patch("topic-b/1.0.patch", add, series=("1.0",), before=("topic-a/1.0.patch",))
    bare_upstream.lock()
    place = make_place(bare_upstream, environments / "uv")
    place.install()
    whole = place.files
    (place.site / "vllm/attention.py").unlink()
    place.repair()
    assert place.files == whole
