"""Patching in place: the patched wheel's files, all or none, and back to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from made_upstream import WHEEL, Ran, Upstream, accept_use_irope, git
from overlay.answers import doctor
from overlay.answers.explain import Settings
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError
from overlay.base.journal import IN_SITE, Journal
from overlay.inplace import inplace, site_files
from overlay.inplace.inplace import InPlaceResult
from overlay.inplace.repair import repair
from overlay.releases.uv import find_uv
from overlay.wheels import record
from overlay.wheels.build import build_wheel

from ..made_matrix import keep
from . import kill_everywhere

INFO, PATCHED = "vllm-1.0.dist-info", "vllm-1.0+llama4.1.dist-info"
Change = Callable[[Path], None]


def put(installer: str, file: Path, folder: Path) -> Path:
    """Install a wheel into a new virtual environment. Returns its site-packages."""
    uv, python = find_uv(), folder / "bin" / "python"
    commands = {
        "uv": [uv, "pip", "install", "--python", str(python)],
        "pip": [sys.executable, "-m", "pip", "--python", str(python), "install"],
    }
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    command = [*commands[installer], "-q", "--no-deps", "--no-index", str(file)]
    subprocess.run(command, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    return site


@pytest.fixture(scope="session")
def environments(templates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environments with the official wheel of 1.0, by name of the installer; copied by tests."""
    folder = tmp_path_factory.mktemp("environments")
    official = templates["patched"] / "served" / WHEEL
    for installer in ("pip", "uv"):
        put(installer, official, folder / installer)
    return folder


@dataclass(frozen=True)
class Place:
    """An environment with the official 1.0, and the overlay."""

    upstream: Upstream
    site: Path

    @property
    def python(self) -> Python:
        return Python("python", (str(self.site),))

    def install(self, *, other_build: bool = False, full: bool = False) -> InPlaceResult:
        workspace = self.upstream.workspace(offline=True)
        return inplace.install(workspace, self.python, other_build=other_build, full=full)

    def revert(self) -> InPlaceResult:
        return inplace.revert(self.upstream.workspace(offline=True), self.python)

    def repair(self, *, full: bool = False) -> InPlaceResult:
        return repair(self.upstream.workspace(offline=True), self.python, full=full)

    def doctor(self) -> tuple[str, ...]:
        """What it says to change, on a GPU on which upstream's is right; needs `keep`."""
        workspace, settings = self.upstream.workspace(offline=True), Settings("auto", "auto")
        return doctor.examine(workspace, self.python, {}, ("A10", "8.6"), settings).to_change

    @property
    def files(self) -> dict[str, tuple[int, bytes]]:
        """Mode and bytes of every file but bytecode."""
        return {
            str(path.relative_to(self.site)): (path.stat().st_mode, path.read_bytes())
            for path in sorted(self.site.rglob("*"))
            if path.is_file() and path.suffix != ".pyc"
        }

    def rewrite_record(self, info: str = INFO) -> None:
        """Let RECORD say what the wheel's files are."""
        file = self.site / info / "RECORD"
        rows = record.read(file.read_text()).values()
        lines = [
            row if record.is_installers(row[0], info)
            else record.line(row[0], (self.site / row[0]).read_bytes())
            for row in rows
        ]  # fmt: skip
        file.write_bytes(record.write(lines))


@pytest.fixture(params=["uv", "pip"])
def each(request: pytest.FixtureRequest, upstream: Upstream, environments: Path) -> Place:
    """A place as pip makes it, and one as uv does."""
    return make_place(upstream, environments / request.param)


@pytest.fixture
def place(upstream: Upstream, environments: Path) -> Place:
    """A place as uv makes it."""
    return make_place(upstream, environments / "uv")


def make_place(upstream: Upstream, environment: Path) -> Place:
    (site,) = environment.glob("lib/python*/site-packages")
    copy = upstream.root.parent / "site-packages"
    shutil.copytree(site, copy)
    return Place(upstream, copy)


