"""port: what fits is shared, what merges is merged, and whoever stops it loses nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.tool import Counter, go, kill_at, spread
from made_upstream import (
    IMPL,
    TEST,
    Ran,
    Upstream,
    accept_use_irope,
    accepted,
    at,
    change,
    copied,
    double,
    git,
    make_releases,
    pin,
    release,
    snapshot,
)
from overlay.base import transaction
from overlay.base.errors import OverlayError
from overlay.patches import entry
from overlay.porting import port_state
from overlay.releases import versions

Run = Callable[..., Ran]
FIRST = "attention-signatures/1.0.patch"
SCALE = "scale/1.0.patch"
OWN = "attention-signatures/1.2.patch"
TO = ("port", "--to", "1.2", "--date", "2027-01-02")
#: What 1.2 has in place of 1.1's line that the patch changes, and how that is solved.
CONFLICTING = {"vllm/attention.py": IMPL.replace("num_heads, scale)", "num_heads, size, scale)")}
SOLVED = "num_heads, size, scale, use_irope=False)"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.0 and 1.1 with two topics that they share."""
    folder = tmp_path_factory.mktemp("port")
    upstream = make_releases(folder)
    upstream.patch(FIRST, accept_use_irope, series=("1.0", "1.1"))
    upstream.patch(SCALE, double, series=("1.0", "1.1"), subject="[Bugfix] Double it",
                   before=(FIRST,))  # fmt: skip
    upstream.lock()
    return folder


@pytest.fixture
def upstream(template: Path, tmp_path: Path) -> Upstream:
    return copied(template, tmp_path)


def tree_of(upstream: Upstream, topic: str = "attention-signatures") -> Path:
    return upstream.root / "work/port/1.2" / topic


def conflict(run: Run, upstream: Upstream) -> Path:
    """A port that stopped at a conflict. Returns its work tree."""
    release(upstream, "1.2", CONFLICTING)
    ran = run(*TO)
    assert ran.status == 5, ran.err
    return tree_of(upstream)


def solve(tree: Path) -> None:
    """As a person would: both sides in, staged."""
    file = tree / "vllm/attention.py"
    text = file.read_text()
    start, end = text.index("<<<<<<<"), text.index(">>>>>>>")
    end = text.index("\n", end) + 1
    line = f"    def __init__(self, {SOLVED}:\n"
    file.write_text(text[:start] + line + text[end:])
    git(tree, "add", "vllm/attention.py")


def sound(run: Run, upstream: Upstream) -> versions.Release:
    """1.2, which was written and is sound; nothing is left over."""
    ran = run("validate", "--all")
    assert ran.status == 0, ran.err
    assert run("refresh", "--all", "--check").status == 0
    assert not (upstream.root / "work/port/1.2").exists()
    assert not (upstream.root / transaction.JOURNAL).exists()
    return upstream.workspace().versions.get("1.2")


def series(upstream: Upstream) -> str:
    return (upstream.patches / "series/1.2").read_text()


@pytest.mark.parametrize(
    ("attention", "told"), [(IMPL, "clean"), ("# A line.\n# Another.\n\n" + IMPL, "offset +3")]
)
def test_files_that_apply_are_shared(
    run: Run, upstream: Upstream, attention: str, told: str
) -> None:
    release(upstream, "1.2", {"vllm/attention.py": attention})
    before = snapshot(upstream)
    ran = run(*TO)
    assert ran.status == 0, ran.err
    assert f"{FIRST}: {told}\n" in ran.out
    assert f"{SCALE}: {told}\n" in ran.out
    assert "1.2: 2 of 2 patches applied, as 1.1 lists them\n" in ran.out
    listed = sound(run, upstream)
    assert (listed.torch, listed.xformers, listed.requires_python) == ("2.7.1", "0.0.31", ">=3.9")
    assert listed.wheel.file == "vllm-1.2-cp38-abi3-manylinux_2_31_x86_64.whl"
    assert series(upstream) == f"{FIRST}\n{SCALE}\n"
    after = snapshot(upstream)
    assert set(after) - set(before) == {"patches/series/1.2"}
    assert {name for name in before if after[name] != before[name]} == {"VERSIONS.toml"}
    assert after["VERSIONS.toml"].startswith(before["VERSIONS.toml"].rstrip())


