"""What a person's machine may be like: no traceback, no internal error, no hang."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from made_upstream import Upstream, at
from overlay.cli.main import COMMANDS

from .tool import Ended, Place, go, with_matrix

#: Seconds after which a process counts as hanging.
HANGING = 120
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
WHEEL = "vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kept(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """The upstream with a matrix, documents, tests, a filled cache and a wheel."""
    folder = tmp_path_factory.mktemp("kept")
    made = with_matrix(patched, folder)
    left_out = shutil.ignore_patterns("__pycache__", "unit", "faults")
    shutil.copytree(TESTS, made.root / "tests", ignore=left_out)
    place = Place.below(made, folder)
    assert go(place.build, place.command("validate", "--all")).status == 0
    return made


@pytest.fixture
def place(kept: Upstream, tmp_path: Path) -> Place:
    """A copy of it, that may be spoiled."""
    shutil.copytree(kept.root.parent, tmp_path, dirs_exist_ok=True)
    return Place.below(at(tmp_path), tmp_path)


def run(
    place: Place, *words: str | bytes, variables: dict[str, str] | None = None, **options: object
) -> Ended:
    """A process of its own, with these variables in place of this one's."""
    env = {"PATH": os.environ["PATH"], "HOME": str(place.cache.parent), "PIP_NO_INDEX": "1"}
    shown = os.environ.get("PYTHONPATH")
    kept_path = {"PYTHONPATH": shown} if shown else {}
    command = [sys.executable, "-m", "overlay", *place.command(), *words]
    done = subprocess.run(  # type: ignore[call-overload]
        command, env={**env, **kept_path, **(variables or {})}, timeout=HANGING,
        **{"cwd": place.upstream.root, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
           "check": False, **options},
    )  # fmt: skip
    out, err = (each.decode("utf-8", "backslashreplace") for each in (done.stdout, done.stderr))
    return Ended(done.returncode, out, err)


def require_told(ended: Ended, *statuses: int) -> None:
    """It ended with one of the statuses, and failed, if it did, with a message."""
    assert ended.status in statuses, ended
    said = ended.out + ended.err
    assert "Traceback" not in said, ended
    assert "internal error: " not in said, ended
    if ended.status > 1:
        assert ended.is_message or "\nError: " in ended.err, ended


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_on_a_narrow_terminal(kept: Upstream, command: str) -> None:
    def before() -> None:
        os.environ.update(COLUMNS="1", TERM="dumb")

    ended = go((command, "--help"), before=before)
    assert (ended.status, ended.err) == (0, "")


SAID = (("status",), ("status", "--markdown"), ("show", "attention-signatures"))
TERMINALS: tuple[dict[str, str], ...] = (
    ASCII, {"PYTHONIOENCODING": "latin-1"}, {"COLUMNS": "1"}, {"COLUMNS": "x"},
    {"COLUMNS": "9" * 30}, {"TERM": "dumb", "NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": ""},
)  # fmt: skip


@pytest.mark.parametrize("variables", TERMINALS, ids=lambda each: " ".join(each))
def test_terminals(place: Place, variables: dict[str, str]) -> None:
    for words in SAID:
        ended = run(place, *words, variables=variables)
        require_told(ended, 0)
        assert ended.out


def test_a_patch_is_printed_as_it_is(place: Place) -> None:
    """In UTF-8, whatever the terminal's encoding."""
    file = place.upstream.patches / "attention-signatures/1.0.patch"
    file.write_bytes(file.read_bytes().replace(b"Llama 4 passes", "Llama 4 – passes".encode()))
    done = run(place, "show", "attention-signatures", "--release", "1.0", variables=ASCII)
    assert done.out == file.read_text("utf-8")


def test_names_that_are_not_utf8(place: Place) -> None:
    """They are printed as the bytes that they are."""
    name = b"a\xff"
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    for words, statuses in (
        (("apply", "1.0", name), (0,)),
        (("report", "--output", name + b".html"), (0,)),
        (("build", "1.0", "--out", name + b"o"), (0,)),
        (("edit", "1.0", name + b"e"), (0,)),
        (("selfcheck", "1.0", "--sums", name + b"s"), (0,)),
        (("index", name + b"i", os.fsencode(place.dist / WHEEL)), (0,)),
        (("verify", name), (2,)),
        (("build", name), (2,)),
        (("show", name), (2,)),
        (("explain", "--gpu", name), (2,)),
        (("normalize", name), (2,)),
        (("judge", "1.0", name, name), (2,)),
        (("doctor", "--python", name), (2,)),
        (("refresh", "1.0", "--date", name), (2,)),
        ((name,), (2,)),
    ):
        ended = run(place, *words, variables=strict)
        require_told(ended, *statuses)
        assert ended.status or "a\\xff" in ended.out or words[0] in ("index", "selfcheck"), ended


WORDS = (
    ("status",), ("build", "1.0", "--out", "o"), ("verify", f"../dist/{WHEEL}"), ("edit", "1.0"),
    ("fetch", "--all"),
)  # fmt: skip
HOMES: tuple[dict[str, str], ...] = (
    {"HOME": ""}, {"HOME": "/nonexistent"}, {"HOME": os.devnull}, {"HOME": "/proc"},
    {"TMPDIR": "/nonexistent"}, {"X": "\udcff"},
)  # fmt: skip