def own_rows(site: Path) -> set[tuple[str, str, str]]:
    """RECORD's lines of what is in the wheel."""
    rows = record.read((site / PATCHED / "RECORD").read_text()).values()
    return {row for row in rows if not record.is_installers(row[0], PATCHED)}


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_it_is_what_the_patched_wheel_installs(
    upstream: Upstream, environments: Path, tmp_path: Path, installer: str
) -> None:
    """File for file and line for line of RECORD, but for what tells where a wheel came from."""
    place = make_place(upstream, environments / installer)
    workspace = upstream.workspace()
    built = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist")
    wheels = Place(upstream, put(installer, built.path, tmp_path / "venv"))
    done = place.install()
    assert (done.action, done.before, done.after) == ("patched", "1.0", "1.0+llama4.1")
    assert done.files == {"vllm/attention.py": "M"}
    assert done.is_official_build
    assert own_rows(place.site) == own_rows(wheels.site)
    expected, found = wheels.files, place.files
    for name in ("direct_url.json", "uv_cache.json", "RECORD"):
        expected.pop(f"{PATCHED}/{name}", None)
    del found[f"{PATCHED}/{record.ORIGINALS}"], found[f"{PATCHED}/RECORD"]
    assert found == expected
    assert b"use_irope=False" in found["vllm/attention.py"][1]


def test_revert_restores_every_byte(each: Place) -> None:
    before = each.files
    each.install()
    assert each.files != before
    done = each.revert()
    assert (done.action, done.before, done.after) == ("reverted", "1.0+llama4.1", "1.0")
    assert done.files == {"vllm/attention.py": "M"}
    assert each.files == before
    assert not (each.site / IN_SITE).exists()


def test_a_second_time_there_is_nothing_to_do(place: Place) -> None:
    assert place.revert().action == "nothing"
    place.install()
    before = place.files
    assert place.install().action == "nothing"
    assert place.files == before
    place.revert()
    assert place.revert().action == "nothing"


def test_no_folder_is_renamed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """overlayfs refuses that for a folder of a lower layer: vLLM's, in a container."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(18, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    before = place.files
    assert place.install().action == "patched"
    assert place.revert().action == "reverted"
    assert place.files == before


def test_what_else_lies_in_dist_info_stays(place: Place) -> None:
    """Files that RECORD does not list, and the modes of all."""
    (place.site / INFO / "note.txt").write_text("mine\n")
    (place.site / INFO / "note.txt").chmod(0o600)
    before = place.files
    place.install()
    assert place.files[f"{PATCHED}/note.txt"] == before[f"{INFO}/note.txt"]
    place.revert()
    assert place.files == before


def test_stale_bytecode_goes(place: Place) -> None:
    """Bytecode compiled to be used unchecked would hide the patch."""
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash",
         str(place.site / "vllm")], check=True,
    )  # fmt: skip
    script = "import inspect, vllm.attention as a; print(inspect.signature(a.XFormersImpl))"

    def said() -> str:
        command = [sys.executable, "-c", script]
        env = {**os.environ, "PYTHONPATH": str(place.site)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert "use_irope" not in said()
    place.install()
    assert "use_irope" in said()
    place.revert()
    assert "use_irope" not in said()
    assert list(place.site.glob("vllm/__pycache__/__init__.*"))  # not ours to remove


def test_files_that_share_their_bytes_with_a_cache_are_left_alone(
    place: Place, tmp_path: Path
) -> None:
    """uv's installs are second names of the files in its cache."""
    cached = tmp_path / "cached.py"
    cached.hardlink_to(place.site / "vllm/attention.py")
    before = cached.read_bytes()
    place.install()
    assert cached.read_bytes() == before
    place.revert()
    assert cached.read_bytes() == before


def replace_a_module(tree: Path) -> None:
    """What a patch does that adds a module and deletes one."""
    (tree / "vllm/new").mkdir()
    (tree / "vllm/new/chunked.py").write_text("CHUNK = 8192\n")
    git(tree, "rm", "-q", "vllm/attention.py")


