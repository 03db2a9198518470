"""The applier: what applies, what must not, and that nothing around it misleads it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from made_upstream import Upstream, accept_use_irope, git, source_tree
from overlay.base.errors import Exit, OverlayError
from overlay.base.git import GitError
from overlay.patches import tree
from overlay.patches.patch import Patch
from overlay.patches.tree import ApplyStatus, Store, check_out
from overlay.releases import archive

GitApply = Callable[[Store, Sequence[Patch], Mapping[str, str]], str]


def test_a_shared_patch_is_clean_on_its_first_tag_and_offset_later(upstream: Upstream) -> None:
    workspace = upstream.workspace()
    get = workspace.versions.get
    first = workspace.apply(get("1.0")).applied[0]
    later = workspace.apply(get("1.1")).applied[0]
    assert first.status is ApplyStatus.CLEAN
    assert later.status is ApplyStatus.OFFSET
    assert later.offsets == (3,)


def test_tree_id_is_that_of_a_plain_git_repository(upstream: Upstream, tmp_path: Path) -> None:
    workspace = upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    plain = tmp_path / "plain"
    archive.unpack(upstream.served / "vllm-1.0.tar.gz", plain)
    git(plain / "vllm-1.0", "init", "-q")
    git(plain / "vllm-1.0", "apply", str(upstream.patches / "attention-signatures/1.0.patch"))
    git(plain / "vllm-1.0", "add", "-A", "-f")
    assert result.tree == git(plain / "vllm-1.0", "write-tree").decode().strip()


def test_commits_are_the_same_every_time(upstream: Upstream, tmp_path: Path) -> None:
    one = upstream.workspace()
    other = Upstream(upstream.served, upstream.root, tmp_path / "other-cache").workspace()
    release = one.versions.get("1.0")
    assert one.apply(release).head == other.apply(release).head


def test_work_tree_inside_another_repository(upstream: Upstream, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    workspace = upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    folder = outer / "nested"
    check_out(workspace.store, result, folder, "v1.0")
    assert "use_irope" in (folder / "vllm/attention.py").read_text()
    assert git(folder, "rev-parse", "HEAD^{tree}").decode().strip() == result.tree
    assert git(folder, "describe", "--tags").decode().startswith("v1.0-1-g")
    assert git(folder, "status", "--porcelain") == b""
    assert git(outer, "status", "--porcelain").decode() == "?? nested/\n"


def test_callers_git_environment_does_not_leak_in(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    git(decoy, "init", "-q")
    config = tmp_path / "gitconfig"
    config.write_text(
        "[diff]\n\tnoprefix = true\n[core]\n\tautocrlf = true\n[apply]\n\twhitespace = fix\n"
    )
    monkeypatch.setenv("GIT_DIR", str(decoy / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(decoy))
    monkeypatch.setenv("GIT_INDEX_FILE", str(decoy / "index"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    workspace = upstream.workspace()
    release = workspace.versions.get("1.0")
    result = workspace.apply(release)
    assert result.tree == release.tree
    folder = tmp_path / "out"
    check_out(workspace.store, result, folder, "v1.0")
    assert b"\r" not in (folder / "vllm/attention.py").read_bytes()
    assert list(decoy.iterdir()) == [decoy / ".git"]


def test_conflict_names_hunk_expected_and_found(bare_upstream: Upstream) -> None:
    file = bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    file.write_bytes(
        file.read_bytes().replace(b"self.num_heads = num_heads", b"self.heads = num_heads")
    )
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    assert result.applied[0].status is ApplyStatus.CONFLICT
    with pytest.raises(OverlayError) as caught:
        result.require()
    text = str(caught.value)
    assert caught.value.status is Exit.PATCH
    assert "vllm/attention.py hunk 1" in text
    assert "expects '        self.heads = num_heads'" in text
    assert "finds '        self.num_heads = num_heads' at line 9" in text
    assert "vllm-overlay apply 1.0 --until topic-a" in text


def test_a_change_that_upstream_has_is_reported_and_not_dropped(bare_upstream: Upstream) -> None:
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    again = bare_upstream.patches / "topic-b/1.0.patch"
    again.parent.mkdir()
    again.write_bytes((bare_upstream.patches / "topic-a/1.0.patch").read_bytes())
    with (bare_upstream.patches / "series/1.0").open("a") as listing:
        listing.write("topic-b/1.0.patch\n")
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    assert [a.status for a in result.applied] == [ApplyStatus.CLEAN, ApplyStatus.UPSTREAMED]
    with pytest.raises(OverlayError, match=r"topic-b/1\.0\.patch is upstream already"):
        result.require()


def test_patches_after_a_failure_are_not_tried(bare_upstream: Upstream) -> None:
    file = bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    (bare_upstream.patches / "series/1.0").write_text("gone/1.0.patch\ntopic-a/1.0.patch\n")
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    assert file.exists()
    assert [a.status for a in result.applied] == [ApplyStatus.MISSING, ApplyStatus.NOT_TRIED]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"vllm/attention.py", b"../outside.py", "leaves the source tree"),
        (b"a/vllm/attention.py", b"/etc/passwd", "malformed|different files|is not a/"),
        (b"new file mode 100644", b"new file mode 120000", "mode 120000"),
        (b"new file mode 100644", b"old mode 100644\nnew mode 100755", "a mode change"),
        (b"use_irope=False):\n", b"use_irope=False):\r\n", "it has CRLF lines"),
        (b"index ", b"rename from x\nrename to y\nindex ", "a rename"),
    ],
)
def test_patches_that_do_what_they_must_not(
    bare_upstream: Upstream, old: bytes, new: bytes, why: str
) -> None:
    file = bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    assert result.applied[0].status in (ApplyStatus.BROKEN, ApplyStatus.CONFLICT)
    with pytest.raises(OverlayError, match=why):
        result.require()


def test_sdist_with_a_member_outside_its_root_is_refused(
    bare_upstream: Upstream, tmp_path: Path
) -> None:
    from made_upstream import write_sdist
    from overlay.releases.archive import read_sdist

    evil = tmp_path / "vllm-9.tar.gz"
    write_sdist(evil, {"../../evil": "x"}, "vllm-9")
    with pytest.raises(OverlayError, match="lies outside the archive's top folder") as caught:
        list(read_sdist(evil))
    assert caught.value.status is Exit.INTEGRITY


def test_truncated_sdist_is_an_error_of_one_line(bare_upstream: Upstream, tmp_path: Path) -> None:
    from overlay.releases.archive import read_sdist

    short = tmp_path / "vllm-1.0.tar.gz"
    short.write_bytes((bare_upstream.served / "vllm-1.0.tar.gz").read_bytes()[:-200])
    with pytest.raises(OverlayError, match="is damaged"):
        list(read_sdist(short))


def test_ignored_files_are_in_the_tree(upstream: Upstream) -> None:
    workspace = upstream.workspace()
    base = workspace.base(workspace.versions.get("1.0"))
    names = {path for path, _, _ in workspace.store.files(base)}
    assert names == set(source_tree("1.0"))


def add_module(tree: Path) -> None:
    (tree / "vllm/b.py").write_text("B = 1\n")


def apply_nothing(store: Store, _: Sequence[Patch], env: Mapping[str, str]) -> str:
    return store.run("write-tree", env=env).decode().strip()


def apply_something_else(store: Store, patches: Sequence[Patch], env: Mapping[str, str]) -> str:
    """The files that the patches list, with other text."""
    for path in sorted({file.path for patch in patches for file in patch.files}):
        blob = store.run("hash-object", "-w", "--stdin", stdin=b"# Not this.\n").decode().strip()
        store.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
    return store.run("write-tree", env=env).decode().strip()


@pytest.mark.parametrize(
    ("git_apply", "why"),
    [
        (
            apply_nothing,
            "changed [], the patch lists ['tests/test_irope.py', ",
        ),
        (apply_something_else, "tests/test_irope.py is not what its hunks say"),
    ],
)
def test_what_git_made_is_compared_with_the_hunks(
    bare_upstream: Upstream, monkeypatch: pytest.MonkeyPatch, git_apply: GitApply, why: str
) -> None:
    """It can exit 0 without having done its work. What comes after is not tried."""
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    bare_upstream.patch("topic-b/1.0.patch", add_module, series=("1.0",))
    monkeypatch.setattr("overlay.patches.tree._git_apply", git_apply)
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    wrong, after = result.applied
    assert (wrong.status, after.status) == (ApplyStatus.CONFLICT, ApplyStatus.NOT_TRIED)
    assert f"git apply: {why}" in str(wrong.error)
    assert result.head == result.base


def test_what_git_takes_one_by_one_alone_is_taken(
    bare_upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All patches at once are for speed."""
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    bare_upstream.patch("topic-b/1.0.patch", add_module, series=("1.0",))
    workspace = bare_upstream.workspace()
    release = workspace.versions.get("1.0")
    at_once = workspace.apply(release)

    def one_alone(store: Store, patches: Sequence[Patch], env: Mapping[str, str]) -> str:
        if len(patches) > 1:
            raise GitError("apply", 1, "error: no more than one")
        return git_apply(store, patches, env)

    git_apply = tree._git_apply
    monkeypatch.setattr(tree, "_git_apply", one_alone)
    assert workspace.apply(release) == at_once
    assert all(one.status.is_good for one in at_once.applied)


