"""A conflict names the earlier patches that touched its lines, and nobody where upstream did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import (
    IMPL,
    Ran,
    Upstream,
    accept_use_irope,
    accepted,
    change,
    copied,
    git,
    make_releases,
    release,
)
from overlay.patches.tree import ApplyStatus

Run = Callable[..., Ran]
FIRST = "attention-signatures/1.0.patch"
SCALE = "scale/1.0.patch"


def scale_by_two(tree: Path) -> None:
    """Two lines below the signature: its context has the line that the first topic changes."""
    change(tree / "vllm/attention.py", "self.num_heads = num_heads", "self.num_heads = 2")


def stated(tree: Path) -> None:
    change(tree / "vllm/attention.py", "class XFormersImpl:\n", "class XFormersImpl:\n    # V0\n")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two topics in one place: the second one's context is the first one's line."""
    folder = tmp_path_factory.mktemp("guilt")
    upstream = make_releases(folder)
    both = ("1.0", "1.1")
    upstream.patch("note/1.0.patch", stated, series=both, subject="[Misc] Note")
    upstream.patch(FIRST, accept_use_irope, series=both, before=("note/1.0.patch",))
    upstream.patch(SCALE, scale_by_two, series=both, subject="[Bugfix] Double it",
                   before=("note/1.0.patch", FIRST))  # fmt: skip
    upstream.lock()
    return folder


@pytest.fixture
def upstream(template: Path, tmp_path: Path) -> Upstream:
    return copied(template, tmp_path)


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


#: Commands that need a whole series, and stop where it conflicts.
STOPPED = [("apply", "1.0"), ("edit", "1.0"), ("validate", "1.0"), ("build", "1.0")]


@pytest.mark.parametrize("command", STOPPED, ids=" ".join)
def test_who_wrote_what_is_there(run: Run, upstream: Upstream, command: tuple[str, ...]) -> None:
    rewrite(upstream.patches / SCALE, "use_irope=False", "use_irope=True")
    ran = run(*command)
    assert ran.status in (1, 5)
    assert f"{FIRST} wrote line 9" in ran.err
    assert "note/1.0.patch" not in ran.err.replace(f"{FIRST} wrote", "")


def test_who_removed_what_is_expected(run: Run, upstream: Upstream) -> None:
    """The patch was made without the first topic."""
    rewrite(upstream.patches / SCALE, "num_heads, scale, use_irope=False)", "num_heads, scale)")
    ran = run("validate", "1.0")
    assert f"{FIRST} removed what is expected" in ran.err
    assert f"{FIRST} wrote line 9" in ran.err


def test_upstreams_own_lines_name_nobody(run: Run, upstream: Upstream) -> None:
    rewrite(upstream.patches / SCALE, "-        self.num_heads = num_heads",
            "-        self.heads = num_heads")  # fmt: skip
    ran = run("validate", "1.0")
    assert "expects '        self.heads = num_heads'" in ran.err
    assert "wrote" not in ran.err
    assert "removed" not in ran.err


def test_several_places_that_a_patch_made(bare_upstream: Upstream) -> None:
    def twice(tree: Path) -> None:
        file = tree / "vllm/attention.py"
        file.write_text("# Moved.\n" + IMPL + IMPL)

    bare_upstream.patch("twice/1.0.patch", twice, series=("1.0",))
    bare_upstream.patch(SCALE, scale_by_two, series=("1.0",))
    workspace = bare_upstream.workspace()
    _, one = workspace.apply(workspace.versions.get("1.0")).applied
    assert one.status is ApplyStatus.CONFLICT
    (match,) = one.failures
    (told,) = match.earlier
    assert told.startswith("twice/1.0.patch wrote lines ")
    assert one.error is not None
    assert "several places" in str(one.error)
    assert "twice/1.0.patch wrote" in str(one.error)


def test_a_file_that_an_earlier_patch_deletes(bare_upstream: Upstream) -> None:
    def delete(tree: Path) -> None:
        (tree / "vllm/attention.py").unlink()

    bare_upstream.patch("gone/1.0.patch", delete, series=("1.0",))
    bare_upstream.patch(SCALE, scale_by_two, series=("1.0",))
    workspace = bare_upstream.workspace()
    _, one = workspace.apply(workspace.versions.get("1.0")).applied
    assert one.failures[0].earlier == ("gone/1.0.patch deletes that file",)


def amend_first(tree: Path, old: str, new: str) -> None:
    """Change the second commit; the third goes along, with its own context."""
    change(tree / "vllm/attention.py", old, new)
    git(tree, "commit", "-q", "-a", "--fixup=HEAD~1")
    git(tree, "-c", "sequence.editor=true", "-c", "merge.conflictStyle=diff3", "rebase", "-q",
        "-i", "--autosquash", "-X", "theirs", "v1.0")  # fmt: skip


def test_refresh_names_the_patch_that_no_longer_writes_it(run: Run, upstream: Upstream) -> None:
    """1.1 has a text of the second topic of its own, with the first one's old line as context."""
    own = upstream.patches / "scale/1.1.patch"
    shutil.copy(upstream.patches / SCALE, own)
    series = upstream.patches / "series/1.1"
    series.write_text(series.read_text().replace(SCALE, "scale/1.1.patch"))
    assert run("refresh", "1.1", "--no-edits").status == 0
    assert run("edit", "1.0").status == 0
    tree = upstream.root / "work/edit/1.0"
    amend_first(tree, "use_irope=False", "use_irope=None")
    ran = run("refresh", "1.0")
    assert ran.status == 5, ran.out
    assert "1.1: scale/1.1.patch\n" in ran.err
    assert f"  earlier in the series: {FIRST} wrote lines 12, 13\n" in ran.err
    assert (
        f"  earlier in the series: {FIRST} wrote what is expected, before this change\n" in ran.err
    )
    assert "1.1: 2 of 3 patches applied\n" in ran.err


def test_port_names_the_patches_of_both_series(run: Run, upstream: Upstream) -> None:
    """The first topic conflicts and is left out; what the second expects was written by it."""
    text = IMPL.replace("num_heads, scale)", "num_heads, size, scale)")
    release(upstream, "1.2", {"vllm/attention.py": text})
    assert run("port", "--to", "1.2").status == 5
    ran = run("port", "--skip", "--because", "not needed")
    assert ran.status == 5, ran.out
    assert "stopped at scale" in ran.err
    told = f"{FIRST} wrote what is expected, in 1.1 (left out of 1.2)"
    assert f"  earlier in the series: {told}\n" in ran.err


def test_port_names_the_patch_that_is_in_the_way_there(run: Run, upstream: Upstream) -> None:
    """1.1 changed the place of the third topic to what the second one's new text makes of it."""
    text = IMPL.replace("self.num_heads = num_heads", "self.num_heads = int(num_heads)")
    release(upstream, "1.2", {"vllm/attention.py": text})
    ran = run("port", "--to", "1.2", "--json")
    assert ran.status == 5
    said = json.loads(ran.out)
    tree = Path(said["work_tree"])
    assert said["stopped"] == "attention-signatures"
    solved = accepted(text).replace("self.num_heads = int(num_heads)", "self.num_heads = 3")
    (tree / "vllm/attention.py").write_text(solved)
    git(tree, "add", "-A")
    ran = run("port", "--continue", "--json")
    said = json.loads(ran.out)
    assert said["stopped"] == "scale", ran.err
    (conflict,) = said["topics"]["scale"]["conflicts"]
    assert any(
        one.startswith("attention-signatures/1.2.patch wrote") for one in conflict["earlier"]
    )
