"""Source trees: a release's sdist as a git commit, and a series applied on top of it.

There is one applier, `apply_series`. validate, build, apply and the tests all call it. It
works on git objects alone (a private index in a bare repository in the cache), so it is
fast, leaves no half-patched folder behind, and cannot be misled by a repository around it.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import IO, TypeAlias
from uuid import uuid4

from overlay.base.errors import Exit, OverlayError, said
from overlay.base.git import Git, GitError
from overlay.base.locking import file_lock
from overlay.patches import guilt
from overlay.patches.borrowed import BASES, borrow, is_writable
from overlay.patches.guilt import Earlier, PatchedTree
from overlay.patches.hunks import (
    HunkMatch,
    MatchKind,
    apply_hunks,
    describe_mismatch,
    is_applied,
    to_bytes,
    to_text,
)
from overlay.patches.objects import blob_id, tree_id
from overlay.patches.patch import Mail, Patch, read_patch
from overlay.patches.series import PatchPath
from overlay.releases import archive
from overlay.releases.versions import PinnedFile, Release

#: Base commits are the same everywhere: fixed author, and the release's name as message.
_BASE_IDENTITY = "vllm-overlay <vllm-overlay@localhost> 0 +0000"
#: Stands for a tree id not yet pinned.
UNKNOWN_TREE = "0" * 40
#: In git's listings: no file.
NO_BLOB = "0" * 40
#: fast-import leaves a pack for each run, which nothing would clear away; its objects are wanted
#: as loose ones, and the pack in between need not be small.
_LOOSE = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "fastimport.unpackLimit",
    "GIT_CONFIG_VALUE_0": "1000000",
    "GIT_CONFIG_KEY_1": "pack.compression",
    "GIT_CONFIG_VALUE_1": "0",
}
#: Files by path; None: there is no such file.
Texts: TypeAlias = "dict[str, str | None]"


class ApplyStatus(Enum):
    """What became of one patch on one release."""

    CLEAN = "clean"
    OFFSET = "offset"
    CONFLICT = "conflict"
    UPSTREAMED = "already upstream"
    BROKEN = "broken"
    MISSING = "missing"
    NOT_TRIED = "not tried"

    @property
    def is_good(self) -> bool:
        """Whether the patch is in the tree."""
        return self in (ApplyStatus.CLEAN, ApplyStatus.OFFSET)


@dataclass(frozen=True)
class Applied:
    """One patch of a series, tried."""

    path: PatchPath
    status: ApplyStatus
    patch: Patch | None = None
    commit: str = ""
    """Commit id with the patch in it, when it applied."""
    matches: tuple[HunkMatch, ...] = ()
    error: OverlayError | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        """Line offsets of the hunks that moved."""
        return tuple(m.offset for m in self.matches if m.kind is MatchKind.OFFSET)

    @property
    def failures(self) -> tuple[HunkMatch, ...]:
        """The hunks that match nowhere, or in several places."""
        return tuple(match for match in self.matches if not match.is_good)

    @property
    def summary(self) -> str:
        """What became of it in a word or two: clean, offset +3, conflict, …"""
        if self.status is not ApplyStatus.OFFSET:
            return str(self.status.value)
        return f"{self.status.value} {max(self.offsets, key=abs, default=0):+d}"


@dataclass(frozen=True)
class Result:
    """A whole series applied to a release, as far as it went."""

    release: Release
    base: str
    """Commit of the unpacked sdist."""
    applied: tuple[Applied, ...]
    tree: str
    """Git tree id after the last patch that applied."""

    @property
    def head(self) -> str:
        """Commit after the last patch that applied."""
        good = [a.commit for a in self.applied if a.status.is_good]
        return good[-1] if good else self.base

    @property
    def error(self) -> OverlayError | None:
        """Why the series stopped, if it did."""
        return next((a.error for a in self.applied if a.error), None)

    def require(self) -> Result:
        """This result, if every patch applied.

        Raises:
            OverlayError: the first patch that did not.
        """
        if self.error:
            raise self.error
        return self


@dataclass(frozen=True)
class Change:
    """What a patch makes of the files that it touches."""

    patch: Patch
    after: Texts
    modes: Mapping[str, str]
    """By path, as git writes them."""


@dataclass(frozen=True)
class Store:
    """A bare repository in the cache that holds the releases' source trees."""

    folder: Path
    git: Git = field(repr=False)
    """Of that folder, or of a temporary one where it can't be written."""
    known: dict[PatchPath, Patch] = field(default_factory=dict, repr=False, compare=False)
    """Patches that were parsed already, as they were last read: releases share most."""
    trees: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Tree ids by commit, as far as they were asked for."""

    @classmethod
    def open(cls, cache: Path) -> Store:
        """The store in `cache`, made if there is none.

        Of a cache that can't be written, the objects are borrowed (`borrowed`).

        Raises:
            OverlayError: it can't be made.
        """
        folder = cache / "git"
        store = cls(folder, Git(folder))
        try:
            if not is_writable(cache, folder):
                return cls(folder, borrow(folder))
            if not (folder / "HEAD").is_file():
                cache.mkdir(parents=True, exist_ok=True)
                with file_lock(cache / "git.lock"):
                    if not (folder / "HEAD").is_file():  # another run may have made it meanwhile
                        _init_bare(folder)
        except (OSError, GitError) as error:
            raise OverlayError(
                f"cannot make {folder}",
                said(error),
                "Delete it if it is there, make its folder writable with room on the disk, or "
                "name another cache with VLLM_OVERLAY_CACHE",
                Exit.ENVIRONMENT,
            ) from error
        return store

    def run(
        self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> bytes:
        """Git's stdout for a command that can only fail if the store or the machine is at fault.

        Raises:
            OverlayError: it failed.
        """
        try:
            return self.git.run(*arguments, stdin=stdin, env=env)
        except GitError as error:
            raise self.fault(error) from error

    def send(self, other: Git, commit: str, since: str = "") -> None:
        """Copy to another repository what `commit` has, less what `since` has.

        Raises:
            OverlayError: it failed.
        """
        try:
            self.git.send(other, commit, since)
        except GitError as error:
            raise self.fault(error) from error

    def fault(self, error: Exception) -> OverlayError:
        """The error for a store that git cannot use."""
        return OverlayError(
            f"git cannot use {self.folder}",
            getattr(error, "said", "") or said(error),
            "If the disk is full, make room; else delete that folder: it is made anew from the "
            "sdists",
            Exit.ENVIRONMENT,
        )

    def base(self, release: Release, sdist: Callable[[], Path]) -> str:
        """Commit of `release`'s sdist, imported from the file `sdist()` the first time.

        Raises:
            OverlayError: a member leaves its root, or the tree is not the one pinned.
        """
        commit = self.imported(release.name, release.sdist, sdist)
        tree = self.tree_of(commit)
        if release.upstream_tree not in (tree, UNKNOWN_TREE):
            raise OverlayError(
                f"{release.name}: the source tree is not the one pinned",
                f"its tree id is {tree}, VERSIONS.toml says {release.upstream_tree}",
                f"Delete {self.folder} and try again; if it stays, the pin is wrong",
                Exit.INTEGRITY,
            )
        return commit

    def imported(self, name: str, pinned: PinnedFile, sdist: Callable[[], Path]) -> str:
        """Commit of release `name`'s sdist `pinned`, whatever its tree; imported as by `base`.

        Raises:
            OverlayError: a member leaves its root.
        """
        ref = f"{BASES}/{pinned.sha256}"
        found = self._resolve(ref)
        if found:
            return found
        try:
            with file_lock(self.git.git_dir.parent / f"git-{name}.lock"):
                return self._resolve(ref) or self._import(name, pinned, sdist(), ref)
        except OSError as error:
            raise self.fault(error) from error

    def tree_of(self, commit: str) -> str:
        """Tree id of a commit."""
        if commit not in self.trees:
            self.trees[commit] = self.run("rev-parse", f"{commit}^{{tree}}").decode().strip()
        return self.trees[commit]

    def _resolve(self, ref: str) -> str | None:
        try:
            commit, tree = self.git.text(
                "rev-parse", f"{ref}^{{commit}}", f"{ref}^{{tree}}"
            ).split()
        except GitError:
            return None
        self.trees[commit] = tree
        return commit

    def _import(self, name: str, pinned: PinnedFile, sdist: Path, ref: str) -> str:
        stream = io.BytesIO()
        _write_fast_import(f"{name}: {pinned.file}\n", sdist, ref, stream)
        # Git's own lock of the ref outlives a git that is killed. We hold ours, so nobody has it.
        (self.git.git_dir / f"{ref}.lock").unlink(missing_ok=True)
        # --force: a ref whose commit is lost is made anew.
        self.run("fast-import", "--quiet", "--done", "--force", stdin=stream.getvalue())
        return self.run("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()

    def commit(self, tree: str, parent: str, mail: Mail, message: str) -> str:
        """A commit with the author and date of `mail`, as committer too: the same every time."""
        who = {
            f"GIT_{role}_{key}": value
            for role in ("AUTHOR", "COMMITTER")
            for key, value in (("NAME", mail.author), ("EMAIL", mail.email), ("DATE", mail.date))
        }
        out = self.run("commit-tree", tree, "-p", parent, stdin=message.encode(), env=who)
        return out.decode().strip()

    def commits(self, parent: str, changes: Sequence[Change]) -> list[str]:
        """A commit for each of `changes`, one on the other and the first on `parent`, as `commit`
        makes them. One process for all of them."""
        ref = f"refs/overlay/scratch/{uuid4().hex}"
        stream = io.BytesIO()
        stream.write(b"feature done\n")
        for number, change in enumerate(changes, 1):
            _write_commit(stream, ref, number, parent, change)
            parent = f":{number}"
        stream.write(f"reset {ref}\nfrom {NO_BLOB}\n\n".encode())  # it goes again
        for number in range(1, 1 + len(changes)):
            stream.write(b'get-mark :%d\nls :%d ""\n' % (number, number))
        stream.write(b"done\n")
        out = self.run(
            "fast-import", "--quiet", "--done", "--date-format=rfc2822", "--depth=0",
            stdin=stream.getvalue(), env=_LOOSE,
        )  # fmt: skip
        lines = out.decode().splitlines()
        # "040000 tree ID", a tab and no path.
        self.trees.update(zip(lines[::2], (line.split()[2] for line in lines[1::2]), strict=True))
        return lines[::2]

    @contextmanager
    def index(self, commit: str) -> Iterator[dict[str, str]]:
        """Environment with a private index that holds `commit`'s tree."""
        with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
            env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
            self.run("read-tree", commit, env=env)
            yield env

    def show(self, treeish: str, path: str) -> bytes | None:
        """The file `path` in a commit or tree, or None.

        Raises:
            OverlayError: there is no such commit or tree, or the store is damaged.
        """
        name = f"{treeish}:{path}"
        try:
            return self.git.run("cat-file", "blob", name)
        except GitError as error:
            if "does not exist in" not in error.stderr and not self._is_folder(name):
                raise self.fault(error) from error
            return None

    def show_many(self, treeish: str, paths: Iterable[str]) -> dict[str, bytes | None]:
        """Files in a commit or tree, by path; None where there is no such file.

        Two processes for all of them, where `show` takes one or two for each.
        """
        wanted = sorted(set(paths))
        found = {path: data for path, _, data in self.files(treeish, wanted)} if wanted else {}
        return {path: found.get(path) for path in wanted}

    def _is_folder(self, name: str) -> bool:
        return self.run("cat-file", "-t", name) == b"tree\n"

    def files(self, treeish: str, paths: Sequence[str] = ()) -> Iterator[tuple[str, bool, bytes]]:
        """Every file of a commit or tree, or of `paths` alone: path, whether it is executable,
        bytes; in path order.

        Raises:
            OverlayError: the store is damaged, or an object is not what its name says.
        """
        entries = self._listing(treeish, paths)
        if not paths and tree_id(entries) != self.tree_of(treeish):
            raise self.fault(GitError("ls-tree", 0, f"{treeish} has other files than its id says"))
        data = self.blobs(blob for _, _, blob in entries)
        yield from ((path, executable, data[blob]) for path, executable, blob in entries)

    def _listing(self, treeish: str, paths: Sequence[str] = ()) -> list[tuple[str, bool, str]]:
        """Path, whether it is executable, and blob id of every file, or of `paths` alone."""
        arguments = ("ls-tree", "-r", "-z", treeish, "--", *paths) if paths else (
            "ls-tree", "-r", "-z", treeish)  # fmt: skip
        entries = []
        for line in self.run(*arguments).decode("utf-8", "surrogateescape").split("\0")[:-1]:
            kind, path = line.split("\t", 1)
            mode, _, blob = kind.split(" ")
            entries.append((path, mode == "100755", blob))
        return entries

    def listing(self, treeish: str) -> dict[str, str]:
        """Blob id of every file of a commit or tree, by path."""
        return {path: blob for path, _, blob in self._listing(treeish)}

    def blobs(self, ids: Iterable[str]) -> dict[str, bytes]:
        """The bytes of blobs, by id."""
        wanted = list(dict.fromkeys(ids))
        lines = "".join(f"{blob}\n" for blob in wanted).encode()
        stream = io.BytesIO(self.run("cat-file", "--batch", stdin=lines) if wanted else b"")
        found = {}
        for blob in wanted:
            head = stream.readline().split()
            if head[1:2] != [b"blob"]:
                raise self.fault(GitError("cat-file", 0, f"{blob} is missing"))
            found[blob] = stream.read(int(head[2]))
            stream.read(1)
            if blob_id(found[blob]) != blob:
                raise self.fault(GitError("cat-file", 0, f"{blob} is another file"))
        return found

    def changed(self, old: str, new: str) -> dict[str, str]:
        """Paths that differ between two commits, with A, M or D each."""
        out = self.run("diff-tree", "-r", "-z", "--no-renames", "--name-status", old, new)
        parts = out.decode("utf-8", "surrogateescape").split("\0")[:-1]
        return dict(zip(parts[1::2], parts[::2], strict=True))

    def count(self, base: str, head: str) -> int:
        """How many commits lead from `base` to `head`."""
        return int(self.run("rev-list", "--count", f"{base}..{head}"))

    def blobs_changed(self, old: str, new: str) -> dict[str, str]:
        """Paths that differ between two trees, with the new blob id or `NO_BLOB` each."""
        out = self.run("diff-tree", "-r", "-z", "--no-renames", "--raw", old, new)
        parts = out.decode("utf-8", "surrogateescape").split("\0")[:-1]
        # Modes, blob ids and how; then the path.
        return {path: how.split(" ")[3] for how, path in zip(parts[::2], parts[1::2], strict=True)}