def test_the_second_of_two_that_git_refuses_is_named(
    bare_upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    bare_upstream.patch("topic-b/1.0.patch", add_module, series=("1.0",))

    def refuse(store: Store, patches: Sequence[Patch], env: Mapping[str, str]) -> str:
        if patches[-1].path.topic == "topic-b":
            raise GitError("apply", 1, "error: not this")
        return git_apply(store, patches, env)

    git_apply = tree._git_apply
    monkeypatch.setattr(tree, "_git_apply", refuse)
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    first, second = result.applied
    assert (first.status, second.status) == (ApplyStatus.CLEAN, ApplyStatus.CONFLICT)
    assert "topic-b/1.0.patch does not apply: git apply: error: not this" in str(second.error)
    assert result.head == first.commit


def make_script(tree: Path) -> None:
    (tree / "vllm/run.sh").write_text("#!/bin/sh\n")
    (tree / "vllm/run.sh").chmod(0o755)


def test_files_keep_their_modes(bare_upstream: Upstream) -> None:
    bare_upstream.patch("topic-a/1.0.patch", make_script, series=("1.0",))
    bare_upstream.patch("topic-b/1.0.patch", add_module, series=("1.0",))
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0")).require()
    for one in result.applied:
        files = {path: mode for path, mode, _ in workspace.store.files(one.commit)}
        assert [path for path, is_executable in files.items() if is_executable] == ["vllm/run.sh"]


def test_commits_are_those_that_git_commit_tree_makes(upstream: Upstream) -> None:
    workspace = upstream.workspace()
    store = workspace.store
    result = workspace.apply(workspace.versions.get("1.1")).require()
    parent = result.base
    for one in result.applied:
        assert one.patch is not None
        mail = one.patch.mail
        assert one.commit == store.commit(store.tree_of(one.commit), parent, mail, mail.message)
        parent = one.commit
    assert store.run("for-each-ref", "refs/overlay/scratch") == b""


def test_a_store_that_cannot_be_written(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objects are used, no sdist is read again, and what is made goes with the run."""
    workspace = upstream.workspace()
    release = workspace.versions.get("1.0")
    base = workspace.base(release)
    shared = set(upstream.cache.rglob("*"))
    monkeypatch.setattr(tree, "is_writable", lambda *_: False)
    again = upstream.workspace()
    assert again.store.folder == workspace.store.folder
    assert again.store.base(release, lambda: pytest.fail("the sdist is read")) == base
    result = again.apply(release).require()
    assert result.tree == release.tree
    assert set(upstream.cache.rglob("*")) == shared
    folder = again.store.git.git_dir.parent
    assert folder.is_dir()
    del again
    gc.collect()
    assert not folder.exists()


def test_a_store_that_can_neither_be_written_nor_read(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sdist is imported anew."""
    workspace = upstream.workspace()
    release = workspace.versions.get("1.0")
    base = workspace.base(release)
    ref = upstream.cache / "git/refs/overlay/base" / release.sdist.sha256
    ref.write_text("1" * 40 + "\n")
    monkeypatch.setattr(tree, "is_writable", lambda *_: False)
    assert upstream.workspace().base(release) == base
