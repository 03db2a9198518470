"""The applier: what applies, what must not, and that nothing around it misleads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Upstream, accept_use_irope, git, source_tree
from overlay.base.errors import Exit, OverlayError
from overlay.patches.patch import Patch
from overlay.patches.tree import ApplyStatus, Store, check_out
from overlay.releases import archive

Commit = Callable[[Store, str, Patch, dict[str, str]], str]


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


def commit_nothing(store: Store, head: str, patch: Patch, _: dict[str, str]) -> str:
    return store.commit(store.tree_of(head), head, patch.mail, patch.mail.message)


def commit_something_else(store: Store, head: str, patch: Patch, env: dict[str, str]) -> str:
    """The files that the patch lists, with other text."""
    for file in patch.files:
        blob = store.run("hash-object", "-w", "--stdin", stdin=b"# Not this.\n").decode().strip()
        store.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{file.path}", env=env)
    tree = store.run("write-tree", env=env).decode().strip()
    return store.commit(tree, head, patch.mail, patch.mail.message)


@pytest.mark.parametrize(
    ("commit", "why"),
    [
        (
            commit_nothing,
            "changed [], the patch lists ['tests/test_irope.py', ",
        ),
        (commit_something_else, "tests/test_irope.py is not what its hunks say"),
    ],
)
def test_what_git_made_is_compared_with_the_hunks(
    bare_upstream: Upstream, monkeypatch: pytest.MonkeyPatch, commit: Commit, why: str
) -> None:
    """It can exit 0 without having done its work. What comes after is not tried."""
    bare_upstream.patch("topic-a/1.0.patch", accept_use_irope, series=("1.0",))
    bare_upstream.patch("topic-b/1.0.patch", add_module, series=("1.0",))
    monkeypatch.setattr("overlay.patches.tree._commit", commit)
    workspace = bare_upstream.workspace()
    result = workspace.apply(workspace.versions.get("1.0"))
    wrong, after = result.applied
    assert (wrong.status, after.status) == (ApplyStatus.CONFLICT, ApplyStatus.NOT_TRIED)
    assert f"git apply: {why}" in str(wrong.error)
    assert result.head == result.base