@pytest.mark.parametrize("variables", HOMES, ids=lambda each: " ".join(each.values()) or "none")
def test_homes(place: Place, variables: dict[str, str]) -> None:
    for words in WORDS:
        require_told(run(place, *words, variables=variables), 0)


@pytest.mark.parametrize("cache", ["/proc", os.devnull, f"{os.devnull}/x", "a" * 3000])
def test_caches_that_cannot_be_made(place: Place, cache: str) -> None:
    for words in (("status",), ("build", "1.0"), ("fetch", "1.0")):
        require_told(run(place, "--cache", cache, *words), 6)


def test_standard_input_is_closed(place: Place) -> None:
    for words in WORDS:
        require_told(run(place, *words, preexec_fn=lambda: os.close(0)), 0)


def test_the_working_folder_is_gone(place: Place) -> None:
    gone = place.cache.parent / "gone"

    def leave() -> None:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    told = 0
    for words in (*WORDS, ("apply", "1.0"), ("report",), ("index", "simple")):
        ended = run(place, *words, preexec_fn=leave)
        require_told(ended, 0, 2, 6)
        told += "The working folder is gone" in ended.err
    assert told > 2


#: What makes a folder, and how the folder is named to it.
MAKERS: tuple[tuple[str, ...], ...] = (
    ("apply", "1.0", "FOLDER/x"), ("edit", "1.0", "FOLDER/x"), ("build", "1.0", "--out", "FOLDER"),
    ("build", "1.0", "--sdist", "--out", "FOLDER"), ("selfcheck", "1.0", "--sums", "FOLDER/x"),
    ("report", "--output", "FOLDER/x"), ("index", "FOLDER", f"../dist/{WHEEL}"),
    ("matrix", "1.0", "--work", "FOLDER"), ("regress", "1.0", "--work", "FOLDER"),
    ("upstream", "1.0", "--work", "FOLDER"),
    ("stage", "1.0", "--topic", "attention-signatures", "--without-results", "--work", "FOLDER"),
)  # fmt: skip


@contextmanager
def a_file(place: Place) -> Iterator[str]:
    (place.upstream.root / "file").touch()
    yield "file/below"


@contextmanager
def a_long_name(_place: Place) -> Iterator[str]:
    yield "a" * 300


@contextmanager
def a_loop(place: Place) -> Iterator[str]:
    (place.upstream.root / "loop").symlink_to("loop")
    yield "loop"


@contextmanager
def a_disk_that_is_read_only(place: Place) -> Iterator[str]:
    folder = place.upstream.root / "closed"
    folder.mkdir()
    command = ("mount", "-t", "tmpfs", "-o", "ro", "overlay-fault-test", str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield "closed"
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


@pytest.mark.parametrize("folder", [a_file, a_long_name, a_loop, a_disk_that_is_read_only])
def test_folders_that_cannot_be_made(place: Place, folder: Callable[..., Iterator[str]]) -> None:
    with contextmanager(folder.__wrapped__)(place) as name:  # type: ignore[attr-defined]
        for words in MAKERS:
            named = (word.replace("FOLDER", name) for word in words)
            ended = go(place.command(*named), before=lambda: os.chdir(place.upstream.root))
            require_told(ended, 2, 6)


LONG = "a" * 3000


@pytest.mark.parametrize(
    "words",
    [
        ("verify", LONG), ("normalize", LONG), ("judge", "1.0", LONG, LONG), ("build", LONG),
        ("show", LONG), ("explain", "--gpu", LONG), ("explain", "--gpu", "T4", "--backend", LONG),
        ("doctor", "--python", LONG), ("install", "--python", LONG), ("port", "--to", "1." * 3000),
        ("edit", "1.0", LONG), ("stage", "1.0", "--topic", LONG), ("index", "i", LONG), (LONG,),
        ("refresh", "1.0", "--from", LONG), ("refresh", "1.0", "--drop", LONG),
        ("--root", LONG, "status"), ("--cache", LONG, "status"),
    ],
    ids=lambda words: " ".join(word[:20] for word in words),
)  # fmt: skip
def test_long_arguments(place: Place, words: tuple[str, ...]) -> None:
    require_told(go(place.command(*words), before=lambda: os.chdir(place.upstream.root)), 2, 6)


def test_a_checkout_that_is_read_only(place: Place) -> None:
    """What writes nothing works; what would is told in a sentence."""
    root = place.upstream.root
    for options in (("--bind",), ("-o", "remount,bind,ro")):
        command = ("mount", *options, str(root), str(root))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        for words, status in {
            ("validate", "--all"): 0, ("status",): 0, ("refresh", "--all", "--check"): 0,
            ("normalize", "--all", "--check"): 0, ("lock", "--all", "--dry-run"): 0,
            ("series", "1.0"): 0, ("verify", f"../dist/{WHEEL}"): 0,
            ("build", "1.0", "--out", "../other"): 0, ("report", "--output", "../r.html"): 0,
            ("refresh", "1.0"): 6, ("normalize", "--all"): 6, ("edit", "1.0"): 6,
            ("build", "1.0"): 6, ("report",): 6, ("apply", "1.0"): 6, ("port", "--to", "1.2"): 6,
            ("stage", "1.0", "--topic", "attention-signatures", "--without-results"): 6,
        }.items():  # fmt: skip
            ended = go(place.command(*words), before=lambda: os.chdir(root))
            require_told(ended, status)
            assert "[Errno" not in ended.err, ended
    finally:
        subprocess.run(("umount", "-l", str(root)), check=True)