def test_a_release_between_two_goes_between_them(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.0.1", {"vllm/attention.py": IMPL})
    assert run("port", "--to", "v1.0.1").status == 0
    text = (upstream.root / "VERSIONS.toml").read_text()
    order = [text.index(f'[releases."{name}"]') for name in ("1.0", "1.0.1", "1.1")]
    assert order == sorted(order)
    assert run("validate", "--all").status == 0


def test_an_older_release_gets_texts_of_its_own(run: Run, upstream: Upstream) -> None:
    """A file is named after the first release that lists it."""
    file = upstream.root / "VERSIONS.toml"
    file.write_text(file.read_text().replace(">=1.0,<2", ">=0.9.5,<2"))
    release(upstream, "0.9.5", {"vllm/attention.py": IMPL})
    ran = run("port", "--to", "0.9.5", "--from", "1.0")
    assert ran.status == 0, ran.err
    listed = (upstream.patches / "series/0.9.5").read_text()
    assert listed == "attention-signatures/0.9.5.patch\nscale/0.9.5.patch\n"
    assert run("validate", "--all").status == 0


def controlled(upstream: Upstream, name: str, changes: dict[str, str]) -> str:
    """Have VERSIONS.toml list a release as a control, out of its range. Returns its text."""
    release(upstream, name, changes)
    file = upstream.root / "VERSIONS.toml"
    text = file.read_text().replace(">=1.0,<2", ">=1.0,<1.2")
    sdist = upstream.served / f"vllm-{name}.tar.gz"
    wheel = upstream.served / f"vllm-{name}-cp38-abi3-manylinux_2_31_x86_64.whl"
    text += (
        f'\n# Patched by nobody.\n[releases."{name}"]\ntag = "v{name}"\nstatus = "control"\n'
        '# What it was tried with.\nconstraints = ["setuptools"]\nrequires_python = ">=3.9"\n'
        f'torch = "2.6.0"\nxformers = "0.0.29"\nupstream_tree = "{"0" * 40}"\n'
        + pin(sdist, "sdist", name)
        + pin(wheel, "wheel", name)
        + "# The end.\n"
    )
    file.write_text(text)
    upstream.lock()
    return file.read_text()


def test_a_control_is_promoted_and_the_range_widened(run: Run, upstream: Upstream) -> None:
    text = controlled(upstream, "1.2", {"vllm/attention.py": IMPL})
    for file in upstream.served.iterdir():
        if not file.name.endswith(".tar.gz"):
            file.unlink()
    control = upstream.workspace().versions.get("1.2")
    ran = run(*TO, flags=("--offline",))  # its pins are known
    assert ran.status == 0, ran.err
    assert "1.2: 2 of 2 patches applied, as 1.1 lists them\n" in ran.out
    assert "1.2 was a control, and is affected now\n" in ran.out
    assert "upstream.range: >=1.0,<1.2 becomes >=1.0,<1.3\n" in ran.out
    assert "constraints of the nearest release" not in ran.out
    listed = sound(run, upstream)
    assert (listed.status, listed.revision, listed.series) == ("affected", 1, "series/1.2")
    same = ("tag", "torch", "xformers", "constraints", "upstream_tree", "sdist", "wheel")
    assert [getattr(listed, key) for key in same] == [getattr(control, key) for key in same]
    after = (upstream.root / "VERSIONS.toml").read_text()
    assert after.partition('[releases."1.2"]')[0] == text.partition('[releases."1.2"]')[0].replace(
        ">=1.0,<1.2", ">=1.0,<1.3"
    )
    assert after.endswith("# The end.\n")
    assert after.count("# What it was tried with.\n") == 1


def test_a_control_whose_port_stops_stays_one_until_the_end(run: Run, upstream: Upstream) -> None:
    controlled(upstream, "1.2", CONFLICTING)
    before = snapshot(upstream)
    ran = run(*TO, "--json")
    assert ran.status == 5
    assert (said := json.loads(ran.out))["was_control"]
    assert said["range"] == ">=1.0,<1.3"
    assert snapshot(upstream) == before
    solve(tree_of(upstream))
    assert run("port", "--continue").status == 0
    assert sound(run, upstream).is_patched


def test_a_control_that_is_no_table_of_its_own(run: Run, upstream: Upstream) -> None:
    text = controlled(upstream, "1.2", {"vllm/attention.py": IMPL})
    (upstream.root / "VERSIONS.toml").write_text(
        text.replace('[releases."1.2"]', "[releases.'1.2']")
    )
    before = snapshot(upstream)
    ran = run(*TO)
    assert (ran.status, "cannot change the entry of 1.2" in ran.err) == (1, True)
    assert snapshot(upstream) == before


@pytest.mark.parametrize(
    ("name", "wanted"), [("0.8.9", ">=0.8.9,<2"), ("2.0", ">=1.0,<2.1"), ("2.3.1", ">=1.0,<2.3.2")]
)
def test_a_release_out_of_the_range_widens_it(
    run: Run, upstream: Upstream, name: str, wanted: str
) -> None:
    release(upstream, name, {"vllm/attention.py": IMPL})
    ran = run("port", "--to", name)
    assert ran.status == 0, ran.err
    assert f"upstream.range: >=1.0,<2 becomes {wanted}\n" in ran.out
    assert upstream.workspace().versions.upstream.range == wanted
    assert run("validate", "--all").status == 0


def test_what_does_not_apply_is_merged(run: Run, upstream: Upstream) -> None:
    near = IMPL.replace("class XFormersImpl", "class XFormersImplementation")
    release(upstream, "1.2", {"vllm/attention.py": near})
    ran = run(*TO)
    assert ran.status == 0, ran.err
    assert f"{OWN}: merged\n" in ran.out
    assert f"{SCALE}: clean\n" in ran.out
    sound(run, upstream)
    assert series(upstream) == f"{OWN}\n{SCALE}\n"
    text = (upstream.patches / OWN).read_text()
    assert "\n class XFormersImplementation:\n" in text
    assert "Last-Update: 2027-01-02\n" in text


def test_what_it_does_to_each_patch(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    near = IMPL.replace("class XFormersImpl", "class XFormersImplementation")
    release(upstream, "1.2", {"vllm/attention.py": near})
    review = tmp_path / "review.md"
    ran = run(*TO, "--range-diff", "--markdown", str(review))
    assert ran.status == 0, ran.err
    assert "attention-signatures, 1.2: changed\n" in ran.out
    assert "    - class XFormersImpl:\n    + class XFormersImplementation:\n" in ran.out
    assert "1.2: 1 unchanged, 1 changed\n" in ran.out
    assert "| 1.2 | 1 unchanged, 1 changed | 2 of 2 patches applied |" in review.read_text()


def test_what_it_does_where_it_stops(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    conflict(run, upstream)
    review = tmp_path / "review.md"
    ran = run("port", "--skip", "--because", "<b> has it", "--markdown", str(review), "--json")
    assert ran.status == 0
    assert "range_diff" not in json.loads(ran.out)
    told = "**`attention-signatures`**, 1.2: gone: left out: \\<b\\> has it\n"
    assert told in review.read_text()


def test_a_conflict_is_told_solved_and_continued(run: Run, upstream: Upstream) -> None:
    before = snapshot(upstream)
    release(upstream, "1.2", CONFLICTING)
    ran = run(*TO)
    assert ran.status == 5
    assert f"{FIRST}: conflict\n" in ran.out
    assert (
        "1.2: 0 of 2 patches applied, as 1.1 lists them; 1 stopped at (attention-signatures); "
        "1 not tried yet\n"
    ) in ran.out
    for told in (
        "stopped at attention-signatures",
        "vllm/attention.py hunk 1 (@@ -5,7 +5,7 @@), line 8 there",
        "1.2 has:\n        def __init__(self, num_heads, size, scale):\n",
        "the patch has:\n        def __init__(self, num_heads, scale, use_irope=False):\n",
        "not tried yet: scale\n",
        f"Solve it in {tree_of(upstream)}",
        "vllm-overlay port --continue\n",
        "vllm-overlay port --skip\n",
        "vllm-overlay port --abort\n",
    ):
        assert told in ran.err
    assert snapshot(upstream) == before
    tree = tree_of(upstream)
    assert git(tree, "describe", "--tags").decode().strip() == "v1.2"
    assert git(tree, "status", "--porcelain").decode() == (
        "A  tests/test_irope.py\nUU vllm/attention.py\n"
    )
    solve(tree)
    ran = run("port", "--continue")
    assert ran.status == 0, ran.err
    assert f"{OWN}: solved\n" in ran.out
    sound(run, upstream)
    text = (upstream.patches / OWN).read_text()
    assert f"+    def __init__(self, {SOLVED}:" in text
    assert "Last-Update: 2027-01-02\n" in text
    assert "Signed-off-by: A Tester" in text


@pytest.mark.parametrize("how", ["commit", "cherry-pick", "another text"])
def test_any_git_tool_may_solve_it(run: Run, upstream: Upstream, how: str) -> None:
    tree = conflict(run, upstream)
    if how == "commit":
        solve(tree)
        git(tree, "commit", "-q", "--no-edit")
    elif how == "cherry-pick":
        solve(tree)
        git(tree, "-c", "core.editor=true", "cherry-pick", "--continue")
    else:
        git(tree, "cherry-pick", "--abort")
        change(tree / "vllm/attention.py", "num_heads, size, scale)", SOLVED)
        git(tree, "commit", "-q", "-a", "-C", "refs/overlay/port")
    ran = run("port", "--continue")
    assert ran.status == 0, ran.err
    sound(run, upstream)


def test_two_conflicts_one_after_the_other(run: Run, upstream: Upstream) -> None:
    text = CONFLICTING["vllm/attention.py"].replace("query * self.scale", "query / self.scale")
    release(upstream, "1.2", {"vllm/attention.py": text})
    assert run(*TO).status == 5
    solve(tree_of(upstream))
    ran = run("port", "--continue")
    assert ran.status == 5
    assert f"{OWN}: solved\n{SCALE}: conflict\n" in ran.out
    assert not tree_of(upstream).exists()
    tree = tree_of(upstream, "scale")
    assert SOLVED in (tree / "vllm/attention.py").read_text()
    git(tree, "checkout", "--theirs", "vllm/attention.py")
    git(tree, "add", "-A")
    ran = run("port", "--continue")
    assert ran.status == 0, ran.err
    sound(run, upstream)


def test_skip(run: Run, upstream: Upstream) -> None:
    conflict(run, upstream)
    ran = run("port", "--skip", "--because", "not needed since #7")
    assert ran.status == 0, ran.err
    assert f"{FIRST}: left out: not needed since #7\n" in ran.out
    assert "1.2: 1 of 2 patches applied, as 1.1 lists them; 1 left out\n" in ran.out
    sound(run, upstream)
    wanted = f"# Without {FIRST} of 1.1: not needed since #7\n{SCALE}\n"
    assert series(upstream) == wanted
    assert run("edit", "1.2").status == 0
    assert run("refresh", "1.2").status == 0
    assert series(upstream) == wanted


@pytest.mark.parametrize("solved", [False, True])
def test_abort(run: Run, upstream: Upstream, solved: bool) -> None:
    before = snapshot(upstream)
    tree = conflict(run, upstream)
    if solved:
        solve(tree)
    ran = run("port", "--abort")
    assert ran.status == 0, ran.err
    assert snapshot(upstream) == before
    assert list((upstream.root / "work/port").iterdir()) == []
    ran = run("port", "--abort")
    assert (ran.status, "no port is under way" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (accepted(), f"the reverse of {FIRST} applies"),
        (
            accepted().replace("class X", "class Y"),
            "a merge changes nothing",
        ),
    ],
)
def test_what_upstream_has_is_told_and_never_dropped(
    run: Run, upstream: Upstream, attention: str, why: str
) -> None:
    release(upstream, "1.2", {"vllm/attention.py": attention, **TEST})
    ran = run(*TO)
    assert ran.status == 5
    assert f"stopped at attention-signatures: 1.2 has it already ({why})" in ran.err
    assert not tree_of(upstream).exists()
    ran = run("port", "--continue")
    assert (ran.status, "is upstream already in 1.2" in ran.err) == (5, True)
    ran = run("port", "--skip")
    assert ran.status == 0, ran.err
    sound(run, upstream)
    assert series(upstream) == f"# Without {FIRST} of 1.1: already upstream: {why}\n{SCALE}\n"


def test_what_is_left_of_a_patch_that_upstream_has_in_part(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2", {"vllm/attention.py": accepted()})
    ran = run(*TO)
    assert ran.status == 0, ran.err
    assert f"{OWN}: merged\n  already upstream: vllm/attention.py: all of it\n" in ran.out
    sound(run, upstream)
    assert "vllm/attention.py" not in (upstream.patches / OWN).read_text()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vllm/attention.py": accepted(), "tests/test_irope.py": "other = 1\n"},
         {"path": "vllm/attention.py", "hunks": [1], "of": 1, "lines": []}),
        ({"vllm/attention.py": IMPL.replace("num_heads, scale)", "size, scale)"),
          "tests/test_irope.py": "def test_use_irope():\n    assert 1\n"},
         {"path": "tests/test_irope.py", "hunks": [], "of": 1,
          "lines": ["def test_use_irope():\n"]}),
    ],
)  # fmt: skip
def test_a_conflict_tells_what_upstream_has_of_the_patch(
    run: Run, upstream: Upstream, changes: dict[str, str], part: dict[str, object]
) -> None:
    release(upstream, "1.2", changes)
    ran = run(*TO, "--json")
    assert ran.status == 5
    said = json.loads(ran.out)
    assert said["stopped"] == "attention-signatures"
    assert said["topics"]["attention-signatures"]["upstream_already"] == [part]
    assert "already upstream in 1.2, in part:\n" in ran.err


