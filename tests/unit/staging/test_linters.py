"""Upstream's linters: what its config asks for, and which findings are new."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from overlay.base.errors import OverlayError
from overlay.staging import linters
from overlay.staging.linters import Finding, Hook, hooks, new

CONFIG = """
exclude: 'vllm/third_party/.*'
repos:
- repo: https://github.com/google/yapf
  rev: v0.43.0
  hooks:
  - id: yapf
    args: [--in-place, --verbose]
    additional_dependencies: [toml]
    exclude: '(benchmarks|examples)/.*'
- repo: https://github.com/astral-sh/ruff-pre-commit
  rev: v0.11.7
  hooks:
  - id: ruff
    args: [--output-format, github, --fix]
  - id: ruff-format
    files: ^(benchmarks|examples)/.*
- repo: https://github.com/codespell-project/codespell
  rev: v2.4.0
  hooks:
  - id: codespell
    args: ['--toml', 'pyproject.toml']
- repo: https://github.com/PyCQA/isort
  rev: 0a0b7a830386ba6a31c2ec8316849ae4d1b8240d # 6.0.0
  hooks:
  - id: isort
- repo: https://github.com/rhysd/actionlint
  rev: v1.7.7
  hooks:
  - id: actionlint
- repo: local
  hooks:
  - id: mypy-local
    entry: tools/mypy.sh 0 "local"
    language: python
    types: [python]
    stages: [pre-commit]
  - id: check-regex
    entry: python tools/check.py
    language: python
    types: [python]
    pass_filenames: false
    additional_dependencies: [regex]
  - id: shellcheck
    entry: tools/shellcheck.sh
    language: script
    types: [shell]
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Hook]:
    return {hook.name: hook for hook in hooks(CONFIG)[0]}


def test_versions_and_arguments_are_upstream_s(found: dict[str, Hook]) -> None:
    assert list(found) == [
        "yapf 0.43.0", "ruff 0.11.7", "ruff-format 0.11.7", "codespell 2.4.0", "isort 6.0.0",
        "check-regex",
    ]  # fmt: skip
    yapf, isort = found["yapf 0.43.0"], found["isort 6.0.0"]
    assert (yapf.requirement, yapf.needs) == ("yapf==0.43.0", ("toml",))
    assert yapf.command == ("yapf", "--in-place")
    assert isort.command == ("isort", "--filter-files")  # the default of its hook
    assert found["codespell 2.4.0"].command == ("codespell", "--toml", "pyproject.toml")
    assert not {"--fix", "github"} & set(found["ruff 0.11.7"].command)


def test_what_is_left_out_is_told() -> None:
    assert hooks(CONFIG)[1] == ("mypy-local",)


def test_filters(found: dict[str, Hook]) -> None:
    paths = ["vllm/a.py", "vllm/third_party/b.py", "examples/c.py", "README.md"]
    assert found["yapf 0.43.0"].of(paths) == ["vllm/a.py"]
    assert found["ruff 0.11.7"].of(paths) == ["vllm/a.py", "examples/c.py"]
    assert found["ruff-format 0.11.7"].of(paths) == ["examples/c.py"]
    assert found["codespell 2.4.0"].of(paths) == ["vllm/a.py", "examples/c.py", "README.md"]


@pytest.mark.parametrize(
    "config", ["a: [", "[]", "repos: [{repo: x}]", CONFIG.replace(" # 6.0.0", "")]
)
def test_a_config_that_can_t_be_read(config: str) -> None:
    with pytest.raises(OverlayError, match="can't be read"):
        hooks(config)


def test_only_what_is_new_counts() -> None:
    before = [Finding("ruff", "a.py", 3, "E501 Line too long (90 > 80)")]
    moved = Finding("ruff", "a.py", 9, "E501 Line too long (90 > 80)")
    second = Finding("ruff", "a.py", 12, "E501 Line too long (85 > 80)")
    other = Finding("ruff", "b.py", 3, "E501 Line too long (90 > 80)")
    assert list(new(before, [moved, second, other])) == [second, other]


def in_a_tree(
    tree: Path, monkeypatch: pytest.MonkeyPatch, script: str, *paths: str
) -> list[Finding]:
    """What a hook finds whose program is `script`, without uv."""
    (tree / "run").write_text(f"#!/bin/sh\n{script}\n")
    (tree / "run").chmod(0o755)
    monkeypatch.setattr(linters, "_uv", lambda hook: ["-c", 'shift; exec "$@"', "x", "x"])
    monkeypatch.setattr(linters, "find_uv", lambda: "/bin/sh")
    hook = Hook("made", ("./run",), None, (), "", "^$", True, True)
    return linters.run(hook, tree, paths, offline=False)


SAYS = 'case "$*" in *--version*) exit 0;; esac; '


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("exit 0", []),
        ("echo a.py:1:2: fine; exit 0", []),
        ("echo a.py:1:2: E1 bad; echo Found 1 error.; exit 1", ["a.py:1: E1 bad [made]"]),
        ("echo $PWD/a.py:2: bad >&2; exit 65", ["a.py:2: bad [made]"]),
        ("echo \"x a.py:3: import y\"; exit 1", ["a.py:3: import y [made]"]),
        ("echo wrong files:; echo '  a.py'; exit 1", ["a.py [made]"]),
        ("echo no; exit 1", ["no [made]"]),
        ("exit 1", ["it failed and said nothing [made]"]),
        ("echo 'x = 1' > a.py; exit 1", ["a.py:1: has 'x=1', wants 'x = 1' [made]"]),
        ("echo 'x = 1' > a.py", ["a.py:1: has 'x=1', wants 'x = 1' [made]"]),
    ],
)  # fmt: skip
def test_what_programs_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, wanted: list[str]
) -> None:
    (tmp_path / "a.py").write_text("x=1\n")
    found = in_a_tree(tmp_path, monkeypatch, SAYS + script, "a.py")
    assert [str(one) for one in found] == wanted
    assert (tmp_path / "a.py").read_text() == "x=1\n"


def test_a_linter_that_can_t_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("x=1\n")
    with pytest.raises(OverlayError, match=r"made can't be run: no such version\. Check"):
        in_a_tree(tmp_path, monkeypatch, "echo no such version. >&2; exit 1", "a.py")


def test_a_linter_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if "--version" not in words:
            raise subprocess.TimeoutExpired(words, linters.TIMEOUT)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", hang)
    (tmp_path / "a.py").write_text("x=1\n")
    with pytest.raises(OverlayError, match="no end after"):
        in_a_tree(tmp_path, monkeypatch, "", "a.py")