def test_new_and_deleted_modules(bare_upstream: Upstream, environments: Path) -> None:
    bare_upstream.patch("topic-a/1.0.patch", replace_a_module, series=("1.0",))
    bare_upstream.lock()
    place = make_place(bare_upstream, environments / "uv")
    before = place.files
    assert place.install().files == {"vllm/attention.py": "D", "vllm/new/chunked.py": "A"}
    assert (place.site / "vllm/new/chunked.py").read_text() == "CHUNK = 8192\n"
    assert not (place.site / "vllm/attention.py").exists()
    assert place.revert().files == {"vllm/attention.py": "A", "vllm/new/chunked.py": "D"}
    assert place.files == before
    assert not (place.site / "vllm/new").exists()


def edit(name: str, data: bytes) -> Change:
    def change(site: Path) -> None:
        (site / name).write_bytes(data)

    return change


def remove(name: str) -> Change:
    return lambda site: (site / name).unlink()


def version(text: str) -> Change:
    """Another version, honestly recorded."""

    def change(site: Path) -> None:
        file = site / INFO / "METADATA"
        file.write_text(file.read_text().replace("Version: 1.0\n", f"Version: {text}\n"))
        (site / INFO).rename(site / f"vllm-{text}.dist-info")
        file = site / f"vllm-{text}.dist-info" / "RECORD"
        file.write_text(file.read_text().replace(INFO, f"vllm-{text}.dist-info"))

    return change


def editable(site: Path) -> None:
    origin = {"url": "file:///src/vllm", "dir_info": {"editable": True}}
    (site / INFO / "direct_url.json").write_text(json.dumps(origin))


def twice(site: Path) -> None:
    shutil.copytree(site / INFO, site / "vllm-0.9.dist-info")


@pytest.mark.parametrize(
    ("change", "text", "status"),
    [
        (edit("vllm/attention.py", b"pass\n"), "not as RECORD has them are vllm/attention.py", 4),
        (edit("vllm/data/config.json", b"[]\n"), "not as RECORD has them", 4),
        (edit("vllm/_C.abi3.so", b"\0"), "not as RECORD has them are vllm/_C.abi3.so", 4),
        (remove("vllm/__init__.py"), "not as RECORD has them are vllm/__init__.py", 4),
        (remove(f"{INFO}/RECORD"), "can't be read", 4),
        (edit(f"{INFO}/RECORD", b"vllm/__init__.py\n"), "is not a name, a hash and a size", 4),
        (edit(f"{INFO}/METADATA", b"Version: 1.1\n"), "its metadata says 1.1", 4),
        (version("1.0+cu118"), "a build of someone else", 2),
        (version("0.9"), "this release needs no patches", 2),
        (version("1.0.5"), "there are no patches for this version", 2),
        (version("2.0"), "newer than the releases", 2),
        (version("1.0+llama4.7"), "in revision 7 and not 1", 2),
        (version("1.0+llama4.1"), "no SBOM", 2),
        (editable, "it is an editable install", 4),
        (twice, "vllm-0.9.dist-info, vllm-1.0.dist-info", 4),
    ],
)  # fmt: skip
def test_what_is_refused(each: Place, change: Change, text: str, status: int) -> None:
    change(each.site)
    before = each.files
    with pytest.raises(OverlayError) as caught:
        each.install()
    assert text in str(caught.value)
    assert caught.value.status == status
    assert each.files == before
    assert not (each.site / IN_SITE).exists()


def test_a_library_of_the_same_size_is_found_with_full(place: Place) -> None:
    file = place.site / "vllm/_C.abi3.so"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(OverlayError, match=r"not as RECORD has them are vllm/_C\.abi3\.so"):
        place.install(full=True)
    assert place.install().by_size == 1


def test_a_changed_file_whose_record_was_changed_too(place: Place) -> None:
    (place.site / "vllm/attention.py").write_text("pass\n")
    place.rewrite_record()
    with pytest.raises(OverlayError, match="RECORD is not the official wheel's"):
        place.install(other_build=True)