@pytest.mark.parametrize("way", ["--continue", "--skip"])
@pytest.mark.parametrize(
    "removal",
    ["Applied-Upstream: v1.2, https://example.org/vllm/pull/9", "Remove-When: v1.2 (V0 is gone)"],
)
def test_a_patch_that_fits_and_whose_condition_is_met(
    run: Run, upstream: Upstream, way: str, removal: str
) -> None:
    file = upstream.patches / SCALE
    file.write_text(re.sub("Remove-When: .*", removal, file.read_text()))
    upstream.lock()
    release(upstream, "1.2")
    ran = run(*TO)
    assert ran.status == 5
    assert "stopped at scale: its condition for removal is met; is it needed in 1.2?" in ran.err
    assert f"{removal}; as a patch it is offset +3" in ran.err
    ran = run("port", way)
    assert ran.status == 0, ran.err
    sound(run, upstream)
    left_out = f"# Without {SCALE} of 1.1: {removal}"
    assert series(upstream).split("\n")[1] == (SCALE if way == "--continue" else left_out)


@pytest.mark.parametrize("removal", ["v1.3 (later)", "v1.1 (before)", "https://x.org/pull/9"])
def test_a_condition_that_is_not_met_between_the_two(
    run: Run, upstream: Upstream, removal: str
) -> None:
    file = upstream.patches / SCALE
    file.write_text(re.sub("Remove-When: .*", f"Remove-When: {removal}", file.read_text()))
    upstream.lock()
    release(upstream, "1.2")
    assert run(*TO).status == 0


