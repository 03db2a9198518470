"""`stage`: branches for upstream, made in clones that are otherwise left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream, accept_use_irope, git, source_tree
from overlay.base.errors import Exit
from overlay.staging.onto import Destination, folder_name, parse
from overlay.testing import results

Run = Callable[..., Ran]
Change = Callable[[Path], None]
FIRST = "attention-signatures/1.0.patch"
BRANCH = "vllm-overlay/1.0/all"
QUICK = ("--without-results", "--without-lint")


def commit_all(folder: Path, subject: str = "Change it") -> str:
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-q", "--allow-empty", "-m", subject)
    return git(folder, "rev-parse", "HEAD").decode().strip()


def make_clone(folder: Path, change: Change | None = None, release: str = "1.0") -> Path:
    """A clone of a bare remote of upstream, at its main branch."""
    source = folder / "source"
    for name, text in source_tree(release).items():
        file = source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    git(source, "init", "-q", "-b", "main")
    if change:
        change(source)
    commit_all(source, "Upstream's")
    git(folder, "clone", "-q", "--bare", str(source), str(folder / "remote.git"))
    git(folder, "clone", "-q", str(folder / "remote.git"), str(folder / "clone"))
    shutil.rmtree(source)
    return folder / "clone"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return make_clone(tmp_path)


def state(folder: Path) -> tuple[bytes, ...]:
    """All that a clone consists of: refs, what is checked out, work tree, number of objects."""
    return (
        git(folder, "for-each-ref"),
        (folder / ".git/HEAD").read_bytes(),
        git(folder, "status", "--porcelain", "--ignored"),
        git(folder, "count-objects"),
    )


def head(folder: Path, branch: str = BRANCH) -> str:
    return git(folder, "rev-parse", f"refs/heads/{branch}").decode().strip()


def replace_text(old: str, new: str, path: str = "vllm/attention.py") -> Change:
    def change(tree: Path) -> None:
        file = tree / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


@pytest.fixture
def topics(upstream: Upstream) -> Upstream:
    """Four topics on 1.0: one more on the line of the first, one alone, and one that imports it."""
    change = replace_text("use_irope=False)", "use_irope=False, sinks=None)")
    upstream.patch("more-arguments/1.0.patch", change, series=("1.0",), before=(FIRST,))

    def note(tree: Path) -> None:
        (tree / "vllm/note.py").write_text("NOTE = 'x'\n")

    def use_note(tree: Path) -> None:
        (tree / "vllm/user.py").write_text("from vllm.note import NOTE\n\nprint(NOTE)\n")

    upstream.patch("a-note/1.0.patch", note, series=("1.0",), subject="[Core] Add a note")
    upstream.patch(
        "note-user/1.0.patch", use_note, series=("1.0",), subject="[Core] Print the note"
    )
    upstream.lock()
    return upstream


def test_on_the_release_s_own_tree(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    ran = run("stage", "1.0", "--without-results")
    assert ran.status == Exit.OK, ran.err
    assert f"{BRANCH} on v1.0: made" in ran.out
    assert "gh pr create" in ran.out
    made = tmp_path / "work/stage/1.0"
    message = git(made / "repository", "log", "-1", "--format=%an|%ad|%B", BRANCH).decode()
    assert message.startswith("A Tester|Sun Nov 22 12:00:00 2026 +0000|[Bugfix] Accept use_irope")
    assert message.rstrip().endswith("Signed-off-by: A Tester <tester@example.org>")
    assert not {"Origin", "Bug", "Forwarded", "Last-Update"} & {
        line.partition(":")[0] for line in message.splitlines()
    }
    tree = git(made / "repository", "rev-parse", f"{BRANCH}^{{tree}}").decode().strip()
    assert tree == upstream.workspace().versions.get("1.0").tree


def test_the_bundle_and_the_mails_give_the_same_commits(
    upstream: Upstream, run: Run, tmp_path: Path
) -> None:
    assert run("stage", "1.0", *QUICK).status == Exit.OK
    made = tmp_path / "work/stage/1.0"
    wanted = head(made / "repository")
    git(tmp_path, "clone", "-q", "-b", BRANCH, str(made / "all/branch.bundle"), "cloned")
    assert head(tmp_path / "cloned") == wanted
    git(tmp_path / "cloned", "switch", "-q", "-c", "again", "v1.0")
    mails = sorted(map(str, (made / "all/mails").glob("*.patch")))
    git(tmp_path / "cloned", "am", "-q", "--keep-non-patch", "--committer-date-is-author-date",
        *mails)  # fmt: skip
    assert head(tmp_path / "cloned", "again") == wanted


def test_a_second_run_changes_nothing(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    assert run("stage", "1.0", *QUICK).status == Exit.OK
    folder = tmp_path / "work/stage/1.0/all"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    ran = run("stage", "1.0", *QUICK)
    assert ran.status == Exit.OK
    assert "there already" in ran.out
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_bundle_is_of_the_branch_staged_last(
    upstream: Upstream, run: Run, clone: Path, tmp_path: Path
) -> None:
    assert run("stage", "1.0", *QUICK).status == Exit.OK
    made = tmp_path / "work/stage/1.0"
    for arguments, repository in (
        (("--onto", str(clone)), clone),
        ((), made / "repository"),
    ):
        assert run("stage", "1.0", *arguments, *QUICK).status == Exit.OK
        heads = git(made, "bundle", "list-heads", str(made / "all/branch.bundle")).decode()
        assert f"{head(repository)} refs/heads/{BRANCH}\n" in heads


def test_mails_of_topics_that_are_gone_do_not_stay(
    topics: Upstream, run: Run, tmp_path: Path
) -> None:
    assert run("stage", "1.0", *QUICK).status == Exit.OK
    (topics.patches / "series/1.0").write_text(f"{FIRST}\n")
    topics.lock()
    assert run("stage", "1.0", "--replace", *QUICK).status == Exit.OK
    assert len(list((tmp_path / "work/stage/1.0/all/mails").iterdir())) == 1


@pytest.mark.parametrize("checked_out", ["main", "--detach"])
def test_a_dirty_clone_keeps_its_checkout(
    upstream: Upstream, run: Run, clone: Path, checked_out: str
) -> None:
    git(clone, "switch", "-q", checked_out)
    (clone / "vllm/attention.py").write_text("being written\n")
    (clone / "untracked").write_text("x")
    (clone / "setup.py").unlink()
    git(clone, "add", "setup.py")
    before = state(clone)[1:3]
    ran = run("stage", "1.0", "--onto", f"{clone}@main", *QUICK)
    assert ran.status == Exit.OK, ran.err
    assert state(clone)[1:3] == before
    assert git(clone, "rev-parse", f"{BRANCH}~1") == git(clone, "rev-parse", "main")
    assert b"use_irope" in git(clone, "show", f"{BRANCH}:vllm/attention.py")
    assert f"--base main --head {BRANCH}" in ran.out


def test_without_a_ref_it_starts_from_what_is_checked_out(
    upstream: Upstream, run: Run, clone: Path, tmp_path: Path
) -> None:
    git(clone, "worktree", "add", "-q", "-b", "mine", str(tmp_path / "linked"))
    commit_all(tmp_path / "linked", "Mine")
    assert run("stage", "1.0", "--onto", str(tmp_path / "linked"), *QUICK).status == Exit.OK
    assert git(clone, "rev-parse", f"{BRANCH}~1") == git(clone, "rev-parse", "mine")


def test_a_url_is_fetched_and_pushed_to(upstream: Upstream, run: Run, clone: Path) -> None:
    remote = clone.parent / "remote.git"
    url = f"file://{remote}"
    ran = run("stage", "1.0", "--onto", f"{url}@main", "--push", url, *QUICK)
    assert ran.status == Exit.OK, ran.err
    assert git(remote, "rev-parse", f"{BRANCH}~1") == git(remote, "rev-parse", "main")
    assert head(clone.parent / "work/stage/1.0" / folder_name(url)) == head(remote)


def test_push_is_plain_and_a_diverged_remote_is_left_alone(
    upstream: Upstream, run: Run, clone: Path, tmp_path: Path
) -> None:
    push = ("stage", "1.0", "--onto", str(clone), "--push", "origin", *QUICK)
    assert run(*push).status == Exit.OK
    remote = tmp_path / "remote.git"
    assert head(remote) == head(clone)
    assert run(*push).status == Exit.OK  # again: up to date
    git(tmp_path, "clone", "-q", "-b", BRANCH, str(remote), "other")
    git(tmp_path / "other", "commit", "-q", "--amend", "-m", "Someone else's")
    git(tmp_path / "other", "push", "-q", "--force", "origin", BRANCH)
    theirs = head(remote)
    ran = run(*push)
    assert ran.status == Exit.ENVIRONMENT
    assert "the remote has other commits on that branch" in ran.err
    assert ran.err.count("\n") == 1
    assert head(remote) == theirs


def test_a_remote_that_is_not_there(upstream: Upstream, run: Run, clone: Path) -> None:
    ran = run("stage", "1.0", "--onto", str(clone), "--push", "nowhere", *QUICK)
    assert ran.status == Exit.ENVIRONMENT
    assert "pushing vllm-overlay/1.0/all to nowhere failed" in ran.err


def test_a_dry_run_writes_nothing(upstream: Upstream, run: Run, clone: Path) -> None:
    before = state(clone)
    ran = run("stage", "1.0", "--onto", str(clone), "--push", "origin", "--dry-run", *QUICK)
    assert ran.status == Exit.OK
    assert "would be made" in ran.out
    assert "would be pushed to origin" in ran.out
    assert "## Purpose" in ran.out
    assert run("stage", "1.0", "--dry-run", *QUICK).status == Exit.OK
    assert state(clone) == before
    assert not (clone.parent / "work").exists()


def test_conflict_names_both_sides_and_changes_nothing(
    upstream: Upstream, run: Run, tmp_path: Path
) -> None:
    clone = make_clone(tmp_path, replace_text("num_heads, scale)", "num_heads, scale, window)"))
    before = state(clone)
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.PATCH
    assert "attention-signatures  conflict" in ran.out
    assert "vllm/attention.py hunk 1" in ran.err
    assert "main has:\n        def __init__(self, num_heads, scale, window):" in ran.err
    assert "the patch has:\n        def __init__(self, num_heads, scale, use_irope" in ran.err
    assert state(clone) == before
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").rglob("*.patch"))


def test_a_file_that_upstream_deleted_is_a_conflict(
    upstream: Upstream, run: Run, tmp_path: Path
) -> None:
    clone = make_clone(tmp_path, lambda tree: (tree / "vllm/attention.py").unlink())
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.PATCH
    assert "vllm/attention.py is not there" in ran.err


def test_three_way_merge_where_only_the_context_changed(
    upstream: Upstream, run: Run, tmp_path: Path
) -> None:
    clone = make_clone(tmp_path, replace_text("class XFormersImpl:", "class XFormersImpl(Base):"))
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.OK, ran.err
    assert "attention-signatures  merged" in ran.out
    text = git(clone, "show", f"{BRANCH}:vllm/attention.py").decode()
    assert "class XFormersImpl(Base):" in text
    assert "scale, use_irope=False):" in text
    changed = git(clone, "diff", "--name-only", "main", BRANCH).decode().split()
    assert changed == ["tests/test_irope.py", "vllm/attention.py"]


def test_offset_on_a_later_tree(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    clone = make_clone(tmp_path, release="1.1")
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert "attention-signatures  offset +3" in ran.out


@pytest.mark.parametrize("also", ["", "class XFormersImpl:"])
def test_what_upstream_has_is_left_out(
    topics: Upstream, run: Run, tmp_path: Path, also: str
) -> None:
    """In the same place, or where only a merge can tell."""

    def change(tree: Path) -> None:
        accept_use_irope(tree)
        if also:
            replace_text(also, "class XFormersImpl(Base):")(tree)

    clone = make_clone(tmp_path, change)
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.OK, ran.err
    assert "attention-signatures  already upstream" in ran.out
    subjects = git(clone, "log", "--format=%s", f"main..{BRANCH}").decode().splitlines()
    assert len(subjects) == 3


def test_nothing_to_make_if_upstream_has_all(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    clone = make_clone(tmp_path, accept_use_irope)
    before = state(clone)
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.OK
    assert f"{BRANCH} on main: nothing to make" in ran.out
    assert state(clone) == before


def test_a_branch_that_differs_is_moved_only_if_told_to(
    upstream: Upstream, run: Run, clone: Path
) -> None:
    git(clone, "branch", BRANCH)
    old = head(clone)
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.PROBLEMS
    assert "Pass --replace to move it" in ran.err
    assert head(clone) == old
    git(clone, "switch", "-q", BRANCH)
    ran = run("stage", "1.0", "--onto", f"{clone}@main", "--replace", *QUICK)
    assert ran.status == Exit.PROBLEMS
    assert f"is checked out in {clone}" in ran.err
    assert head(clone) == old
    git(clone, "switch", "-q", "--detach")
    ran = run("stage", "1.0", "--onto", f"{clone}@main", "--replace", *QUICK)
    assert f"replaced, was {old[:12]}" in ran.out
    assert head(clone) != old


def test_a_ref_in_the_way(upstream: Upstream, run: Run, clone: Path) -> None:
    git(clone, "branch", "vllm-overlay")
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.ENVIRONMENT
    assert f"cannot make branch {BRANCH}" in ran.err
    assert ran.err.count("\n") == 1


def test_a_shallow_clone_will_do(upstream: Upstream, run: Run, clone: Path) -> None:
    commit_all(clone, "Another")
    git(clone, "push", "-q", "origin", "main")
    shallow = clone.parent / "shallow"
    remote = f"file://{clone.parent / 'remote.git'}"
    git(clone.parent, "clone", "-q", "--depth", "1", remote, str(shallow))
    ran = run("stage", "1.0", "--onto", str(shallow), "--push", "origin", *QUICK)
    assert ran.status == Exit.OK, ran.err
    assert head(clone.parent / "remote.git") == head(shallow)


def unborn(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    git(folder, "init", "-q")


def other_project(folder: Path) -> None:
    git(folder, "rm", "-rq", "vllm")
    git(folder, "commit", "-q", "-m", "Another project")


@pytest.mark.parametrize(
    ("change", "ref", "says"),
    [
        (lambda _: None, "@mian", "no 'mian' in {clone}: it is no branch, tag or commit there. "
         "Did you mean main"),
        (lambda clone: shutil.rmtree(clone), "", "{clone} is no git repository: it is not there"),
        (lambda clone: shutil.rmtree(clone / ".git"), "", "there is no .git in it"),
        (unborn, "", "nothing is checked out in {clone}"),
        (other_project, "", "{clone} is not upstream's: main has no file of vllm/ in common"),
        (lambda clone: git(clone, "config", "remote.origin.promisor", "true"), "",
         "{clone} is a partial clone"),
    ],
)  # fmt: skip
def test_repositories_that_will_not_do(
    upstream: Upstream, run: Run, clone: Path, change: Change, ref: str, says: str
) -> None:
    change(clone)
    ran = run("stage", "1.0", "--onto", f"{clone}{ref}", *QUICK)
    assert ran.status == Exit.USAGE
    assert says.format(clone=clone) in ran.err
    assert ran.err.count("\n") == 1


def test_a_url_that_leads_nowhere(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    ran = run("stage", "1.0", "--onto", f"file://{tmp_path}/gone.git@main", *QUICK)
    assert ran.status == Exit.UNAVAILABLE
    assert "cannot fetch file://" in ran.err


def test_sign_off_is_required(upstream: Upstream, run: Run) -> None:
    file = upstream.patches / FIRST
    file.write_bytes(file.read_bytes().replace(b"Signed-off-by: A ", b"Signed-off-by: Not A "))
    ran = run("stage", "1.0", *QUICK)
    assert ran.status == Exit.PATCH
    assert "is not signed off by its author" in ran.err
    assert "'Signed-off-by: A Tester <tester@example.org>'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--topic", "a-nite"), "no topic 'a-nite' in the series of 1.0"),
        (("--with-needed",), "--with-needed goes with --topic"),
        (("--each", "--topic", "a-note", "--with-needed"), "leave --with-needed out"),
    ],
)
def test_wrong_arguments(topics: Upstream, run: Run, arguments: tuple[str, ...], says: str) -> None:
    ran = run("stage", "1.0", *arguments, *QUICK)
    assert ran.status == Exit.USAGE
    assert says in ran.err


@pytest.mark.parametrize(
    ("topic", "needed"), [("more-arguments", "attention-signatures"), ("note-user", "a-note")]
)
def test_a_topic_that_needs_another(
    topics: Upstream, run: Run, tmp_path: Path, topic: str, needed: str
) -> None:
    """By its text, or by what it imports."""
    ran = run("stage", "1.0", "--topic", topic, *QUICK)
    assert ran.status == Exit.USAGE
    assert f"{topic} of 1.0 does not stand alone: it needs {needed}." in ran.err
    ran = run("stage", "1.0", "--topic", topic, "--with-needed", "--json", *QUICK)
    (made,) = json.loads(ran.out)
    assert list(made["topics"]) == [needed, topic]
    assert made["branch"] == f"vllm-overlay/1.0/{topic}"


def test_each_topic_on_a_branch_of_its_own(topics: Upstream, run: Run) -> None:
    ran = run("stage", "1.0", "--each", "--json", *QUICK)
    assert {
        one["branch"].rpartition("/")[2]: list(one["topics"]) for one in json.loads(ran.out)
    } == {
        "attention-signatures": ["attention-signatures"],
        "more-arguments": ["attention-signatures", "more-arguments"],
        "a-note": ["a-note"],
        "note-user": ["a-note", "note-user"],
    }


def test_two_topics_share_a_title(topics: Upstream, run: Run) -> None:
    ran = run("stage", "1.0", "--topic", "a-note", "--topic", FIRST.split("/")[0], "--json", *QUICK)
    (made,) = json.loads(ran.out)
    assert made["title"] == "[Bugfix][Core] Accept use_irope in XFormersImpl; Add a note"


def keep(upstream: Upstream, work: Path, suite: str) -> None:
    release = upstream.workspace().versions.get("1.0")
    verdict = results.Verdict("1.0", ("a", "b"), ("c",), {"d": "no GPU"}, ("e broke",))
    folder = work / suite / "1.0"
    folder.mkdir(parents=True)
    results.keep(folder, release, suite, verdict, "3.12.1")


def test_results_are_demanded_and_never_made_up(topics: Upstream, run: Run, tmp_path: Path) -> None:
    ran = run("stage", "1.0")
    assert ran.status == Exit.UNAVAILABLE
    assert "Run 'vllm-overlay regress 1.0', or pass --without-results" in ran.err
    keep(topics, tmp_path / "work", "regress")
    ran = run("stage", "1.0")
    assert "Run 'vllm-overlay upstream 1.0'" in ran.err
    keep(topics, tmp_path / "work", "upstream")
    ran = run("stage", "1.0", "--json")
    (made,) = json.loads(ran.out)
    assert "| regress | 2 | 1 | 1 | 1 |" in made["body"]
    assert "- Problem: e broke" in made["body"]
    assert "vllm-overlay regress 1.0\nvllm-overlay upstream 1.0" in made["body"]
    (topics.patches / "series/1.0").write_text(f"{FIRST}\n")
    topics.lock()
    ran = run("stage", "1.0")
    assert ran.status == Exit.UNAVAILABLE
    assert "its result is of tree" in ran.err


def test_without_results_the_body_says_so(upstream: Upstream, run: Run, tmp_path: Path) -> None:
    assert run("stage", "1.0", *QUICK).status == Exit.OK
    body = (tmp_path / "work/stage/1.0/all/pull-request.md").read_text()
    assert "## Test Result\n\nNot run.\n" in body


CHECK = """import sys

