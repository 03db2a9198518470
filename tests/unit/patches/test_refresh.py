"""edit and refresh: what is changed with git comes back as patches, and nothing is lost."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made_upstream import (
    RELEASES,
    Ran,
    Upstream,
    accept_use_irope,
    change,
    copied,
    double,
    git,
    make_releases,
    message,
    snapshot,
)
from overlay.base import journal, project, transaction
from overlay.base.journal import Journal
from overlay.patches import range_diff
from overlay.patches.range_diff import Change, How, Section

Run = Callable[..., Ran]
FIRST = "attention-signatures/1.0.patch"
SCALE = "scale/1.0.patch"


def add_note(tree: Path) -> None:
    (tree / "vllm/note.py").write_text("NOTE = 1\n")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patched releases: two topics that all share, and one of 1.1 alone."""
    folder = tmp_path_factory.mktemp("shared")
    upstream = make_releases(folder, (*RELEASES, "1.2"))
    every = ("1.0", "1.1", "1.2")
    upstream.patch(FIRST, accept_use_irope, series=every)
    upstream.patch(SCALE, double, series=every, subject="[Bugfix] Double it", before=(FIRST,))
    upstream.patch("note/1.1.patch", add_note, series=("1.1",), subject="[Misc] Note")
    upstream.lock()
    return folder


@pytest.fixture
def upstream(template: Path, tmp_path: Path) -> Upstream:
    return copied(template, tmp_path)


def opened(run: Run, upstream: Upstream, release: str) -> Path:
    ran = run("edit", release)
    assert ran.status == 0, ran.err
    return upstream.root / "work/edit" / release


def rebase(tree: Path, todo: str) -> None:
    """``git rebase -i`` with a sed script as the editor of the list."""
    git(tree, "-c", f"sequence.editor=sed -i '{todo}'", "-c", "core.editor=true", "rebase", "-q",
        "-i", git(tree, "describe", "--tags", "--abbrev=0").decode().strip())  # fmt: skip


def amend(tree: Path, commit: str, edit: Callable[[Path], None]) -> None:
    """Change a commit that is not the last one, as `git commit --fixup` and autosquash do."""
    edit(tree)
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", f"--fixup={commit}")
    tag = git(tree, "describe", "--tags", "--abbrev=0").decode().strip()
    git(tree, "-c", "sequence.editor=true", "rebase", "-q", "-i", "--autosquash", tag)


def renamed(tree: Path) -> None:
    change(tree / "vllm/attention.py", "use_irope=False", "use_irope=None")


def valid(run: Run) -> None:
    ran = run("validate", "--all")
    assert ran.status == 0, ran.err
    assert run("refresh", "--all", "--check").status == 0


def test_no_change_is_no_diff(run: Run, upstream: Upstream) -> None:
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.1")
    head = git(tree, "rev-parse", "HEAD")
    for command in (("refresh", "1.1"), ("refresh", "--all"), ("refresh", "--all", "--check")):
        ran = run(*command)
        assert (ran.status, ran.err) == (0, "")
        assert "0 files" in ran.out
        assert "1.1: 3 of 3 patches applied\n" in ran.out
    assert snapshot(upstream) == before
    assert git(tree, "rev-parse", "HEAD") == head


