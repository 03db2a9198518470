"""Each prefix of a series compiles and imports what is there; what only the whole hides is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream, change, git
from overlay.patches import prefixes
from overlay.patches.imports import Sources

Run = Callable[..., Ran]
USER, HELPER = "user/1.0.patch", "helper/1.0.patch"


def call_it(tree: Path) -> None:
    change(tree / "vllm/attention.py", "import math\n",
           "import math\n\nfrom vllm.chunks import split\n")  # fmt: skip


def add_it(tree: Path) -> None:
    (tree / "vllm/chunks.py").write_text("def split():\n    return 1\n")


@pytest.fixture
def upstream(bare_upstream: Upstream) -> Upstream:
    """The patch that uses a module comes before the one that adds it; the whole is right."""
    bare_upstream.patch(USER, call_it, series=("1.0", "1.1"))
    bare_upstream.patch(HELPER, add_it, series=("1.0", "1.1"), before=(USER,))
    bare_upstream.lock()
    return bare_upstream


def problems(upstream: Upstream, name: str = "1.0") -> list[str]:
    workspace = upstream.workspace()
    result = workspace.apply(workspace.versions.get(name))
    found = prefixes.of_result(workspace, result)
    return list(prefixes.check(workspace, result, found, Sources(workspace.store)))


def test_what_only_the_whole_hides(upstream: Upstream) -> None:
    assert problems(upstream) == [
        f"1.0: after {USER} (1 of 2): vllm/attention.py imports split from vllm.chunks, which is "
        "not there"
    ]


def test_a_move_of_lines_mends_it(upstream: Upstream, run: Run) -> None:
    """The way that the command points to: edit, rebase, refresh; the last tree stays the same."""
    before = upstream.workspace().versions.get("1.0").tree
    assert run("edit", "1.0").status == 0
    tree = upstream.root / "work/edit/1.0"
    git(tree, "-c", "sequence.editor=sed -i '1{h;d};2{G}'", "rebase", "-q", "-i", "v1.0")
    assert run("refresh", "1.0").status == 0
    assert problems(upstream) == []
    assert upstream.workspace().versions.get("1.0").tree == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("match 1:\n    case 1:\n        pass\n", "does not compile on Python 3.9"),
        ("def f(:\n", "does not compile on Python 3.9"),
        ("return 1\n", "line 1 does not compile on Python 3.9: 'return' outside function"),
        ("import vllm.nowhere\n", "vllm/new.py imports vllm.nowhere, which is not there"),
        ("from vllm import nothing\n", "vllm/new.py imports nothing from vllm, which is not there"),
    ],
)
def test_what_a_prefix_must_not_have(bare_upstream: Upstream, text: str, told: str) -> None:
    def write(tree: Path) -> None:
        (tree / "vllm/new.py").write_text(text)

    bare_upstream.patch(USER, write, series=("1.0",))
    (problem,) = problems(bare_upstream)
    assert told in problem


def test_what_is_there_or_of_others(bare_upstream: Upstream) -> None:
    """Names that a star brings, packages of others, and what upstream itself lacks."""
    text = "import torch\nfrom os import path\nfrom vllm.every import anything\n"

    def write(tree: Path) -> None:
        (tree / "vllm/every.py").write_text("from math import *\n")
        (tree / "vllm/new.py").write_text(text)
        (tree / "tests/test_new.py").write_text("from vllm.attention import XFormersImpl\n")
        (tree / "vllm/data/config.json").write_text("{ }\n")

    bare_upstream.patch(USER, write, series=("1.0",))
    assert problems(bare_upstream) == []


def test_the_oldest_python_of_a_release(upstream: Upstream) -> None:
    release = upstream.workspace().versions.get("1.0")
    for requires, wanted in ((">=3.9", (3, 9)), ("<3.13,>=3.10", (3, 10)), (">3.11", (3, 12))):
        one = release.model_copy(update={"requires_python": requires})
        assert prefixes.floor(one) == wanted


def test_the_command(upstream: Upstream, run: Run) -> None:
    (upstream.root / "tests/regress").mkdir(parents=True)
    (upstream.root / "tests/wheels.ini").write_text("[pytest]\n")
    ran = run("validate", "--all", "--each")
    assert ran.status == 1
    assert f"1.0: after {USER} (1 of 2): vllm/attention.py imports split" in ran.err
    wanted = "2 of 2 prefixes compiled; not run: imports and tests of 3 trees (--run); 1 problem\n"
    assert f"1.0: {wanted}1.1: {wanted}" in ran.out
    said = json.loads(run("validate", "1.1", "--each", "--json").out)["each"]["1.1"]
    assert (said["compiled"], said["trees_not_run"], len(said["problems"])) == (2, 3, 1)
    assert run("validate", "--all").status == 0
    for wrong in (("--run",), ("--keep",), ("--each", "--keep")):
        assert run("validate", "--all", *wrong).status == 2


def test_a_patch_that_does_not_apply_ends_it(upstream: Upstream, run: Run) -> None:
    file = upstream.patches / HELPER
    file.write_bytes(file.read_bytes().replace(b"new file mode 100644\n", b""))
    assert len(problems(upstream)) == 1