def _init_bare(folder: Path) -> None:
    """Make a bare repository that has its name when it is complete, and not before."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch, folder.name)
        Git(made).run("init", "--quiet", "--bare", str(made))
        made.rename(folder)


def _write_fast_import(subject: str, sdist: Path, ref: str, stream: IO[bytes]) -> None:
    """Write the sdist as one commit in git's fast-import format."""
    message = subject.encode()
    stream.write(b"feature done\n")
    stream.write(f"commit {ref}\ncommitter {_BASE_IDENTITY}\n".encode())
    stream.write(b"data %d\n%s\ndeleteall\n" % (len(message), message))
    for member, data in archive.read_sdist(sdist):
        mode = b"100755" if member.mode & 0o100 else b"100644"
        quoted = _quote(member.name)
        stream.write(b"M %s inline %s\ndata %d\n" % (mode, quoted, len(data)))
        stream.write(data)
        stream.write(b"\n")
    stream.write(b"done\n")


def _write_commit(stream: IO[bytes], ref: str, mark: int, parent: str, change: Change) -> None:
    """Write a change as a commit in git's fast-import format; its mark is a number."""
    mail = change.patch.mail
    message = mail.message.encode()
    # As git does with names that it is given otherwise.
    author, email = (re.sub("[<>]", "", each) for each in (mail.author, mail.email))
    stream.write(f"commit {ref}\nmark :{mark}\n".encode())
    for role in ("author", "committer"):
        stream.write(f"{role} {author} <{email}> {mail.date}\n".encode())
    stream.write(b"data %d\n%s\nfrom %s\n" % (len(message), message, parent.encode()))
    for path, text in change.after.items():
        data, quoted = to_bytes(text), _quote(path)
        if data is None:
            stream.write(b"D %s\n" % quoted)
            continue
        mode = change.modes[path].encode()
        stream.write(b"M %s inline %s\ndata %d\n%s\n" % (mode, quoted, len(data), data))
    stream.write(b"\n")


