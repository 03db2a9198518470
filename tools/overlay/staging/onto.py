"""The repository that a branch is staged in: a clone of upstream, or one of the release's own tree.

The user's checkout is never touched: objects and one branch are added, no work tree and no index
is read or written, so it does not matter whether the clone is dirty.
"""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git, GitError
from overlay.patches.tree import Store

_URL = re.compile(r"[a-z][a-z0-9+]*://[^/]*/.+|([\w.-]+@)?[\w.-]+:(?!//).+")
_CLONE = "git clone https://github.com/vllm-project/vllm"


@dataclass(frozen=True)
class Destination:
    """What --onto names."""

    place: str
    """A path or a URL."""
    ref: str | None
    """A branch, tag or commit; None: what is checked out there."""

    @property
    def is_url(self) -> bool:
        """Whether it has to be fetched."""
        return not Path(self.place).exists() and bool(_URL.fullmatch(self.place))


def parse(text: str) -> Destination:
    """The place and the ref that PATH_OR_URL[@REF] spells.

    >>> parse("git@example.org:vllm/vllm.git@releases/v0.9.0")
    Destination(place='git@example.org:vllm/vllm.git', ref='releases/v0.9.0')
    >>> parse("ssh://git@example.org/vllm").ref is None
    True
    """
    place, at, ref = text.rpartition("@")
    if Path(text).exists() or not at or not place:
        return Destination(text, None)
    if not Path(place).exists() and not _URL.fullmatch(place) and _URL.fullmatch(text):
        return Destination(text, None)  # the @ stands before a host
    return Destination(place, ref or None)


@dataclass(frozen=True)
class Repository:
    """A git repository on this disk."""

    name: str
    """As the user named it."""
    git: Git
    """On what all its work trees share."""
    head: Path
    """The git folder whose HEAD counts: another one in a linked work tree."""

    @classmethod
    def open(cls, folder: Path) -> Repository:
        """The repository whose top folder, or bare folder, is `folder`.

        Raises:
            OverlayError: there is none, or it lacks file contents (a partial clone).
        """
        own = _git_folder(folder)
        common = own / "commondir"
        shared = (own / common.read_text("utf-8").strip()).resolve() if common.is_file() else own
        repository = cls(str(folder), Git(shared), own)
        if repository.is_partial:
            raise OverlayError(
                f"{folder} is a partial clone", "it lacks the contents of files",
                f"Make a whole one: {_CLONE}", Exit.USAGE,
            )  # fmt: skip
        return repository

    @property
    def is_partial(self) -> bool:
        """Whether contents are fetched on demand only."""
        try:
            return bool(self.git.text("config", "--get-regexp", r"^remote\..*\.promisor$"))
        except GitError:
            return False

    @property
    def objects(self) -> Path:
        """Its object folder."""
        return self.git.git_dir / "objects"

    def resolve(self, ref: str | None) -> str:
        """The commit that `ref` names, here or at origin; None: what is checked out.

        Raises:
            OverlayError: none; near names are suggested.
        """
        names = ("HEAD",) if ref is None else (ref, f"refs/remotes/origin/{ref}")
        for name in names:
            found = self.commit(name)
            if found:
                return found
        if ref is None:
            raise OverlayError(
                f"nothing is checked out in {self.name}", "it has no commit at HEAD",
                f"Name a branch: --onto {self.name}@main", Exit.USAGE,
            )  # fmt: skip
        known = self.git.text("for-each-ref", "--format=%(refname:short)").split()
        near = difflib.get_close_matches(ref, known, n=3, cutoff=0.5)
        raise OverlayError(
            f"no {ref!r} in {self.name}",
            "it is no branch, tag or commit there",
            f"Did you mean {' or '.join(near)}" if near else "Fetch it first",
            Exit.USAGE,
        )

    def commit(self, name: str) -> str | None:
        """The commit that exactly `name` names, if there is one."""
        try:
            return self.git.text(
                "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}",
                env={"GIT_DIR": str(self.head), "GIT_COMMON_DIR": str(self.git.git_dir)},
            )  # fmt: skip
        except GitError:
            return None

    def current(self) -> str | None:
        """The branch that is checked out, if any."""
        try:
            return self.git.text(
                "symbolic-ref", "--quiet", "--short", "HEAD",
                env={"GIT_DIR": str(self.head), "GIT_COMMON_DIR": str(self.git.git_dir)},
            )  # fmt: skip
        except GitError:
            return None

    def branch(self, name: str) -> str | None:
        """The commit at the head of branch `name`, if there is one."""
        return self.commit(f"refs/heads/{name}")

    def checked_out(self, branch: str) -> str | None:
        """The work tree in which `branch` is checked out, if there is one."""
        if self.git.text("config", "--default", "false", "--get", "core.bare") == "true":
            return None  # and it lists itself as a work tree all the same
        place = ""
        for line in self.git.text("worktree", "list", "--porcelain").splitlines():
            key, _, value = line.partition(" ")
            if key == "worktree":
                place = value
            elif (key, value) == ("branch", f"refs/heads/{branch}"):
                return place
        return None

    def receive(self, scratch: Store, head: str, base: str, branch: str) -> None:
        """Take the commits `base`..`head` from `scratch`, and put `branch` there.

        Raises:
            OverlayError: it can't be written, or the branch moved meanwhile.
        """
        old = self.branch(branch) or "0" * 40
        try:
            scratch.git.send(self.git, head, base)
            self.git.run(
                "update-ref", "-m", "vllm-overlay stage", f"refs/heads/{branch}", head, old
            )
        except GitError as error:
            raise OverlayError(
                f"cannot make branch {branch} in {self.name}", _said(error),
                "Make the repository writable, or delete the branch that is in the way",
                Exit.ENVIRONMENT,
            ) from error  # fmt: skip

    def push(self, remote: str, branch: str) -> None:
        """A plain push of `branch`; never forced.

        Raises:
            OverlayError: no such remote, or it refuses.
        """
        git = Git(self.git.git_dir, user_config=True)
        ref = f"refs/heads/{branch}"
        try:
            git.run("push", "--quiet", "--no-force", "--end-of-options", remote, f"{ref}:{ref}")
        except GitError as error:
            rejected = "(non-fast-forward)" in error.stderr or "(fetch first)" in error.stderr
            raise OverlayError(
                f"pushing {branch} to {remote} failed",
                "the remote has other commits on that branch" if rejected else _said(error),
                f"Look at them, and delete the branch there or push by hand: git -C {self.name} "
                f"push {remote} {branch}" if rejected
                else f"Name a remote of {self.name} or a URL that you may write to",
                Exit.ENVIRONMENT,
            ) from error  # fmt: skip