def test_a_change_of_a_shared_file_goes_to_all_that_share_it(run: Run, upstream: Upstream) -> None:
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.1")
    amend(tree, "HEAD~2", renamed)
    changed = git(tree, "rev-parse", "HEAD^{tree}").decode().strip()
    checked = run("refresh", "1.1", "--check", "--date", "2027-01-02")
    assert checked.status == 1
    assert f"patches/{FIRST}: would be written" in checked.out
    assert snapshot(upstream) == before
    ran = run("refresh", "1.1", "--date", "2027-01-02", "--json")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert said["releases"] == ["1.0", "1.1", "1.2"]
    assert said["patches"]["1.0"] == {"applied": 2, "listed": 2}
    assert said["lock"]["1.1"]["tree"]["new"] == changed
    assert set(said["lock"]["1.1"]) == {"tree", "files"}
    after = snapshot(upstream)
    assert {name for name in after if after[name] != before[name]} == {
        "VERSIONS.toml", f"patches/{FIRST}", f"patches/{SCALE}"
    }  # fmt: skip
    text = after[f"patches/{FIRST}"].decode()
    assert "use_irope=None" in text
    assert "Last-Update: 2027-01-02\n" in text
    # Only the blob ids of the other one changed: it starts from another file.
    assert "Last-Update: 2026-11-22\n" in after[f"patches/{SCALE}"].decode()
    valid(run)
    # The work tree went along: another round starts from there.
    assert git(tree, "status", "--porcelain") == b""
    amend(tree, "HEAD", lambda tree: change(tree / "vllm/note.py", "1", "2"))
    assert run("refresh", "1.1").status == 0
    assert "NOTE = 2" in (upstream.patches / "note/1.1.patch").read_text()
    valid(run)