@pytest.mark.parametrize("way", ["--continue", "--skip"])
def test_nothing_is_decided_that_was_not_told(run: Run, upstream: Upstream, way: str) -> None:
    """It was interrupted before it stopped: the next command stops, whatever it is."""
    release(upstream, "1.2", {"vllm/attention.py": accepted(), **TEST})
    assert run(*TO).status == 5
    project = upstream.workspace().project
    state = port_state.find(project)
    assert state is not None
    port_state.save(project, state.model_copy(update={"stopped": None}))
    ran = run("port", way)
    assert ran.status == 5
    assert "stopped at attention-signatures: 1.2 has it already" in ran.err
    assert port_state.find(project) == state


def unstaged(tree: Path) -> None:
    solve(tree)
    change(tree / "setup.py", "setuptools.setup()", "setuptools.setup(name='x')")


def untracked(tree: Path) -> None:
    solve(tree)
    (tree / "notes.txt").write_text("mine\n")


def unsolved(tree: Path) -> None:
    assert "<<<<<<<" in (tree / "vllm/attention.py").read_text()


def with_markers(tree: Path) -> None:
    git(tree, "add", "-A")


def emptied(tree: Path) -> None:
    git(tree, "cherry-pick", "--abort")


def two_commits(tree: Path) -> None:
    solve(tree)
    git(tree, "commit", "-q", "--no-edit")
    git(tree, "commit", "-q", "--allow-empty", "-m", "more")


