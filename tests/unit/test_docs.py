"""Every command line of the README and of the page of each audience is run.

Here, on made-up releases; or by `.ci/run` on real ones, and then this looks that it is so.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from made_upstream import (
    IMPL,
    SDIST,
    WHEEL,
    Upstream,
    accept_use_irope,
    accepted,
    add_arm_wheel,
    change,
    double,
    package,
    release,
    write_wheel,
)
from overlay.cli.main import COMMANDS, cli
from overlay.releases import archive, versions
from overlay.releases.uv import find_uv
from overlay.wheels import plan
from overlay.wheels.origin import Origin

from .inplace.test_inplace import put

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/user.md", "docs/packager.md")
FENCE = re.compile(
    r"(?:<!-- (?P<name>[a-z ]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL
)
CI = (ROOT / ".ci/run").read_text()
#: The made-up release for each that the pages name.
RELEASES = {
    "0.8.5.post1": "1.0", "0.8.3": "1.0", "0.10.2": "1.1", "0.9.1": "1.1", "0.9.2": "1.2",
}  # fmt: skip
#: Blocks that need real releases, and the text by which .ci/run runs them.
BY_CI = {
    ("README.md", "build"): ("$(readme build)",),
    ("README.md", "test"): ("$(readme test)",),
    ("CONTRIBUTING.md", "test"): (
        "'each(0.10.2)'",
        "'regress(0.10.2)'",
        "'upstream(0.10.2)'",
        "'matrix(0.10.2)'",
    ),
    ("CONTRIBUTING.md", "nox"): ("$(readme test)", "nox --list", "'regress(0.10.2)'"),
    ("docs/packager.md", "compile"): ("'source(0.8.5.post1)'",),
}


def blocks(page: str) -> dict[str, str]:
    """The blocks of command lines in a page by name."""
    found = {}
    for match in FENCE.finditer((ROOT / page).read_text("utf-8")):
        if match["language"]:
            assert match["language"] == "sh", f"{page}: what is {match['language']}?"
            assert match["name"] is not None, f"{page}: no name above {match['text']}"
            assert match["name"] not in found, f"{page}: two blocks are called {match['name']}"
            found[match["name"]] = match["text"]
    return found


BLOCKS = {(page, name): text for page in PAGES for name, text in blocks(page).items()}


@dataclass(frozen=True)
class Shell:
    """A shell in a made-up checkout, with .venv, that has the overlay, pip and uv."""

    upstream: Upstream
    root: Path
    """The checkout that the overlay works on."""
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        upstream: Upstream,
        root: Path | None = None,
        official: Path | None = None,
        **variables: str,
    ) -> Shell:
        made = cls(upstream, root or upstream.root, variables)
        made.write_shims()
        stock = upstream.served / WHEEL
        put("uv", official or stock, made.venv)
        return made

    @property
    def venv(self) -> Path:
        return self.upstream.root / ".venv"

    @property
    def shims(self) -> Path:
        return self.upstream.root.parent / "shims"

    @property
    def version(self) -> str:
        """The dist-info folder in .venv."""
        (info,) = self.venv.glob("lib/python*/site-packages/vllm-*.dist-info")
        return info.name

    def write_shims(self) -> None:
        self.shims.mkdir()
        here = ("--root", self.root, "--cache", self.upstream.cache,
                "--find-links", self.upstream.served)  # fmt: skip
        for name, command in {
            "vllm-overlay": (sys.executable, "-m", "overlay", *here),
            "pip": (sys.executable, "-m", "pip", "--python", self.venv / "bin/python"),
            "uv": (find_uv(),),
        }.items():
            (self.shims / name).write_text(
                f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n'
            )
            (self.shims / name).chmod(0o755)

    def run(self, page: str, name: str, **replaced: str) -> str:
        """Run a block with the releases made up, and some text replaced; it must succeed."""
        text = BLOCKS[page, name]
        for old, new in (*replaced.items(), *RELEASES.items()):
            assert old in text or old in RELEASES, f"{page}: {name} has no {old}"
            text = text.replace(old, new)
        folder = self.upstream.root
        nothing = (folder / "empty").as_uri()  # in place of the public index
        (folder / "empty").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "GIT_"))}
        env = {
            **kept, "PATH": f"{self.shims}:{os.environ['PATH']}", "VIRTUAL_ENV": str(self.venv),
            "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": nothing, "UV_NO_CONFIG": "1",
            "UV_INDEX_URL": nothing, "UV_CACHE_DIR": str(folder / "uv"),
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "A Tester", "GIT_AUTHOR_EMAIL": "tester@example.org",
            "GIT_COMMITTER_NAME": "A Tester", "GIT_COMMITTER_EMAIL": "tester@example.org",
            **self.variables,
        }  # fmt: skip
        command = ["bash", "-euxo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_each_block_is_run_somewhere() -> None:
    here = Path(__file__).read_text()
    for page, name in BLOCKS.keys() - BY_CI.keys():
        assert f'run("{page}", "{name}"' in here or f'("{page}", "{name}")' in here
    assert BY_CI.keys() <= BLOCKS.keys()


@pytest.mark.parametrize("block", BY_CI, ids=" ".join)
def test_what_ci_runs(block: tuple[str, str]) -> None:
    assert [text for text in BY_CI[block] if text not in CI] == []


def test_the_sessions_of_ci_are_the_command_lines() -> None:
    """A session runs `vllm-overlay` with just the words that a page shows."""
    sessions = (ROOT / "noxfile.py").read_text()
    lines = BLOCKS["CONTRIBUTING.md", "test"] + BLOCKS["docs/packager.md", "compile"]
    for line in lines.splitlines():
        _, name, _, *options = line.split()
        assert f'"{name}", release' in sessions
        assert ", ".join(f'"{option}"' for option in options) in sessions


def test_the_result_is_what_build_writes() -> None:
    known = versions.load(ROOT / "VERSIONS.toml")
    shown = (ROOT / "README.md").read_text().split("<!-- result -->\n```\n")[1].split("```")[0]
    name = plan.file_name(known, Origin.official(known.get("0.8.5.post1")))
    assert shown == f"pip install '…/dist/{name}'\n"


def test_the_dockerfile(upstream: Upstream) -> None:
    """Its install, run here on .venv; that the image is as it expects only a registry can tell."""
    text = (ROOT / "docs/Dockerfile").read_text()
    (flags,) = re.findall(r"bin/vllm-overlay (install .*?) \\\n", text)
    shell = Shell.make(upstream)
    BLOCKS["docs/Dockerfile", "install"] = f"vllm-overlay {flags}"
    try:
        shell.run("docs/Dockerfile", "install", **{"/usr/bin/python3": ".venv"})
    finally:
        del BLOCKS["docs/Dockerfile", "install"]
    assert shell.version == "vllm-1.0+llama4.1.dist-info"


def test_the_dockerfile_gets_what_git_has() -> None:
    """What git ignores, environments and wheels among it, is not sent to the builder either."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    left_out = (ROOT / "docs/Dockerfile.dockerignore").read_text().splitlines()[1:]
    assert {".git", *(line.strip("/") for line in ignored)} == {
        line.removeprefix("**/") for line in left_out
    }