def test_another_build_needs_to_be_admitted(place: Place) -> None:
    (place.site / "vllm/_C.abi3.so").write_bytes(b"compiled elsewhere")
    place.rewrite_record()
    before = place.files
    with pytest.raises(OverlayError, match="pass --other-build"):
        place.install()
    assert place.files == before
    assert not place.install(other_build=True).is_official_build
    bill = json.loads((place.site / PATCHED / "sboms/vllm-overlay.cdx.json").read_text())
    (ancestor,) = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert "hashes" not in ancestor  # it is not the official wheel
    assert (place.site / "vllm/_C.abi3.so").read_bytes() == b"compiled elsewhere"
    keep(place.upstream.root, "1.0", "1.1")
    assert place.doctor() == ()
    assert place.install().action == "nothing"
    assert not place.revert().is_official_build
    assert place.files == before


def test_patches_that_are_not_locked(place: Place) -> None:
    file = place.upstream.patches / "attention-signatures/1.0.patch"
    file.write_text(file.read_text().replace("use_irope=False", "use_irope=None"))
    before = place.files
    with pytest.raises(OverlayError, match="is not what is locked"):
        place.install()
    assert place.files == before


def test_a_release_whose_record_is_not_locked(place: Place) -> None:
    file = place.upstream.root / "VERSIONS.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("record")]
    file.write_text("\n".join(lines))
    with pytest.raises(OverlayError, match=r"Run 'vllm-overlay lock 1\.0'"):
        place.install()


def test_a_file_in_the_way(bare_upstream: Upstream, environments: Path) -> None:
    def change(tree: Path) -> None:
        accept_use_irope(tree)
        (tree / "vllm/chunked.py").write_text("CHUNK = 8192\n")

    bare_upstream.patch("topic-a/1.0.patch", change, series=("1.0",))
    bare_upstream.lock()
    place = make_place(bare_upstream, environments / "uv")
    (place.site / "vllm/chunked.py").write_text("# mine\n")
    with pytest.raises(OverlayError, match="is there already"):
        place.install()
    assert (place.site / "vllm/chunked.py").read_text() == "# mine\n"


def test_no_vllm_there(place: Place) -> None:
    shutil.rmtree(place.site)
    place.site.mkdir()
    with pytest.raises(OverlayError, match="has no vLLM"):
        place.install()


def test_other_patches_of_the_same_revision(place: Place) -> None:
    place.install()
    file = place.upstream.patches / "attention-signatures/1.0.patch"
    file.write_text(file.read_text().replace("Llama 4 passes", "Llama 4 gives"))
    with pytest.raises(OverlayError, match="vllm-overlay install --revert") as caught:
        place.install()
    assert "another patches/attention-signatures/1.0.patch" in str(caught.value)
    assert place.revert().action == "reverted"  # whatever the patches are by now


def test_a_patched_wheel_has_nothing_to_restore(upstream: Upstream, tmp_path: Path) -> None:
    workspace = upstream.workspace()
    built = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist")
    place = Place(upstream, put("uv", built.path, tmp_path / "venv"))
    assert place.install().action == "nothing"
    with pytest.raises(OverlayError, match="installed as a patched wheel"):
        place.revert()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (edit("vllm/attention.py", b"pass\n"), "not as RECORD has them are vllm/attention.py"),
        (edit(f"{PATCHED}/{record.ORIGINALS}", b"no zip"), "is not what was kept"),
        (remove(f"{PATCHED}/{record.ORIGINALS}"), "is not what was kept"),
    ],
)
def test_what_is_not_reverted(place: Place, change: Change, text: str) -> None:
    place.install()
    change(place.site)
    before = place.files
    with pytest.raises(OverlayError, match=text):
        place.revert()
    assert place.files == before