def staged_beside(tree: Path) -> None:
    solve(tree)
    git(tree, "commit", "-q", "--no-edit")
    (tree / "more.py").write_text("")
    git(tree, "add", "-A")


def unsigned(tree: Path) -> None:
    solve(tree)
    git(tree, "commit", "-q", "-m", "[Bugfix] It\n\nBecause.")


def elsewhere(tree: Path) -> None:
    git(tree, "cherry-pick", "--abort")
    git(tree, "checkout", "-q", "--orphan", "other")
    git(tree, "commit", "-q", "-m", "other")


def rebasing(tree: Path) -> None:
    solve(tree)
    git(tree, "commit", "-q", "--no-edit")
    git(tree, "-c", "sequence.editor=sed -i 1s/pick/edit/", "rebase", "-q", "-i", "v1.2")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (unsolved, "git status has vllm/attention.py as unmerged"),
        (with_markers, "there are conflict markers in vllm/attention.py"),
        (unstaged, "git status lists setup.py"),
        (untracked, "git status lists notes.txt"),
        (emptied, "nothing of attention-signatures is left"),
        (two_commits, "..HEAD lists 2, and a patch is one"),
        (staged_beside, "staged changes beside its commit"),
        (unsigned, "cannot become a patch"),
        (elsewhere, "has no single commit on top of"),
        (rebasing, "is in the middle of a rebase"),
    ],
)
def test_a_work_tree_that_is_not_ready(
    run: Run, upstream: Upstream, spoil: Callable[[Path], None], told: str
) -> None:
    before = snapshot(upstream)
    tree = conflict(run, upstream)
    spoil(tree)
    status = git(tree, "status", "--porcelain")
    ran = run("port", "--continue")
    assert ran.status in (1, 5), ran.out
    assert told in ran.err
    assert git(tree, "status", "--porcelain") == status
    assert snapshot(upstream) == before
    assert run("port", "--abort").status == 0