def test_install_of_the_readme(upstream: Upstream) -> None:
    shell = Shell.make(upstream)
    shell.run("README.md", "install", **{".venv/bin/": "", "/usr/bin/python3": ".venv"})
    assert shell.version == "vllm-1.0+llama4.1.dist-info"


@pytest.mark.parametrize(
    "block",
    [("docs/user.md", "wheel"), ("docs/user.md", "index"), ("docs/packager.md", "index")],
    ids=" ".join,
)
def test_what_installs_a_wheel(upstream: Upstream, block: tuple[str, str]) -> None:
    shell = Shell.make(upstream)
    shell.run("docs/packager.md", "build")
    shell.run(*block)
    assert shell.version == "vllm-1.0+llama4.1.dist-info"


def test_in_place(upstream: Upstream) -> None:
    shell = Shell.make(upstream)
    out = shell.run("docs/user.md", "in place")
    assert "Version: 1.0+llama4.1" in out
    assert shell.version == "vllm-1.0.dist-info"


def test_back_to_upstream(upstream: Upstream) -> None:
    shell = Shell.make(upstream, PIP_FIND_LINKS=str(upstream.served))
    shell.run("docs/user.md", "wheel")
    shell.run("docs/user.md", "back")
    assert shell.version == "vllm-1.0.dist-info"