def test_originals_that_are_not_upstreams(place: Place) -> None:
    """Neither a file nor the RECORD that would vouch for it gets back by the zip."""
    place.install()
    file = place.site / PATCHED / record.ORIGINALS
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    evil = {**members, "vllm/attention.py": b"evil = 1\n"}
    rows = record.read(members[f"{INFO}/RECORD"].decode())
    rows["vllm/attention.py"] = record.line("vllm/attention.py", b"evil = 1\n")
    for name, data in (
        ("vllm/attention.py is not as its RECORD has it", evil),
        ("its RECORD is not upstream's",
         {**evil, f"{INFO}/RECORD": record.write(list(rows.values()))}),
    ):  # fmt: skip
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in data.items():
                archive.writestr(member, content)
        with pytest.raises(OverlayError, match=name):
            place.revert()


def test_a_record_that_leaves_its_folder(place: Place) -> None:
    place.install()
    outside = place.site.parent / "outside.py"
    outside.write_text("mine\n")
    file = place.site / PATCHED / "RECORD"
    file.write_text(f"vllm/../../outside.py,,\n{file.read_text()}")
    with pytest.raises(OverlayError, match="its RECORD lists"):
        place.revert()
    assert outside.read_text() == "mine\n"


def broken(site: Path) -> None:
    """Several faults, for a repair that takes a while."""
    (site / "vllm/attention.py").unlink()
    (site / "vllm/_version.py").write_text("# mine\n")
    (site / PATCHED / "RECORD").unlink()
    (site / PATCHED / "METADATA").write_text("Name: vllm\nVersion: 1.0+llama4.1\n")
    (site / INFO).mkdir()
    (site / INFO / "WHEEL").write_text("Wheel-Version: 1.0\n")


@pytest.mark.parametrize("what", ["install", "revert", "repair"])
def test_killed_anywhere_doctor_names_what_ends_it(place: Place, tmp_path: Path, what: str) -> None:
    keep(place.upstream.root, "1.0", "1.1")
    stock = kill_everywhere.digest(place.site)
    place.install()
    patched = kill_everywhere.digest(place.site)
    before, after = (patched, stock) if what == "revert" else (stock, patched)
    if what == "install":
        place.revert()
    elif what == "repair":
        broken(place.site)
        before = kill_everywhere.digest(place.site)
    (tmp_path / "work").mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "unit.inplace.kill_everywhere", str(place.upstream.root),
         str(place.site), str(tmp_path / "work"), what],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    kills = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(kills) > 25
    assert [kill["killed"] for kill in kills] == [True] * (len(kills) - 1) + [False]
    for kill in kills:
        assert (kill["error"], kill["left"], kill["then"]) == ("", False, []), kill
        if kill["begun"]:
            assert kill["after"] == after
            (said,) = kill["said"]
            assert said.startswith(f"end the {what} that was interrupted: vllm-overlay install")
        else:
            # Nothing had been changed: it is done, or all is as it was, if that is right as well.
            assert kill["after_kill"] in (before, after)
            assert kill["after"] in (before, after)
            assert kill["after"] == after or what == "revert"
    assert {kill["begun"] for kill in kills} == {True, False}