def test_a_work_tree_that_was_deleted_comes_back(run: Run, upstream: Upstream) -> None:
    tree = conflict(run, upstream)
    shutil.rmtree(tree)
    assert run("port", "--continue").status == 5
    solve(tree)
    assert run("port", "--continue").status == 0
    sound(run, upstream)


def test_patches_that_change_while_a_port_is_under_way(run: Run, upstream: Upstream) -> None:
    text = IMPL.replace("query * self.scale", "query / self.scale")
    release(upstream, "1.2", {"vllm/attention.py": text})
    assert run(*TO).status == 5
    tree = tree_of(upstream, "scale")
    git(tree, "checkout", "--theirs", "vllm/attention.py")
    git(tree, "add", "-A")
    file = upstream.patches / FIRST
    before = file.read_text()
    file.write_text(before.replace("use_irope=False", "use_irope=None"))
    ran = run("port", "--continue")
    assert ran.status == 1
    assert "the patches before this one changed" in ran.err
    file.write_text(before)
    assert run("port", "--continue").status == 0
    sound(run, upstream)


def test_the_way_on_is_told(run: Run, upstream: Upstream) -> None:
    conflict(run, upstream)
    for command in (("port",), TO, ("port", "--to", "1.3")):
        ran = run(*command)
        assert ran.status == 1
        assert "a port to 1.2 is under way: it stopped at attention-signatures" in ran.err
        for way in ("--continue", "--skip", "--abort"):
            assert f"'vllm-overlay port {way}'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ((), 2, "nothing to port"),
        (("--continue",), 2, "no port is under way"),
        (("--skip",), 2, "no port is under way"),
        (("--to", "1.2", "--continue"), 2, "pass one of"),
        (("--continue", "--from", "1.1"), 2, "go with --to"),
        (("--continue", "--because", "x"), 2, "--because goes with --skip"),
        (("--skip", "--because", "two\nlines"), 2, "--because goes with --skip"),
        (("--to", "1.9"), 2, "no new release '1.9'"),
        (("--to", "1.1"), 2, "Change its patches with 'vllm-overlay edit 1.1'"),
        (("--to", "1.8"), 2, "upstream.range of VERSIONS.toml has !=1.8"),
        (("--to", "1.2", "--from", "7"), 2, "unknown release '7'"),
        (("--to", "1.2", "--from", "0.9"), 2, "has no patches"),
        (("--to", "1.2", "--date", "soon"), 2, "is no date"),
    ],
)
def test_wrong_usage(
    run: Run, upstream: Upstream, arguments: tuple[str, ...], status: int, told: str
) -> None:
    release(upstream, "1.2")
    release(upstream, "1.8")
    change(upstream.root / "VERSIONS.toml", ">=1.0,<2", ">=1.0,!=1.8,<2")
    before = snapshot(upstream)
    ran = run("port", *arguments)
    assert ran.status == status
    assert told in ran.err
    assert snapshot(upstream) == before
    assert port_state.find(upstream.workspace().project) is None


