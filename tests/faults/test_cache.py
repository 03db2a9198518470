"""What lies in the cache is changed after the fact: fixed, or refused; never used."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import SDIST, WHEEL, Upstream
from overlay.base.digest import sha256
from overlay.base.errors import Exit
from overlay.base.git import Git

from .tool import Place, Truth, go, require_same, require_whole, truth

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def filled(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Truth]:
    """A cache with everything, and no wheel yet; tests work on copies."""
    place = Place.below(patched, tmp_path_factory.mktemp("filled"))
    expected = truth(place)
    shutil.rmtree(place.dist)
    shutil.rmtree(place.work)
    return place, expected


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.chmod(0o644)  # git's objects are read-only
    file.write_bytes(data)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_to(data: bytes | None) -> Change:
    """The file becomes a link to one elsewhere: with other bytes, or to nothing."""

    def change(file: Path) -> None:
        elsewhere = file.parents[2] / "elsewhere"
        if data is not None:
            elsewhere.write_bytes(data)
        file.unlink()
        file.symlink_to(elsewhere)

    return change


def begun_as_link(file: Path) -> None:
    """A transfer that stopped in a link: going on must not write to where it leads."""
    elsewhere = file.parents[2] / "elsewhere"
    elsewhere.write_bytes(b"mine")
    file.with_name(file.name + ".part").symlink_to(elsewhere)
    file.unlink()


def begun(data: bytes, part: int = 1) -> Change:
    """A transfer that stopped, or did not, with other bytes."""

    def change(file: Path) -> None:
        size = file.stat().st_size // part
        file.with_name(file.name + ".part").write_bytes((data * size)[:size])
        file.unlink()

    return change


#: Change, and whether it is refused with INTEGRITY, with ENVIRONMENT, or fixed unasked.
CHANGES: dict[str, tuple[Change, Exit]] = {
    "a bit flipped": (flip, Exit.INTEGRITY),
    "zeros": (lambda f: f.write_bytes(bytes(f.stat().st_size)), Exit.INTEGRITY),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-9]), Exit.OK),
    "empty": (lambda f: f.write_bytes(b""), Exit.OK),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), Exit.OK),
    "a folder": (folder, Exit.ENVIRONMENT),
    "a link to nothing": (link_to(None), Exit.OK),
    "a link to another file": (link_to(b"mine"), Exit.OK),
    "begun through a link": (begun_as_link, Exit.OK),
    "begun with other bytes": (begun(b"x", 2), Exit.OK),
    "a whole .part of other bytes": (begun(b"\0"), Exit.OK),
}


@pytest.mark.parametrize("name", [SDIST, WHEEL])
def test_files(filled: tuple[Place, Truth], tmp_path: Path, name: str) -> None:
    kept, expected = filled
    for number, (what, (change, status)) in enumerate(CHANGES.items()):
        place = Place.below(kept.upstream, tmp_path / str(number))
        shutil.copytree(kept.cache, place.cache)
        shutil.rmtree(place.cache / "git")  # or the sdist is not looked at
        file = place.cache / "files" / name
        change(file)
        ended = go(*place.all)
        elsewhere = place.cache.parent / "elsewhere"
        assert not elsewhere.exists() or elsewhere.read_bytes() == b"mine", what
        if status is not Exit.OK:
            assert (ended.status, ended.is_message) == (status, True), (what, ended)
            assert "Delete it" in ended.err
            assert not place.dist.exists()
            assert not place.work.exists()
            shutil.rmtree(file) if file.is_dir() else file.unlink()  # as the message says
        else:
            assert ended.status == 0, (what, ended)
        require_same(place, expected)
    assert number + 1 == len(CHANGES) == 11


def objects(store: Path) -> list[Path]:
    return sorted(f for f in (store / "objects").rglob("*") if f.is_file())


def ref(store: Path) -> Path:
    (found,) = (store / "refs/overlay/base").iterdir()
    return found


def become_file(store: Path) -> None:
    shutil.rmtree(store)
    store.write_text("")


#: What is done to the store other than to one of its objects.
STORE: dict[str, Change] = {
    "no ref": lambda s: ref(s).unlink(),
    "an empty ref": lambda s: ref(s).write_text(""),
    "a ref to nothing": lambda s: ref(s).write_text("1" * 40 + "\n"),
    "a ref of nonsense": lambda s: ref(s).write_text("nonsense\n"),
    "a ref to another commit": lambda s: ref(s).write_text(another_commit(s) + "\n"),
    "no HEAD": lambda s: (s / "HEAD").unlink(),
    "no config": lambda s: (s / "config").unlink(),
    "no objects": lambda s: shutil.rmtree(s / "objects"),
    "no refs": lambda s: shutil.rmtree(s / "refs"),
    "a file": become_file,
    "gone": shutil.rmtree,
    "a stale lock of the ref": lambda s: ref(s).with_name(ref(s).name + ".lock").write_text(""),
    "config of nonsense": lambda s: (s / "config").write_text("[[["),
}


def another_commit(store: Path) -> str:
    from overlay.base.git import Git

    git, old = Git(store), ref(store).read_text().strip()
    who = {
        f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")
    }
    tree = git.text("rev-parse", f"{old}:vllm")
    return git.text("commit-tree", tree, "-m", "another", env=who)


def spoil(kept: Place, expected: Truth, folder: Path, change: Change) -> bool:
    """Apply and build on a spoiled store. Returns whether that succeeds; else it is refused, and
    succeeds once the store is deleted, as the message says."""
    place = Place.below(kept.upstream, folder)
    shutil.copytree(kept.cache, place.cache)
    change(place.cache / "git")
    ended = go(*place.all)
    require_whole(place, expected)
    if ended.status:
        assert ended.is_message, ended
        assert str(place.cache / "git") in ended.err
        store = place.cache / "git"
        shutil.rmtree(store) if store.is_dir() else store.unlink(missing_ok=True)
    require_same(place, expected)
    return not ended.status


def test_store(filled: tuple[Place, Truth], tmp_path: Path) -> None:
    kept, expected = filled
    good = {
        what for what, change in STORE.items() if spoil(kept, expected, tmp_path / what, change)
    }
    assert good >= {"gone", "no ref", "a stale lock of the ref", "a ref to nothing"}
    assert len(STORE) == 13


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_objects(filled: tuple[Place, Truth], tmp_path: Path, how: str) -> None:
    """Each object in turn (up to 12, evenly spread)."""
    kept, expected = filled
    count = len(objects(kept.cache / "git"))
    chosen = sorted({count * n // 12 for n in range(12)})
    for number in chosen:

        def change(store: Path, number: int = number) -> None:
            file = objects(store)[number]
            flip(file) if how == "damaged" else file.unlink()

        spoil(kept, expected, tmp_path / str(number), change)
    assert len(chosen) == min(count, 12) > 9


def replant(store: Path, name: str, kind: str, data: bytes) -> None:
    """Give an object other contents under its old name, which git does not see when it reads."""
    file = store / "objects" / name[:2] / name[2:]
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(zlib.compress(b"%s %d\0%s" % (kind.encode(), len(data), data)))


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_planted_objects(filled: tuple[Place, Truth], tmp_path: Path, what: str) -> None:
    """Of a file that no patch touches: no source distribution, tree or wheel has other bytes."""
    kept, expected = filled
    place = Place.below(kept.upstream, tmp_path)
    shutil.copytree(kept.cache, place.cache)
    store = Git(place.cache / "git")
    commit = ref(store.git_dir).read_text().strip()
    blob = store.text("rev-parse", f"{commit}:csrc/kernel.cu")
    if what == "a file":
        replant(store.git_dir, blob, "blob", b"int kernel() { return 1; }\n")
    else:
        other = store.text("rev-parse", f"{commit}:setup.py")
        entry = b"100644 kernel.cu\0" + bytes.fromhex(other)
        folder = store.text("rev-parse", f"{commit}:csrc")
        replant(store.git_dir, folder, "tree", entry)
    sdist = go(place.command("build", "1.0", "--sdist", "--out", str(tmp_path / "sdist")))
    assert (sdist.status, sdist.is_message) == (6, True), sdist
    assert str(store.git_dir) in sdist.err
    assert not list((tmp_path / "sdist").iterdir())
    tree = go(place.apply)
    assert tree.status, tree
    assert not place.work.exists()
    wheel = go(place.build)
    assert wheel.status or [sha256(file) for file in place.dist.iterdir()] == [expected.wheel]