@pytest.mark.parametrize(("what", "back"), [("install", "revert"), ("revert", "install")])
def test_a_failure_anywhere_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: str, back: str
) -> None:
    renames, broken, real = 0, 0, Path.replace

    def replace(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == broken:
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    if what == "revert":
        place.install()
    renames = 0
    getattr(place, what)()
    count = renames
    assert count >= 4
    getattr(place, back)()
    before = place.files
    for broken in range(1, count + 1):  # noqa: B007  # read in replace()
        renames = 0
        with pytest.raises(OverlayError, match="No space left on device; nothing was") as caught:
            getattr(place, what)()
        assert caught.value.status is Exit.ENVIRONMENT
        assert place.files == before
        assert not (place.site / IN_SITE).exists()


def test_changed_between_the_kill_and_the_next_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody installed vLLM again meanwhile: half of a patch is not put on top of it."""
    original = (place.site / "vllm/attention.py").read_bytes()

    def stop(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patching:
        patching.setattr(Journal, "_clear", stop)
        patching.setattr(Journal, "_undo", lambda *_: None)
        with pytest.raises(SystemExit):
            place.install()
    assert site_files.journal(place.site).is_planned()
    (place.site / "vllm/attention.py").write_bytes(original)
    keep(place.upstream.root, "1.0", "1.1")
    with pytest.raises(OverlayError, match=r"vllm/attention\.py was changed since") as caught:
        place.install()
    assert str(caught.value).endswith("vllm-overlay install --repair.")
    assert place.doctor() == (
        "end the install that was interrupted; vllm/attention.py was changed since: "
        "vllm-overlay install --repair",
    )
    with pytest.raises(OverlayError, match="Run it without --dry-run"):
        inplace.install(place.upstream.workspace(), place.python, dry_run=True)
    assert place.repair().recovered
    assert place.doctor() == ()
    assert b"use_irope=False" in (place.site / "vllm/attention.py").read_bytes()


def test_a_folder_that_this_user_may_not_write(upstream: Upstream, environments: Path) -> None:
    (site,) = (environments / "uv").glob("lib/python*/site-packages")
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        place = Place(upstream, folder / "site-packages")
        shutil.copytree(site, place.site)
        before, workspace = place.files, upstream.workspace(offline=True)
        project = folder / "overlay"
        shutil.copytree(upstream.root, project)
        workspace = Upstream(upstream.served, project, folder / "cache").workspace(offline=True)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        else:
            (place.site / "vllm").chmod(0o555)
        try:
            with pytest.raises(OverlayError, match="this user may not") as caught:
                inplace.install(workspace, place.python)
        finally:
            if user == 0:
                os.seteuid(user)
            else:
                (place.site / "vllm").chmod(0o755)
        assert caught.value.status is Exit.ENVIRONMENT
        assert place.files == before


def test_the_command_and_what_others_say_then(
    upstream: Upstream, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    official = upstream.served / WHEEL
    put("pip", official, tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")

    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pip, venv = (sys.executable, "-m", "pip", "--python", python), str(tmp_path / "venv")
    frozen = ask(*pip, "freeze")
    dry = run("install", "--python", venv, "--dry-run")
    assert (dry.status, dry.err) == (0, "")
    assert "M vllm/attention.py" in dry.out
    told = "1 of 1 patch applied, 1 file changed, 0 added, 0 removed"
    assert f"would be patched to 1.0+llama4.1: {told}" in dry.out
    assert "Version: 1.0\n" in ask(*pip, "show", "vllm")
    found = json.loads(run("install", "--python", venv, "--json").out)
    assert found["action"] == "patched"
    assert found["patches"] == {"applied": 1, "listed": 1}
    assert found["files"] == {"vllm/attention.py": "M"}
    assert "Version: 1.0+llama4.1\n" in ask(*pip, "show", "vllm")
    assert ask(*pip, "freeze") == "vllm==1.0+llama4.1\n"
    assert "No broken requirements" in ask(*pip, "check")
    assert ask(find_uv(), "pip", "freeze", "--python", python) == "vllm==1.0+llama4.1\n"
    ask(find_uv(), "pip", "check", "--python", python)
    said = json.loads(run("doctor", "--python", venv, "--gpu", "T4", "--json").out)
    assert said["vllm"]["kind"] == "patched"
    assert said["vllm"]["files_damaged"] == []
    assert not [each for each in said["to_change"] if "again" in each]
    assert "is patched already: 1 of 1 patch applied" in run("install", "--python", venv).out
    back = run("install", "--python", venv, "--revert")
    assert (back.status, back.err) == (0, "")
    assert "reverted to 1.0: 0 of 1 patch applied" in back.out
    assert ask(*pip, "freeze") == frozen
    assert run("install", "--python", venv).status == 0
    ask(*pip, "uninstall", "-q", "-y", "vllm")
    assert not list(tmp_path.glob("venv/lib/python*/site-packages/*vllm*"))


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("install", "--python", "/nonexistent/python"), 2, "cannot look into the environment"),
        (("install", "--revert", "--full"), 2, "do not go with --revert"),
        (("install", "1.0"), 2, "unexpected extra argument"),
    ],
)
def test_wrong_usage(
    run: Callable[..., Ran], arguments: tuple[str, ...], status: int, text: str
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err