def test_offline(run: Run, upstream: Upstream) -> None:
    """The index has to be asked once; from then on the cache will do."""
    release(upstream, "1.2", CONFLICTING)
    ran = run(*TO, flags=("--offline",))
    assert (ran.status, "--offline forbids" in ran.err) == (2, True)
    assert run(*TO).status == 5
    solve(tree_of(upstream))
    for file in upstream.served.iterdir():
        file.unlink()
    ran = run("port", "--continue", flags=("--offline",))
    assert ran.status == 0, ran.err
    assert run("validate", "--all", flags=("--offline",)).status == 0


def test_a_dry_run_writes_nothing(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2")
    release(upstream, "1.3", CONFLICTING)
    before = snapshot(upstream)
    ran = run(*TO, "--dry-run")
    assert ran.status == 0, ran.err
    assert "VERSIONS.toml: would be written" in ran.out
    ran = run("port", "--to", "1.3", "--dry-run")
    assert ran.status == 5
    assert "stopped at attention-signatures" in ran.err
    assert "--continue" not in ran.err
    assert snapshot(upstream) == before
    assert not (upstream.root / "work/port").exists()


def test_what_is_in_the_way_is_kept(run: Run, upstream: Upstream) -> None:
    tree = conflict(run, upstream)
    solve(tree)
    mine = upstream.patches / OWN
    mine.write_text("mine\n")
    ran = run("port", "--continue")
    assert ran.status == 5
    assert "patch attention-signatures/1.2.patch is no git mail" in ran.err
    mine.write_bytes((upstream.patches / FIRST).read_bytes())
    ran = run("port", "--continue")
    assert ran.status == 1
    assert f"patches/{OWN} is in the way" in ran.err
    mine.unlink()
    assert run("port", "--continue").status == 0
    assert run("port", "--abort").status == 2


def test_a_series_in_the_way(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2")
    (upstream.patches / "series/1.2").write_text("# mine\n")
    ran = run(*TO)
    assert (ran.status, "patches/series/1.2 is in the way" in ran.err) == (1, True)


def test_a_state_that_is_damaged(run: Run, upstream: Upstream) -> None:
    conflict(run, upstream)
    file = upstream.root / port_state.file("1.2")
    file.write_text(file.read_text()[:100])
    ran = run("port", "--continue")
    assert ran.status == 1
    assert f"cannot read {file}" in ran.err
    assert "Traceback" not in ran.err


def test_one_at_a_time(run: Run, upstream: Upstream) -> None:
    release(upstream, "1.2")
    with transaction.locked(upstream.root):
        ran = run(*TO)
    assert (ran.status, "another command is writing" in ran.err) == (6, True)


def test_an_entry_goes_below_the_comments_of_others(upstream: Upstream) -> None:
    file = upstream.root / "VERSIONS.toml"
    text = file.read_text().replace('[releases."1.1"]', '# Of 1.1.\n[releases."1.1"]', 1)
    listed = upstream.workspace().versions.get("1.0")
    new = listed.model_copy(update={"name": "1.0.5", "constraints": ('a "b"', "c<2")})
    whole = entry.insert(text, new)
    assert whole.index('[releases."1.0.5"]') < whole.index("# Of 1.1.\n")
    assert versions.parse(whole, "it").get("1.0.5") == new
    with pytest.raises(OverlayError, match="with it is not TOML"):
        entry.insert(text, listed)


POINTS = 20
BEGIN, GO_ON = TO, ("port", "--continue")


def killed(upstream: Upstream, target: int, *arguments: str) -> int:
    """Run a command that is killed at its write `target`; of an undisturbed one (0), count them."""
    flags = ("--root", str(upstream.root), "--cache", str(upstream.cache),
             "--find-links", str(upstream.served))  # fmt: skip
    counter = Counter()
    ended = go((*flags, *arguments), before=kill_at(target, counter))
    assert ended.status in ((-signal.SIGKILL,) if target else (0, 5)), ended.err
    return counter.value


@dataclass(frozen=True)
class Undisturbed:
    """A port from begin to end: the folders as they are before each command, and its writes."""

    begin: Path
    go_on: Path
    writes: tuple[int, int]
    before: dict[str, bytes]
    after: dict[str, bytes]


@pytest.fixture(scope="session")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    begin, go_on, work = folder / "begin", folder / "go-on", folder / "work"
    shutil.copytree(template, begin)
    release(at(begin), "1.2", CONFLICTING)
    shutil.copytree(begin, work)
    upstream = at(work)
    before = snapshot(upstream)
    first = killed(upstream, 0, *BEGIN)
    solve(tree_of(upstream))
    shutil.copytree(work, go_on)
    second = killed(upstream, 0, *GO_ON)
    return Undisturbed(begin, go_on, (first, second), before, snapshot(upstream))


@pytest.mark.parametrize("number", range(POINTS))
def test_killed_at_any_point(
    run: Run, undisturbed: Undisturbed, tmp_path: Path, number: int
) -> None:
    late, which = divmod(number, POINTS // 2)
    source = undisturbed.go_on if late else undisturbed.begin
    place = tmp_path / "killed"
    shutil.copytree(source, place, symlinks=True)
    upstream = at(place)
    point = spread(POINTS // 2, undisturbed.writes[late])[which]
    killed(upstream, point, *(GO_ON if late else BEGIN))
    given_up = tmp_path / "given-up"
    shutil.copytree(place, given_up, symlinks=True)
    taken_back(run, at(given_up), undisturbed)
    carried_on(run, upstream, undisturbed)


def call(run: Run, upstream: Upstream, *arguments: str) -> Ran:
    return run(*arguments, flags=("--root", str(upstream.root), "--cache", str(upstream.cache),
                                  "--find-links", str(upstream.served)))  # fmt: skip


def taken_back(run: Run, upstream: Upstream, undisturbed: Undisturbed) -> None:
    """--abort leaves the checkout as it was, unless there was no port any more or yet."""
    ran = call(run, upstream, "port", "--abort")
    if ran.status == 2:
        assert "no port is under way" in ran.err
        assert snapshot(upstream) in (undisturbed.before, undisturbed.after)
    else:
        assert ran.status == 0, ran.err
        assert snapshot(upstream) == undisturbed.before
    assert port_state.find(upstream.workspace().project) is None


def carried_on(run: Run, upstream: Upstream, undisturbed: Undisturbed) -> None:
    """The same command begins anew, or says how to go on; in the end all is as undisturbed."""
    ran = call(run, upstream, *TO)
    if ran.status == 1:
        assert "a port to 1.2 is under way" in ran.err
        assert "'vllm-overlay port --continue'" in ran.err
        ran = call(run, upstream, *GO_ON)
    if ran.status == 5 or "is not solved" in ran.err:
        assert "vllm-overlay port --continue" in ran.err
        solve(tree_of(upstream))
        ran = call(run, upstream, *GO_ON)
    assert ran.status == 0 or "VERSIONS.toml lists it" in ran.err
    assert snapshot(upstream) == undisturbed.after
    assert not tree_of(upstream).parent.exists()
    assert call(run, upstream, "validate", "--all").status == 0