def _quote(path: str) -> bytes:
    raw = path.encode("utf-8", "surrogateescape")
    return b'"' + raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def apply_series(
    store: Store, release: Release, base: str, patches: Path, series: Sequence[PatchPath]
) -> Result:
    """Apply `series` in order to the commit `base`, with zero fuzz.

    Stops at the first patch that does not apply; the rest are NOT_TRIED. Every patch that
    applies becomes a commit with the author and date of its mail.
    """
    read = [_read(store, patches, path) for path in series]
    applied = _apply(store, release.name, base, read)
    applied = [_blamed(store, release.name, base, applied, one) for one in applied]
    head = next((one.commit for one in reversed(applied) if one.commit), base)
    return Result(release, base, tuple(applied), store.tree_of(head))


def patched_tree(store: Store, base: str, applied: Iterable[Applied]) -> PatchedTree:
    """The tree of the patches that applied, for `guilt`."""
    good = [(one, one.patch) for one in applied if one.commit]
    return PatchedTree(
        store.git,
        base,
        tuple(Earlier(one.path, one.commit, patch.files) for one, patch in good if patch),
    )


def _blamed(store: Store, name: str, base: str, tried: Sequence[Applied], one: Applied) -> Applied:
    """The same, with the earlier patches of `tried` that touched where it does not match."""
    if one.status is not ApplyStatus.CONFLICT or not one.failures or one.patch is None:
        return one
    tree, files = patched_tree(store, base, tried), one.patch.files
    matches = tuple(
        match if match.is_good else replace(match, earlier=guilt.of_match(tree, files, match))
        for match in one.matches
    )
    blamed = replace(one, matches=matches)
    return replace(blamed, error=_conflict(name, one.path, blamed.failures))


