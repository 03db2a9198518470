"""The command as a user meets it: exit statuses, one line an error, nothing half-done."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream, snapshot
from overlay.cli.main import COMMANDS
from overlay.wheels.build import build_wheel

from ..made_matrix import keep

Run = Callable[..., Ran]


@pytest.mark.parametrize("name", [None, *sorted(COMMANDS)])
def test_every_command_has_help_with_an_example(run: Run, name: str | None) -> None:
    ran = run(*([name] if name else []), "--help")
    assert ran.status == 0
    assert "Example:\n" in ran.out
    assert "Exit status:" in ran.out


def test_build_and_verify(run: Run, tmp_path: Path) -> None:
    built = run("build", "1.0", "--out", str(tmp_path / "dist"))
    assert built.status == 0, built.err
    (path,) = (tmp_path / "dist").iterdir()
    assert f"pip install '{path}'" in built.out
    verified = run("verify", str(path))
    assert verified.status == 0, verified.err
    assert verified.out.count(" ok ") == 8
    assert verified.out.endswith(f"{path.name}: verified\n")


def test_build_json(run: Run, tmp_path: Path) -> None:
    found = json.loads(run("build", "1.0", "--out", str(tmp_path), "--json").out)
    assert set(found) == {"file", "sha256", "size"}
    assert Path(found["file"]).stat().st_size == found["size"]


def test_patched_sdist(run: Run, tmp_path: Path) -> None:
    assert run("build", "1.1", "--sdist", "--out", str(tmp_path)).status == 0
    assert (tmp_path / "vllm-1.1+llama4.1.tar.gz").is_file()


def test_apply(run: Run, tmp_path: Path) -> None:
    ran = run("apply", "1.1", str(tmp_path / "tree"))
    assert ran.status == 0, ran.err
    assert "attention-signatures/1.0.patch: offset (offset +3)" in ran.out
    again = run("apply", "1.1", str(tmp_path / "tree"))
    assert again.status == 6
    assert "is in the way" in again.err


def test_fetch_prints_paths(run: Run, upstream: Upstream) -> None:
    ran = run("fetch", "1.0", "--wheel")
    assert ran.out.strip() == str(upstream.cache / "files/vllm-1.0-cp38-abi3-manylinux1_x86_64.whl")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("build", "1.2"), 2, "Did you mean 1.0 or 1.1"),
        (("build", "0.9"), 2, "release 0.9 has no patches"),
        (("build",), 2, "name a release, or a wheel of one with --wheel"),
        (("build", "1.0", "--fuzz"), 2, "No such option"),
        (("build", "1.0", "--source"), 2, "--source goes with --target"),
        (("fetch",), 2, "name one or more releases, or pass --all"),
        (("fetch", "1.0", "--all"), 2, "not both"),
        (("apply", "1.0", "--until", "nothing"), 2, "no topic 'nothing'"),
        (("verify", "gone.whl"), 2, "there is no such file"),
        (("biuld", "1.0"), 2, "No such command"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], status: int, text: str) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_judge(run: Run, tmp_path: Path) -> None:
    """Two runs made elsewhere: problems are exit status 1, another file is wrong usage."""
    xml = '<testsuite><testcase classname="gpu" name="a">{}</testcase></testsuite>'
    passed, failed, other = (tmp_path / name for name in ("passed.xml", "failed.xml", "other"))
    passed.write_text(xml.format(""))
    failed.write_text(xml.format('<failure message="wrong answers">where</failure>'))
    other.write_text("no XML")
    good = run("judge", "1.0", str(passed), str(passed), "--markdown")
    assert (good.status, good.err) == (0, "")
    assert "1.0: 0 FAIL_TO_PASS, 1 PASS_TO_PASS, 0 skipped, 0 problems" in good.out
    bad = run("judge", "1.0", str(passed), str(failed))
    assert bad.status == 1
    assert "failed on patched: wrong answers" in bad.err
    refused = run("judge", "1.0", str(passed), str(other))
    assert (refused.status, refused.err.count("\n")) == (2, 1)


def test_what_only_looks_or_builds_leaves_the_checkout_alone(
    run: Run, upstream: Upstream, tmp_path: Path
) -> None:
    """VERSIONS.toml and patches/ are other commands' to write."""
    keep(upstream.root, "1.0", "1.1")
    before = snapshot(upstream)
    wheel = tmp_path / "dist/vllm-1.0+llama4.1-cp38-abi3-manylinux1_x86_64.whl"
    for words in (
        ("fetch", "--all"), ("validate", "--all"), ("status",), ("series", "1.0"),
        ("show", "attention-signatures"), ("build", "1.0", "--out", str(tmp_path / "dist")),
        ("build", "1.0", "--sdist", "--out", str(tmp_path / "dist")), ("verify", str(wheel)),
        ("selfcheck", "1.0"), ("index", str(tmp_path / "simple"), str(wheel)),
        ("apply", "1.0", str(tmp_path / "tree")), ("edit", "1.0"), ("refresh", "--all", "--check"),
        ("normalize", "--all", "--check"), ("lock", "--all", "--dry-run"), ("watch",),
        ("explain", "--gpu", "T4"),
    ):  # fmt: skip
        ran = run(*words)
        assert ran.status == 0, (words, ran.err)
        assert snapshot(upstream) == before, words