def _said(error: GitError) -> str:
    """What git said, in a line."""
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    refused = [line for line in lines if line.startswith("!")]  # what a remote says of a ref
    told = refused or [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
    text = told[0] if told else f"git exited {error.status}"
    return re.sub(r"^(fatal|error): ", "", text).rstrip(".")


def _git_folder(folder: Path) -> Path:
    """Where the HEAD of the repository in `folder` lies."""
    dot = folder / ".git"
    if dot.is_file():
        named = dot.read_text("utf-8", "replace").removeprefix("gitdir:").strip()
        candidate = (folder / named).resolve()
    else:
        candidate = dot if dot.is_dir() else folder
    if (candidate / "HEAD").is_file():
        return candidate.absolute()
    raise OverlayError(
        f"{folder} is no git repository",
        "it is not there" if not folder.exists() else "there is no .git in it",
        f"Name the top folder of a clone of upstream: {_CLONE}",
        Exit.USAGE,
    )


def folder_name(url: str) -> str:
    """A folder's name for the clone of `url`.

    >>> folder_name("https://example.org/vllm/vllm.git")
    'example.org-vllm-vllm.git'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", url.partition("://")[2] or url).strip("-.")


def fetch(url: str, folder: Path) -> Repository:
    """A clone of `url` in `folder`, without a work tree; brought up to date if it is there.

    Raises:
        OverlayError: it can't be fetched.
    """
    git = Git(folder, user_config=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        git.run("init", "--quiet", "--bare", str(folder))
        # Bare, but with its branches where a clone has them: refs/heads is for ours.
        git.run(
            "fetch", "--quiet", "--tags", "--end-of-options", url,
            "+refs/heads/*:refs/remotes/origin/*", "+HEAD:refs/remotes/origin/HEAD",
        )  # fmt: skip
    except (OSError, GitError) as error:
        why = _said(error) if isinstance(error, GitError) else str(error)
        raise OverlayError(
            f"cannot fetch {url}", why,
            "Check the URL and your access to it with 'git ls-remote', or name a clone",
            Exit.UNAVAILABLE,
        ) from error  # fmt: skip
    return Repository(str(folder), Git(folder), folder)


def from_release(store: Store, base: str, tag: str, folder: Path) -> Repository:
    """A repository in `folder` that holds the release's own tree, tagged.

    Raises:
        OverlayError: it can't be written, or is there and is something else.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        git = Git(made)
        try:
            git.run("init", "--quiet", "--bare", str(made))
            store.send(git, base)
            git.run("update-ref", f"refs/tags/{tag}", base)
            made.chmod(0o755)
            made.rename(folder)
        except (OSError, GitError) as error:
            raise OverlayError(
                f"cannot write {folder}", str(error), "Name another folder with --work",
                Exit.ENVIRONMENT,
            ) from error  # fmt: skip
        finally:
            shutil.rmtree(made, ignore_errors=True)
    repository = Repository.open(folder)
    if repository.commit(f"refs/tags/{tag}") != base:
        raise OverlayError(
            f"{folder} is in the way", f"its {tag} is not the release's tree",
            "Delete it, and stage again", Exit.ENVIRONMENT,
        )  # fmt: skip
    return repository


@contextmanager
def scratch(*sources: Path) -> Iterator[Store]:
    """A throwaway store that sees the objects of the git folders `sources`.

    What is tried is written here, so that a repository gets only what is staged in it.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as name:
        folder = Path(name, "git")
        git = Git(folder)
        git.run("init", "--quiet", "--bare", str(folder))
        objects = [str((source / "objects").absolute()) for source in sources]
        (folder / "objects/info/alternates").write_text("\n".join(objects) + "\n", "utf-8")
        shallow = [s / "shallow" for s in sources if (s / "shallow").is_file()]
        if shallow:  # else git looks for the parents that the clone has not
            (folder / "shallow").write_text("".join(s.read_text("utf-8") for s in shallow), "utf-8")
        yield Store(folder, git)