def apply_patch(store: Store, name: str, head: str, patches: Path, path: PatchPath) -> Applied:
    """Apply one patch to the commit `head`, with zero fuzz; release `name` is for errors."""
    return _apply(store, name, head, [_read(store, patches, path)])[0]


def _read(store: Store, patches: Path, path: PatchPath) -> Applied:
    """A patch that is not tried yet, or the reason why it can't be."""
    try:
        return Applied(
            path, ApplyStatus.NOT_TRIED, read_patch(store.git, patches, path, store.known)
        )
    except OverlayError as error:
        missing = not path.under(patches).exists()
        status = ApplyStatus.MISSING if missing else ApplyStatus.BROKEN
        return Applied(path, status, error=error)


def _apply(store: Store, name: str, head: str, read: Sequence[Applied]) -> list[Applied]:
    """Apply patches that were read, in order, and commit those that apply.

    Their hunks are applied here, which tells where each of them matches, and git applies the same
    patches: the two must agree.
    """
    touched = sorted({file.path for one in read if one.patch for file in one.patch.files})
    texts: Texts = dict.fromkeys(touched)
    modes: dict[str, str] = {}
    for path, is_executable, data in store.files(head, touched) if touched else ():
        texts[path], modes[path] = to_text(data), "100755" if is_executable else "100644"
    tried: list[Applied] = []
    changes: list[Change] = []
    for one in read:
        if tried and not tried[-1].status.is_good:
            tried.append(Applied(one.path, ApplyStatus.NOT_TRIED))
            continue
        result, after = _try(name, one, texts)
        tried.append(result)
        if result.patch and result.status.is_good:
            texts.update(after)
            modes.update((file.path, file.mode) for file in result.patch.files if file.is_new)
            changes.append(Change(result.patch, after, {path: modes[path] for path in after}))
    return _committed(store, name, head, tried, changes) if changes else tried