def test_what_one_gets(upstream: Upstream) -> None:
    """On the real matrix. doctor finds a stock 0.8.3, and exits as the page says."""
    stock = upstream.root.parent / "vllm-0.8.3-cp38-abi3-manylinux1_x86_64.whl"
    write_wheel(stock, "0.8.3", package("1.0"))
    shell = Shell.make(upstream, ROOT, stock)
    asked = [line for line in BLOCKS["docs/user.md", "doctor"].splitlines() if "doctor" in line]
    out = shell.run("docs/user.md", "doctor", **{one: f"{one} || test $? = 1" for one in asked})
    assert "To change: " in out
    assert "0.10.2" in out
    last = BLOCKS["docs/user.md", "weights"].splitlines()[-1]
    out = shell.run("docs/user.md", "weights", **{last: f"{last} || test $? = 1"})
    assert "0.8.3 – 0.8.5.post1 with --quantization moe_wna16" in " ".join(out.split())
    last = BLOCKS["docs/user.md", "flags"].splitlines()[-1]
    out = shell.run("docs/user.md", "flags", **{last: f"{last} || test $? = 1"})
    assert "stock wrong, V1 FlashAttention" in " ".join(out.split())


def test_what_packagers_do_with_another_build(upstream: Upstream) -> None:
    shell = Shell.make(upstream)
    name = "vllm-1.0+cu118-cp38-abi3-manylinux1_x86_64.whl"
    write_wheel(shell.root / name, "1.0+cu118", {**package("1.0"), "vllm/_C.abi3.so": b"other"})
    out = shell.run("docs/packager.md", "other build")
    assert (
        f"vllm-1.0+cu118.llama4.1-cp38-abi3-manylinux1_x86_64.whl: verified against {name}" in out
    )


def test_what_packagers_do_for_arm(upstream: Upstream) -> None:
    shell = Shell.make(upstream)
    add_arm_wheel(upstream, RELEASES["0.10.2"], {"vllm/_C.abi3.so": b"for Arm"})
    assert "_aarch64.whl: verified\n" in shell.run("docs/packager.md", "arm")


def test_what_packagers_do(upstream: Upstream) -> None:
    shell = Shell.make(upstream)
    shell.run("docs/packager.md", "build")
    for folder in ("dist", "SHA256SUMS"):
        assert (upstream.root / folder).exists()
    shell.run("docs/packager.md", "offline")
    assert (upstream.root / "mirror/files").is_dir()
    assert "use_irope" in shell.run("docs/packager.md", "sources")


@pytest.mark.skipif(shutil.which("quilt") is None, reason="quilt is not installed")
def test_quilt(upstream: Upstream) -> None:
    shell = Shell.make(upstream, OVERLAY=str(upstream.root), QUILT_PC=".pc")
    (upstream.root / "source").mkdir()
    archive.unpack(upstream.served / SDIST, upstream.root / "source")
    cd = {"QUILT_PATCHES": "cd source/vllm-1.0 && QUILT_PATCHES"}
    shell.run("docs/packager.md", "quilt", **cd)
    assert "use_irope" in (upstream.root / "source/vllm-1.0/vllm/attention.py").read_text()


SUBJECTS = {
    "engine-selection": "[Core] Select engine and backend for chunked local attention together",
    "v1-flex-local": "[Bugfix] Chunked local attention in V1 FlexAttention",
}


@pytest.fixture
def maintained(bare_upstream: Upstream) -> Upstream:
    """The topics that CONTRIBUTING.md speaks of, and a release with which one of them conflicts."""
    made, first = bare_upstream, "engine-selection/1.0.patch"
    both = ("1.0", "1.1")
    made.patch(first, accept_use_irope, series=both, subject=SUBJECTS["engine-selection"])
    made.patch("v1-flex-local/1.1.patch", double, series=("1.1",),
               subject=SUBJECTS["v1-flex-local"], before=(first,))  # fmt: skip
    made.lock()
    release(
        made, "1.2", {"vllm/attention.py": IMPL.replace("return query *", "return 1 * query *")}
    )
    return made