def test_offline_with_an_empty_cache(run: Run, tmp_path: Path) -> None:
    ran = run("build", "1.0", flags=("--offline", "--cache", str(tmp_path / "empty")))
    assert ran.status == 3
    assert ran.err.count("\n") == 1
    assert "vllm-1.0.tar.gz is not in the cache" in ran.err


def test_patch_that_does_not_apply(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    file = upstream.patches / "attention-signatures/1.0.patch"
    file.write_text(file.read_text().replace("     def __init__", "     def __new__").replace(
        " self.num_heads = num_heads", " self.count = num_heads"))  # fmt: skip
    ran = run("build", "1.0", "--out", str(tmp_path / "dist"))
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert "hunk 1" in ran.err
    assert not (tmp_path / "dist").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_dist(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert run("build", "1.0", "--out", str(tmp_path / "dist")).status == 6


@pytest.mark.parametrize("option", ["cache", "dist"])
def test_a_file_where_a_folder_should_be(run: Run, tmp_path: Path, option: str) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    flags = ("--cache", str(blocker / "x")) if option == "cache" else ()
    out = ("--out", str(blocker / "x")) if option == "dist" else ()
    ran = run("build", "1.0", *out, flags=flags)
    assert ran.status == 6
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err


def test_a_process_of_its_own_ends_with_one_line_and_the_status(upstream: Upstream) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overlay", "--root", str(upstream.root), "build", "1.2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_no_overlay_here(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overlay", "--root", str(tmp_path), "validate", "--all"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no VERSIONS.toml" in done.stderr


ROOT = Path(__file__).parents[3]


def of_its_own(home: Path, *words: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the tool in a process of its own, which finds commands in `path`."""
    return subprocess.run(
        [sys.executable, *words], env={"PATH": path, "HOME": str(home)}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_help_imports_no_command(tmp_path: Path) -> None:
    """Nor what commands work with: it is there at once."""
    script = (
        "import atexit, sys; from overlay.cli.main import main; sys.argv[1:] = ['--help']; "
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    )
    done = of_its_own(tmp_path, "-c", script, path=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "overlay.cli.main" in loaded
    assert not {name for name in loaded if name.startswith(("overlay.patches", "overlay.answers"))}
    assert not loaded & {"git", "pydantic", "httpx2"}


def test_help_fits_a_terminal(run: Run) -> None:
    _, commands = run("--help").out.split("Commands:\n")
    for line in commands.splitlines():
        assert len(line) <= 80, line
        assert not line.endswith("..."), line


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("--version",), 0),
        (("explain", "--release", "0.8.3", "--gpu", "T4"), 0),
        (("verify", "nowhere.whl"), 2),
        (("show", "engine-selection"), 6),
    ],
)
def test_without_git(tmp_path: Path, words: tuple[str, ...], status: int) -> None:
    """What needs none works; the rest says so in a line."""
    done = of_its_own(tmp_path, "-m", "overlay", *words, path="/nonexistent")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert ("git is missing" in done.stderr) is (status == 6)


def test_verify_and_doctor_without_git(upstream: Upstream, tmp_path: Path) -> None:
    """Of a wheel and of what is installed from it, against patches that are read without git."""
    workspace = upstream.workspace()
    wheel = build_wheel(workspace, workspace.versions.get("1.0"), tmp_path / "dist").path
    keep(upstream.root, "1.0", "1.1")
    site = tmp_path / "venv/site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    python = tmp_path / "venv/python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps([str(site)])}'\n")
    python.chmod(0o755)
    flags = ["--root", str(upstream.root), "--cache", str(tmp_path / "empty"), "--offline"]
    for words in (["verify", str(wheel)], ["doctor", "--python", str(python), "--gpu", "A10"]):
        done = of_its_own(tmp_path, "-m", "overlay", *flags, *words, path="/nonexistent")
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from overlay.cli.main import cli; cli(prog_name='vllm-overlay')"],
        env={
            "HOME": str(tmp_path), "_VLLM_OVERLAY_COMPLETE": "bash_complete",
            "COMP_WORDS": "vllm-overlay ex", "COMP_CWORD": "1",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "plain,explain\n", done.stderr


@pytest.mark.parametrize("command", [["--help"], ["series", "1.0"], ["status"]])
@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream(upstream: Upstream, command: list[str], stream: int) -> None:
    """The exit status tells, and nothing is called a fault of ours."""
    arguments = [*root_flags(upstream), *command]
    line = f"exec {sys.executable} -m overlay {shlex.join(arguments)} {stream}>&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "internal error:" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_while_modules_are_read(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'rich.console': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from overlay.__main__ import main\n"
        "main()\n"
    )
    done = of_its_own(tmp_path, "-c", code, path=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_reader_that_has_enough(upstream: Upstream) -> None:
    """As other tools end then: by SIGPIPE's number, without a word."""
    command = [sys.executable, "-m", "overlay", *root_flags(upstream), "series", "1.0"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("command", [["--help"], ["validate", "1.0"], ["series", "1.0"]])
def test_an_ascii_locale(upstream: Upstream, command: list[str]) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-m", "overlay", *root_flags(upstream), *command]
    done = subprocess.run(arguments, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def root_flags(upstream: Upstream) -> list[str]:
    return [
        "--root", str(upstream.root), "--cache", str(upstream.cache), "--find-links",
        str(upstream.served),
    ]  # fmt: skip