def _try(name: str, one: Applied, texts: Texts) -> tuple[Applied, Texts]:
    """Where the hunks of a patch match in `texts`, and what they make of the files."""
    path, patch = one.path, one.patch
    if patch is None:
        return one, {}
    after: Texts = {}
    matches: list[HunkMatch] = []
    for file in patch.files:
        after[file.path], found = apply_hunks(file, texts[file.path])
        matches += found
    tried = Applied(path, ApplyStatus.CONFLICT, patch, matches=tuple(matches))
    if tried.failures and is_applied(patch.files, texts):
        return replace(tried, status=ApplyStatus.UPSTREAMED, error=_already(name, path)), {}
    if tried.failures:
        return replace(tried, error=_conflict(name, path, tried.failures)), {}
    status = ApplyStatus.OFFSET if tried.offsets else ApplyStatus.CLEAN
    return replace(tried, status=status), after


def _committed(
    store: Store, name: str, head: str, tried: Sequence[Applied], changes: Sequence[Change]
) -> list[Applied]:
    """The patches, with the commits of the first ones, whose `changes` git agrees with."""
    commits = store.commits(head, changes)
    number, why = _disagreement(store, head, changes, commits)
    done: list[Applied] = []
    for index, one in enumerate(tried):
        if index < number:
            done.append(replace(one, commit=commits[index]))
        elif index == number < len(changes):
            error = _refused(name, one.path, why)
            done.append(replace(one, status=ApplyStatus.CONFLICT, error=error))
        else:
            done.append(one if number == len(changes) else Applied(one.path, ApplyStatus.NOT_TRIED))
    return done