def test_what_it_does_to_each_patch(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    """Lines of code and of the message, once for all releases; no line numbers, no blob ids."""
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.1")

    def fenced(tree: Path) -> None:
        change(tree / "vllm/attention.py", "use_irope=False)", "use_irope=None  # ```\n)")

    amend(tree, "HEAD~2", fenced)
    review = tmp_path / "review/body.md"
    command = ("refresh", "1.1", "--date", "2027-01-02", "--range-diff", "--markdown", str(review))
    ran = run(*command, "--check")
    assert ran.status == 1
    assert "attention-signatures, 1.0 – 1.2: changed\n" in ran.out
    for line in (
        "    -Last-Update: 2026-11-22",
        "    +Last-Update: 2027-01-02",
        "    -+    def __init__(self, num_heads, scale, use_irope=False):",
        "    ++    def __init__(self, num_heads, scale, use_irope=None  # ```",
    ):
        assert any(each.replace(" ", "") == line.replace(" ", "") for each in ran.out.split("\n"))
    # It starts from another file now, and that is no change of it.
    assert "scale, 1" not in ran.out
    assert not re.search(r"@@ -\d|index [0-9a-f]{7}", ran.out)
    assert "1.1: 2 unchanged, 1 changed\n" in ran.out
    text = review.read_text()
    assert "| 1.1 | 2 unchanged, 1 changed | 3 of 3 patches applied |" in text
    assert "<code>attention-signatures</code></b>, 1.0 – 1.2: changed</summary>" in text
    assert text.count("````diff\n") == 1
    assert snapshot(upstream) == before
    said = json.loads(run(*command, "--json").out)
    assert said["range_diff"][0]["releases"] == ["1.0", "1.1", "1.2"]
    assert review.read_text() == text
    ran = run("refresh", "1.1", "--range-diff")
    assert "1.1: 3 unchanged\n" in ran.out


def test_what_it_does_to_the_series(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.1")
    rebase(tree, "1{h;d};2{G}")
    (tree / "vllm/more.py").write_text("MORE = 1\n")
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "-m", message("[Misc] More"))
    rebase(tree, "3d")
    ran = run("refresh", "1.1", "--topic", "more", "--drop", "note", "--range-diff")
    assert ran.status == 0, ran.err
    assert "more, 1.1: new\nnote, 1.1: gone\n" in ran.out
    assert (
        "1.1: 2 unchanged, 1 new, 1 gone; in order: scale, attention-signatures, more\n" in ran.out
    )


def test_a_review_fits_what_github_takes() -> None:
    """What is too long is counted."""
    long = "".join(f" line {number}\n" for number in range(4000))
    changes = tuple(Change(topic, How.CHANGED, long) for topic in ("a", "b", "c"))
    text = range_diff.markdown([Section("1.0", changes)], ["1.0"], {})
    assert len(text) < range_diff.LIMIT
    assert text.count("<details>") == 1
    assert "**`b`**, 1.0: changed, 4000 lines of range-diff" in text


def test_the_message_alone(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.2")
    text = (
        git(tree, "log", "-1", "--format=%B")
        .decode()
        .replace("Forwarded: no (made up)", "Forwarded: not-needed (made up)")
    )
    git(tree, "commit", "-q", "--amend", "-m", text.replace("[Bugfix] Double", "[Core] Double"))
    ran = run("refresh", "1.2", "--date", "2027-01-02")
    assert ran.status == 0, ran.err
    text = (upstream.patches / SCALE).read_text()
    assert "[Core] Double it" in text
    assert "Forwarded: not-needed (made up)\nRemove-When: " in text
    valid(run)


def test_reordered(run: Run, upstream: Upstream) -> None:
    series = upstream.patches / "series/1.1"
    series.write_text("# On top.\n" + series.read_text().replace("# none yet\n", ""))
    tree = opened(run, upstream, "1.1")
    rebase(tree, "1{h;d};2{G}")
    ran = run("refresh", "1.1")
    assert ran.status == 0, ran.err
    assert series.read_text() == f"# On top.\n{SCALE}\n{FIRST}\nnote/1.1.patch\n"
    assert "0 files" in run("refresh", "1.1").out


def test_dropped(run: Run, upstream: Upstream) -> None:
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.0")
    rebase(tree, "2d")
    refused = run("refresh", "1.0")
    assert refused.status == 1
    assert "has no commit of scale" in refused.err
    assert "--drop scale" in refused.err
    assert snapshot(upstream) == before
    ran = run("refresh", "1.0", "--drop", "scale")
    assert ran.status == 0, ran.err
    # It is named after the first release that has it, and that is 1.1 now.
    assert not (upstream.patches / SCALE).exists()
    assert SCALE not in (upstream.patches / "series/1.0").read_text()
    for name in ("1.1", "1.2"):
        assert "scale/1.1.patch\n" in (upstream.patches / "series" / name).read_text()
    valid(run)


def test_the_last_release_of_a_topic_takes_its_file_along(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.1")
    rebase(tree, "3d")
    assert run("refresh", "1.1", "--drop", "note").status == 0
    assert not (upstream.patches / "note").exists()
    valid(run)


def test_squashed_topics_are_told(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.0")
    rebase(tree, "2s/pick/fixup/")
    refused = run("refresh", "1.0")
    assert "has no commit of scale" in refused.err
    assert (
        run("refresh", "1.0", "--drop", "scale", "--fork-at", "attention-signatures=1.1").status
        == 0
    )
    assert "self.scale * 2" in (upstream.patches / FIRST).read_text()
    assert "self.scale * 2" not in (upstream.patches / "attention-signatures/1.1.patch").read_text()
    valid(run)


def test_a_new_commit_needs_a_topic(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.2")
    add_note(tree)
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", message("[Misc] Count"))
    refused = run("refresh", "1.2")
    assert refused.status == 2
    assert "which topic is commit" in refused.err
    assert "Pass --topic NAME" in refused.err
    assert "no name for a topic" in run("refresh", "1.2", "--topic", "Count").err
    assert "are both of topic scale" in run("refresh", "1.2", "--topic", "scale").err
    ran = run("refresh", "1.2", "--topic", "[Misc] Count=count")
    assert ran.status == 0, ran.err
    assert (upstream.patches / "count/1.2.patch").is_file()
    assert (upstream.patches / "series/1.2").read_text().endswith(f"{SCALE}\ncount/1.2.patch\n")
    valid(run)
    assert "no commits without a topic" in run("refresh", "1.2", "--topic", "more").err


def test_notes_lost_subjects_tell(run: Run, upstream: Upstream) -> None:
    """Tools other than git's own do not carry notes along."""
    tree = opened(run, upstream, "1.1")
    git(tree, "update-ref", "-d", "refs/notes/overlay")
    amend(tree, "HEAD~2", renamed)
    assert run("refresh", "1.1").status == 0
    assert "use_irope=None" in (upstream.patches / FIRST).read_text()


def near_version(tree: Path) -> None:
    """A change that fits one release only: the line above has its version."""
    file = tree / "vllm/__init__.py"
    file.write_text(file.read_text() + "IROPE = True\n")


def test_a_conflict_writes_nothing_and_shows_both_sides(run: Run, upstream: Upstream) -> None:
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.1")
    amend(tree, "HEAD~2", near_version)
    head = git(tree, "rev-parse", "HEAD")
    ran = run("refresh", "1.1")
    assert ran.status == 5
    assert snapshot(upstream) == before
    assert git(tree, "rev-parse", "HEAD") == head
    for text in (
        f"1.0: {FIRST}\n  vllm/__init__.py hunk 1 @@ -1,1 +1,2 @@\n",
        "  - what the patch expects, + what 1.0 has at line 1\n",
        "    -__version__ = '1.1'\n    +__version__ = '1.0'\n",
        "    +__version__ = '1.2'\n",
        f"no longer applies to 1.0, 1.2 ({FIRST})",
        "--fork-at attention-signatures=1.1 --fork-at attention-signatures=1.2",
    ):
        assert text in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("edited", "forks", "texts"),
    [
        ("1.1", ("1.1", "1.2"), {"1.0": False, "1.1": True, "1.2": False}),
        ("1.0", ("1.1",), {"1.0": True, "1.1": False}),
        ("1.2", ("1.2",), {"1.0": False, "1.2": True}),
    ],
)
def test_forked(
    run: Run, upstream: Upstream, edited: str, forks: tuple[str, ...], texts: dict[str, bool]
) -> None:
    tree = opened(run, upstream, edited)
    first = git(tree, "rev-list", "--reverse", "HEAD", f"^v{edited}").split()[0].decode()
    amend(tree, first, near_version)
    refused = run("refresh", edited)
    assert refused.status == 5
    options = re.findall(r"--fork-at [^\s.]+[^\s]*", refused.err)
    wanted = [f"--fork-at attention-signatures={name}" for name in forks]
    assert [option.rstrip(".") for option in options] == wanted
    ran = run("refresh", edited, *" ".join(wanted).split())
    assert ran.status == 0, ran.err
    found = sorted((upstream.patches / "attention-signatures").iterdir())
    assert {
        file.name.removesuffix(".patch"): "IROPE" in file.read_text() for file in found
    } == texts
    valid(run)


@pytest.mark.parametrize(
    ("fork", "text"),
    [
        ("1.0", "Name a release after the first that shares it"),
        ("note=1.1", "nothing to fork"),
        ("scale=9", "unknown release '9'"),
        ("nothing=1.1", "unknown topic 'nothing'"),
    ],
)
def test_forks_that_make_no_sense(run: Run, upstream: Upstream, fork: str, text: str) -> None:
    tree = opened(run, upstream, "1.1")
    amend(tree, "HEAD~1", lambda tree: change(tree / "vllm/attention.py", "* 2", "* 3"))
    ran = run("refresh", "1.1", "--fork-at", fork)
    assert ran.status == 2
    assert text in ran.err


def test_two_edit_trees_with_one_shared_file(run: Run, upstream: Upstream) -> None:
    """The same change is one change; another one is a conflict that a fork settles."""
    trees = [opened(run, upstream, name) for name in ("1.0", "1.2")]
    for tree in trees:
        amend(tree, "HEAD~1", renamed)
    before = snapshot(upstream)
    assert run("refresh", "1.0", "1.2", "--check").status == 1
    amend(trees[1], "HEAD~1", lambda tree: change(tree / "vllm/attention.py", "=None", "=0"))
    ran = run("refresh", "1.0", "1.2")
    assert ran.status == 1
    assert f"1.0 and 1.2 both changed {FIRST}, differently" in ran.err
    assert snapshot(upstream) == before
    assert run("refresh", "1.0", "1.2", "--fork-at", "1.2").status == 0
    assert "use_irope=0" in (upstream.patches / "attention-signatures/1.2.patch").read_text()
    assert "use_irope=None" in (upstream.patches / FIRST).read_text()
    valid(run)


def test_topics_that_conflict(run: Run, upstream: Upstream) -> None:
    """A later topic, untouched, no longer fits another release: that one is named."""
    near = "[Misc] Near"
    upstream.patch("near/1.2.patch", lambda tree: change(
        tree / "vllm/attention.py", "scale * 2", "scale * 2 + 1"), series=("1.2",), subject=near,
        before=(FIRST, SCALE))  # fmt: skip
    upstream.lock()
    before = snapshot(upstream)
    tree = opened(run, upstream, "1.0")
    amend(tree, "HEAD", lambda tree: change(tree / "vllm/attention.py", "* 2", "* 3"))
    ran = run("refresh", "1.0")
    assert ran.status == 5
    assert "no longer applies to 1.2 (near/1.2.patch)" in ran.err
    assert "--fork-at scale=1.2" in ran.err
    assert snapshot(upstream) == before


def dirty(tree: Path) -> None:
    renamed(tree)


def untracked(tree: Path) -> None:
    (tree / "vllm/new.py").write_text("")


def rebasing(tree: Path) -> None:
    git(tree, "-c", "sequence.editor=sed -i 1s/pick/edit/", "rebase", "-q", "-i", "v1.1")


def merged(tree: Path) -> None:
    git(tree, "checkout", "-q", "-b", "side", "v1.1")
    (tree / "other.txt").write_text("other\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "other")
    git(tree, "checkout", "-q", "-")
    git(tree, "merge", "-q", "--no-ff", "-m", "merge", "side")


def emptied(tree: Path) -> None:
    git(tree, "commit", "-q", "--allow-empty", "-m", message("[Misc] Nothing"))


def fixup(tree: Path) -> None:
    renamed(tree)
    git(tree, "commit", "-q", "-a", "--fixup=HEAD~2")


def unsigned(tree: Path) -> None:
    text = git(tree, "log", "-1", "--format=%B").decode()
    git(tree, "commit", "-q", "--amend", "-m", text.partition("Signed-off-by")[0])


def unjustified(tree: Path) -> None:
    lines = git(tree, "log", "-1", "--format=%B").decode().strip().split("\n\n")
    git(tree, "commit", "-q", "--amend", "-m", "\n\n".join([lines[0], lines[-1]]))


def cut(tree: Path) -> None:
    text = git(tree, "log", "-1", "--format=%B").decode()
    git(tree, "commit", "-q", "--amend", "-m", text.replace("Llama 4", "---\nLlama 4"))


def binary(tree: Path) -> None:
    (tree / "vllm/blob").write_bytes(bytes(range(256)))
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "--amend", "--no-edit")


def unrelated(tree: Path) -> None:
    git(tree, "checkout", "-q", "--orphan", "alone")
    git(tree, "commit", "-q", "-m", message("[Misc] All of it"))


@pytest.mark.parametrize(
    ("spoil", "status", "texts"),
    [
        (dirty, 1, ("uncommitted changes", "vllm/attention.py", "git commit --amend")),
        (untracked, 1, ("uncommitted changes", "vllm/new.py")),
        (rebasing, 1, ("in the middle of a rebase", "git rebase --continue")),
        (merged, 1, ("has a merge commit", "git rebase v1.1")),
        (emptied, 1, ("changes nothing",)),
        (fixup, 1, ("is not squashed yet", "--autosquash")),
        (unsigned, 1, ("cannot become a patch", "no trailer Signed-off-by", "git commit --amend")),
        (unjustified, 1, ("no justification",)),
        (cut, 1, ("cannot be kept in a patch",)),
        (binary, 1, ("cannot become a patch", "a binary hunk")),
        (unrelated, 1, ("is not based on 1.1",)),
    ],
)
def test_edit_trees_that_cannot_be_taken(
    run: Run, upstream: Upstream, spoil: Callable[[Path], None], status: int, texts: tuple[str, ...]
) -> None:
    tree = opened(run, upstream, "1.1")
    before = snapshot(upstream)
    spoil(tree)
    kept = git(tree, "status", "--porcelain"), git(tree, "rev-parse", "HEAD")
    ran = run("refresh", "1.1")
    assert (ran.status, ran.out, ran.err.count("\n")) == (status, "", 1), ran.err
    for text in texts:
        assert text in ran.err
    assert snapshot(upstream) == before
    assert (git(tree, "status", "--porcelain"), git(tree, "rev-parse", "HEAD")) == kept


def test_a_series_that_changed_meanwhile(run: Run, upstream: Upstream) -> None:
    tree = opened(run, upstream, "1.1")
    other = opened(run, upstream, "1.0")
    amend(other, "HEAD", lambda tree: change(tree / "vllm/attention.py", "* 2", "* 3"))
    assert run("refresh", "1.0").status == 0
    stale = run("refresh", "1.1")
    assert stale.status == 1
    assert "the series of 1.1 changed since" in stale.err
    # Without changes of its own it is brought up to date; with some, it is left alone.
    assert run("edit", "1.1").status == 0
    assert "* 3" in (tree / "vllm/attention.py").read_text()
    assert run("refresh", "1.1").status == 0
    renamed(tree)
    refused = run("edit", "1.1")
    assert refused.status == 6
    assert "changes of its own" in refused.err
    assert "use_irope=None" in (tree / "vllm/attention.py").read_text()


def test_other_folders(run: Run, upstream: Upstream, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    assert f"refresh 1.0 --from {place}" in run("edit", "1.0", str(place)).out
    amend(place, "HEAD~1", renamed)
    wrong = run("refresh", "1.1", "--from", str(place))
    assert wrong.status == 2
    assert "it is one of 1.0" in wrong.err
    assert "is no edit tree" in run("refresh", "1.0", "--from", str(tmp_path)).err
    assert run("refresh", "1.0", "--from", str(place)).status == 0
    assert "use_irope=None" in (upstream.patches / FIRST).read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    assert "is in the way" in run("edit", "1.0", str(tmp_path / "mine")).err


def test_usage(run: Run) -> None:
    for arguments, text in (
        (("refresh",), "name one or more releases"),
        (("refresh", "1.0", "1.1", "--from", "x"), "--from goes with one release"),
        (("refresh", "1.0", "--date", "yesterday"), "--date yesterday is no date"),
        (("refresh", "1.0", "--drop", "scale"), "--drop scale: nothing to take out"),
        (("refresh", "1.0", "--topic", "scale"), "--topic has no commit to name"),
        (("refresh", "1.0", "--fork-at", "1.1"), "nothing to fork"),
        (("refresh", "0.9"), "has no patches"),
        (("edit", "3.0"), "unknown release '3.0'"),
    ):
        ran = run(*arguments)
        assert (ran.status, ran.out) == (2, ""), arguments
        assert text in ran.err


@pytest.mark.parametrize("command", [("edit", "1.0"), ("refresh", "1.0"), ("normalize", FIRST)])
def test_the_installed_package_is_not_for_editing(
    run: Run, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(project, "_INSTALLED", upstream.root)
    ran = run(*command)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "there is no checkout" in ran.err
    assert not (upstream.root / "work").exists()


def test_source_date_epoch(run: Run, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = opened(run, upstream, "1.0")
    amend(tree, "HEAD~1", renamed)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert "SOURCE_DATE_EPOCH=soon is no date" in run("refresh", "1.0").err
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    assert run("refresh", "1.0").status == 0
    assert "Last-Update: 2027-01-15\n" in (upstream.patches / FIRST).read_text()


def test_canonical_again(run: Run, upstream: Upstream) -> None:
    """Without an edit tree, or with --no-edits, the series is exported anew."""
    before = snapshot(upstream)
    file = upstream.patches / SCALE
    file.write_bytes(re.sub(rb"index [0-9a-f]{8}", b"index 00000000", file.read_bytes()))
    assert run("refresh", "1.1", "--check").status == 1
    dirty(opened(run, upstream, "1.1"))
    assert run("refresh", "1.1").status == 1
    assert run("refresh", "1.1", "--no-edits").status == 0
    assert snapshot(upstream) == before


def test_a_release_that_did_not_apply_before_is_left_alone(run: Run, upstream: Upstream) -> None:
    (upstream.patches / "note/1.2.patch").write_text("nothing\n")
    with (upstream.patches / "series/1.2").open("a") as series:
        series.write("note/1.2.patch\n")
    tree = opened(run, upstream, "1.0")
    amend(tree, "HEAD~1", renamed)
    ran = run("refresh", "1.0")
    assert ran.status == 0, ran.err
    assert "1.2: note/1.2.patch does not apply, as before" in ran.err
    assert "use_irope=None" in (upstream.patches / FIRST).read_text()


@pytest.mark.parametrize("crash_at", range(7))
def test_a_crash_while_writing(
    run: Run, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Whenever it comes: nothing was written, or the next refresh writes the rest."""
    tree = opened(run, upstream, "1.1")
    amend(tree, "HEAD~2", renamed)
    before = snapshot(upstream)
    calls = 0

    def crashing(name: str) -> Callable[[Path, Any], None]:
        real = getattr(journal, name)

        def call(path: Path, other: Any) -> None:
            nonlocal calls
            if calls == crash_at:
                raise KeyboardInterrupt
            calls += 1
            real(path, other)

        return call

    with monkeypatch.context() as patched:
        for name in ("_write", "_move"):
            patched.setattr(journal, name, crashing(name))
        patched.setattr(Journal, "_undo", lambda *_: None)  # as nobody does who is killed
        assert run("refresh", "1.1", "--date", "2027-01-02").status == 130
    half = snapshot(upstream)
    planned = crash_at > 3  # three files and the plan
    assert (half != before) is (crash_at > 4)
    checked = run("refresh", "--all", "--check", "--no-edits")
    assert ("a refresh was interrupted" in checked.err) is planned
    again = run("refresh", "1.1", "--date", "2027-01-02")
    assert again.status == 0, again.err
    assert ("finished an interrupted refresh" in again.err) is planned
    assert "use_irope=None" in (upstream.patches / FIRST).read_text()
    assert not (upstream.root / transaction.JOURNAL).exists()
    assert [path for path in upstream.root.rglob(".*.part") if "work" not in path.parts] == []
    valid(run)


def test_a_file_changed_between_crash_and_next_refresh(
    run: Run, upstream: Upstream, tmp_path: Path
) -> None:
    root = upstream.root
    (root / "a").write_text("old\n")
    stage = root / transaction.JOURNAL
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "_finish", lambda *_: None)
        transaction.write(root, {"a": b"new\n"})
    (root / "a").write_text("mine\n")
    ran = run("refresh", "--all")
    assert ran.status == 1
    assert "cannot finish the interrupted write of a" in ran.err
    assert (root / "a").read_text() == "mine\n"
    assert (stage / "0.new").read_text() == "new\n"


def test_two_at_a_time(run: Run, upstream: Upstream) -> None:
    with transaction.locked(upstream.root):
        ran = run("refresh", "1.0")
    assert ran.status == 6
    assert "another command is writing" in ran.err


def test_the_users_git_settings_do_not_leak_in(
    run: Run, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[diff]\n\tnoprefix = true\n\tcontext = 9\n[format]\n\tnotes = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    tree = opened(run, upstream, "1.0")
    subprocess.run(["git", "-C", tree, "config", "diff.noprefix", "true"], check=True)
    assert run("refresh", "1.0", "--check").status == 0