bad = 0
for path in sys.argv[1:]:
    for number, line in enumerate(open(path), 1):
        if "use_" in line:
            print(f"{path}:{number}:1: no {line.split('use_')[1][:5]}")
            bad = 1
sys.exit(bad)
"""
CONFIG = """repos:
- repo: local
  hooks:
  - id: check-use
    entry: python tools/check.py
    language: python
    types: [python]
    exclude: ^tests/
"""


def with_linter(text: str) -> Change:
    def change(tree: Path) -> None:
        (tree / "tools").mkdir()
        (tree / "tools/check.py").write_text(CHECK)
        (tree / ".pre-commit-config.yaml").write_text(CONFIG)
        with (tree / "vllm/attention.py").open("a") as stream:
            stream.write(text)

    return change


def test_upstream_s_linters_keep_a_branch_from_being_made(
    upstream: Upstream, run: Run, tmp_path: Path
) -> None:
    clone = make_clone(tmp_path, with_linter("# use_other\n"))
    before = state(clone)
    ran = run("stage", "1.0", "--onto", str(clone), "--without-results")
    assert ran.status == Exit.PROBLEMS
    assert "attention-signatures: vllm/attention.py:8: no irope [check-use]" in ran.err
    assert "other" not in ran.err  # it was there before
    assert "tests/test_irope.py" not in ran.err
    assert state(clone) == before
    ran = run("stage", "1.0", "--onto", str(clone), *QUICK)
    assert ran.status == Exit.OK


@pytest.mark.parametrize(
    ("text", "place", "ref"),
    [
        ("https://example.org/vllm/vllm", "https://example.org/vllm/vllm", None),
        ("https://me@example.org/vllm/vllm", "https://me@example.org/vllm/vllm", None),
        ("https://me@example.org/vllm@main", "https://me@example.org/vllm", "main"),
        ("ssh://git@example.org/vllm", "ssh://git@example.org/vllm", None),
        ("git@example.org:vllm/vllm.git", "git@example.org:vllm/vllm.git", None),
        ("git@example.org:vllm.git@releases/v1", "git@example.org:vllm.git", "releases/v1"),
        ("../vllm@v1.0", "../vllm", "v1.0"),
        ("../vllm", "../vllm", None),
    ],
)
def test_places_and_refs(text: str, place: str, ref: str | None) -> None:
    assert parse(text) == Destination(place, ref)


def test_a_path_with_an_at_sign_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert parse(f"{tmp_path}/a@b") == Destination(f"{tmp_path}/a@b", None)
    assert parse(f"{tmp_path}/a@b@main") == Destination(f"{tmp_path}/a@b", "main")