def _disagreement(
    store: Store, head: str, changes: Sequence[Change], commits: Sequence[str]
) -> tuple[int, str]:
    """How many of the changes git agrees with from the first on, and why not with the next.

    git can exit 0 without having done its work.
    """
    with store.index(head) as env:
        try:
            tree = _git_apply(store, [change.patch for change in changes], env)
        except GitError:
            tree = ""
    if tree == store.tree_of(commits[-1]):
        return len(changes), ""
    # One by one, for the patch to be named.
    before = store.tree_of(head)
    with store.index(head) as env:
        for number, change in enumerate(changes):
            try:
                tree = _git_apply(store, [change.patch], env)
            except GitError as failure:
                return number, failure.said or "it gave no reason"
            if why := _difference(store.blobs_changed(before, tree), change.after):
                return number, why
            before = tree
    return len(changes), ""


def _git_apply(store: Store, patches: Sequence[Patch], env: Mapping[str, str]) -> str:
    """Let git apply patches to an index. Returns the tree id.

    Raises:
        GitError: it refuses one of them.
        OverlayError: the machine is at fault.
    """
    diffs = "".join(patch.mail.diff for patch in patches)
    try:
        store.git.run(
            "apply", "--cached", "--whitespace=nowarn", "-", stdin=diffs.encode(), env=env
        )
    except GitError as failure:
        if failure.is_machine:
            raise store.fault(failure) from failure
        raise
    return store.run("write-tree", env=env).decode().strip()


def _difference(changed: Mapping[str, str], after: Texts) -> str:
    """In what a commit is not what the hunks make, by blob ids; empty if in nothing."""
    if changed.keys() != after.keys():
        return f"changed {sorted(changed)}, the patch lists {sorted(after)}"
    for path, text in after.items():
        if changed[path] != (NO_BLOB if text is None else blob_id(to_bytes(text) or b"")):
            return f"{path} is not what its hunks say"
    return ""


def _already(name: str, path: PatchPath) -> OverlayError:
    return OverlayError(
        f"{name}: {path} is upstream already",
        "it does not apply, and its reverse does",
        f"Take it out of series/{name}",
        Exit.PATCH,
    )


def _refused(name: str, path: PatchPath, why: str) -> OverlayError:
    return OverlayError(
        f"{name}: {path} does not apply",
        f"git apply: {why}",
        f"Port it: see the tree with 'vllm-overlay apply {name}'",
        Exit.PATCH,
    )


def _conflict(name: str, path: PatchPath, bad: Sequence[HunkMatch]) -> OverlayError:
    return OverlayError(
        f"{name}: {path} does not apply",
        "; ".join(describe_mismatch(m) for m in bad),
        f"See the tree that it must fit with 'vllm-overlay apply {name} --until {path.topic}'; "
        f"'vllm-overlay refresh --fork-at {path.topic}={name}' gives it a text of its own",
        Exit.PATCH,
    )


def check_out(
    store: Store,
    result: Result,
    folder: Path,
    tag: str,
    complete: Callable[[Git], None] = lambda _: None,
) -> None:
    """Make `folder` a git work tree of a result: the sdist tagged, a commit a patch.

    The folder appears under its name when it is complete, and not before; `complete` is told
    its repository when the rest is there.

    Raises:
        OverlayError: it exists and is not empty, or can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OverlayError(
            f"{folder} is in the way",
            "it exists and is not empty",
            "Name another folder, or delete it if nothing in it is of use",
            Exit.ENVIRONMENT,
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        complete(_populate(store, result, temporary, tag))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except (OSError, GitError) as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _populate(store: Store, result: Result, folder: Path, tag: str) -> Git:
    git = Git(folder / ".git", folder)
    branch = f"overlay/{result.release.name}"
    git.run("init", "--quiet", f"--initial-branch={branch}", str(folder))
    # The tree is upstream's to the byte, whatever the user's own settings are.
    for key, value in (("core.autocrlf", "false"), ("core.safecrlf", "false")):
        git.run("config", key, value)
    # Objects travel as a pack: git fetch would check who owns the cache.
    store.send(git, result.head)
    git.run("update-ref", f"refs/heads/{branch}", result.head)
    git.run("tag", tag, result.base)
    git.run("reset", "--quiet", "--hard")
    return git


def _unwritable(folder: Path, error: Exception) -> OverlayError:
    return OverlayError(
        f"cannot write {folder}",
        said(error),
        "Name a folder that can be written, on a disk with 200 MB free",
        Exit.ENVIRONMENT,
    )