def test_the_life_of_a_patch(maintained: Upstream) -> None:
    """CONTRIBUTING.md from top to bottom, with what a person does in between."""
    shell = Shell.make(maintained, GIT_SEQUENCE_EDITOR="true")
    out = shell.run("CONTRIBUTING.md", "look")
    assert SUBJECTS["engine-selection"] in out
    edited = "sed -i s/use_irope=False/use_irope=None/ vllm/attention.py\ngit commit --all"
    shell.run("CONTRIBUTING.md", "edit", **{"git commit --all": edited})
    shell.run("CONTRIBUTING.md", "refresh")
    patch = maintained.patches / "engine-selection/1.0.patch"
    assert "use_irope=None" in patch.read_text()
    assert "0 problems" in shell.run("CONTRIBUTING.md", "validate")
    assert "unknown: there is no vllm/model_executor" in shell.run("CONTRIBUTING.md", "probe")
    out = shell.run("CONTRIBUTING.md", "port", **port_by_hand(maintained))
    assert "1.2" in versions.load(maintained.root / "VERSIONS.toml").releases
    shell.run("CONTRIBUTING.md", "validate")
    shell.run("CONTRIBUTING.md", "stage", **{"--dry-run": "--dry-run --without-results"})
    dropping = Shell(
        maintained, maintained.root, {"GIT_SEQUENCE_EDITOR": "sed -i /FlexAttention/d"}
    )
    dropping.run("CONTRIBUTING.md", "drop")
    assert "flex" not in (maintained.patches / "series/1.1").read_text()
    shell.run("CONTRIBUTING.md", "validate")


def port_by_hand(made: Upstream) -> dict[str, str]:
    """The conflict that port stops at, solved."""
    solved = made.root / "solved.py"
    text = accepted().replace("use_irope=False", "use_irope=None")
    solved.write_text(text)
    change(solved, "query * self.scale", "1 * query * self.scale * 2")
    tree = "work/port/1.2/v1-flex-local"
    return {
        "--from 0.9.1": "--from 0.9.1 || test $? = 5",
        "vllm-overlay port --continue":
            f"cp solved.py {tree}/vllm/attention.py\ngit -C {tree} add vllm\n"
            "vllm-overlay port --continue",
    }  # fmt: skip


INLINE = re.compile(r"`(?P<text>vllm-overlay [^`]+)`")
SPANS = [
    (page, " ".join(match["text"].split()))
    for page in PAGES
    for match in INLINE.finditer((ROOT / page).read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "text"), SPANS, ids=[f"{p} {t}" for p, t in SPANS])
def test_commands_in_sentences_exist(page: str, text: str) -> None:
    """Each command that a sentence or a table names, and each of its options."""
    name = next(word for word in text.split()[1:] if not word.startswith("-"))
    assert name in COMMANDS, f"{page}: {text}"
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {o for p in (*cli.params, *command.params) for o in (*p.opts, *p.secondary_opts)}
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", text)) <= options, f"{page}: {text}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def promises() -> dict[str, str]:
    """What SECURITY.md says of the tests that hold each promise."""
    table = (ROOT / "SECURITY.md").read_text("utf-8").split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert all(len(row) == 3 for row in rows)
    return {promise: tests for promise, _, tests in rows}


def functions(file: Path) -> set[str]:
    """The names of the tests in a module."""
    return {node.name for node in ast.parse(file.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


@pytest.mark.parametrize("promise", promises())
def test_each_promise_names_tests_that_exist(promise: str) -> None:
    told = promises()[promise]
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", told)
    assert told == (", ".join(f"`{file}::{name}`" for file, name in named) or "none: GitHub's")
    for file, name in named:
        assert name in functions(ROOT / "tests" / file), f"{file}::{name}"


def test_nearly_all_promises_are_held() -> None:
    assert [promise for promise, told in promises().items() if "::" not in told] == [
        "A released wheel can be traced to the workflow that built it."
    ]
