"""Several files written together: what fails, what is killed, and what is taken back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from overlay.base import journal
from overlay.base.errors import OverlayError
from overlay.base.journal import PLAN, ChangedMeanwhileError, Journal

OLD = {"a": b"a\n", "folder/b": b"b\n"}
NEW: dict[str, bytes | None] = {"a": b"A\n", "folder/b": None, "other/c": b"c\n"}


@pytest.fixture
def each(tmp_path: Path) -> Journal:
    for name, data in OLD.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Journal(tmp_path / "root", tmp_path / "stage")


def content(each: Journal) -> dict[str, bytes]:
    files = [path for path in each.root.rglob("*") if path.is_file()]
    return {path.relative_to(each.root).as_posix(): path.read_bytes() for path in files}


def wanted() -> dict[str, bytes]:
    return {name: data for name, data in NEW.items() if data is not None}


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process end before a move."""
    calls, real = 0, journal._move

    def call(source: Path, target: Path) -> None:
        nonlocal calls
        if calls == number:
            raise Killed
        calls += 1
        real(source, target)

    monkeypatch.setattr(journal, "_move", call)


def interrupt(each: Journal, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with monkeypatch.context() as patched:
        kill_at(patched, number)
        patched.setattr(Journal, "_undo", lambda *_: None)
        with pytest.raises(Killed):
            each.write(NEW, "test")
    assert each.label() == "test"


def test_written(each: Journal) -> None:
    each.write(NEW)
    assert content(each) == wanted()
    assert not (each.root / "folder").exists()
    assert not each.is_left()


@pytest.mark.parametrize("number", [0, 1])
def test_finished(each: Journal, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    interrupt(each, monkeypatch, number)
    assert each.finish() == tuple(NEW)
    assert content(each) == wanted()
    assert not each.is_left()


@pytest.mark.parametrize("number", [0, 1])
def test_undone(each: Journal, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    interrupt(each, monkeypatch, number)
    assert each.undo() == tuple(NEW)
    assert content(each) == OLD
    assert not each.is_left()


@pytest.mark.parametrize("settle", ["undo", "finish"])
def test_killed_while_it_is_undone(
    each: Journal, monkeypatch: pytest.MonkeyPatch, settle: str
) -> None:
    """Whoever comes next goes on with undoing: the new bytes may be gone."""
    interrupt(each, monkeypatch, 1)
    for number in (0, 1):
        with monkeypatch.context() as patched:
            kill_at(patched, number)
            with pytest.raises(Killed):
                each.undo()
        assert each.label() == "undoing of a test"
    getattr(each, settle)()
    assert content(each) == OLD
    assert not each.is_left()


def test_what_fails_is_undone(each: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if Path(target).name == "c":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        each.write(NEW)
    assert content(each) == OLD
    assert not each.is_left()


def test_a_stage_on_another_file_system(each: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if each.stage in path.parents and each.stage not in Path(target).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    (each.root / "a").chmod(0o600)
    each.write(NEW)
    assert content(each) == wanted()
    assert (each.root / "a").stat().st_mode & 0o777 == 0o600
    assert (each.root / "other/c").stat().st_mode & 0o777 == 0o644


def test_a_second_write_before_the_first_is_settled(
    each: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(each, monkeypatch, 1)
    with pytest.raises(FileExistsError):
        each.write({"a": b"other\n"})
    each.finish()
    assert content(each) == wanted()


@pytest.mark.parametrize("settle", ["undo", "finish"])
def test_changed_meanwhile(each: Journal, monkeypatch: pytest.MonkeyPatch, settle: str) -> None:
    interrupt(each, monkeypatch, 1)
    (each.root / "a").write_bytes(b"mine\n")
    with pytest.raises(ChangedMeanwhileError) as caught:
        getattr(each, settle)()
    assert caught.value.path == "a"
    assert content(each)["a"] == b"mine\n"


@pytest.mark.parametrize(
    "plan",
    [
        b"", b"\xff", b"[]", b"{}", b'{"files": [1]}', b"[" * 100_000,
        b'{"files": [{"path": "a"}]}', b'{"files": [{"path": 1, "old": null, "new": null}]}',
        b'{"files": [{"path": "../../a", "old": null, "new": null}]}',
    ],
)  # fmt: skip
def test_a_damaged_plan_is_named(tmp_path: Path, plan: bytes) -> None:
    journal = Journal(tmp_path, tmp_path / "stage")
    journal.stage.mkdir()
    (journal.stage / PLAN).write_bytes(plan)
    for call in (journal.label, journal.finish, journal.undo, journal.is_planned):
        with pytest.raises(OverlayError, match=r"stage/journal\.json"):
            call()
    assert (journal.stage / PLAN).is_file()
