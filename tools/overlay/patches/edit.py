"""Edit trees: a release and its series as git commits, to be changed with any git tool.

What `refresh` has to know is in the tree's own .git: the release and the series in its config,
the commits as they were in a ref, and which patch a commit is in a git note. Git copies notes
when a commit is amended or rebased; where a tool does not, the subject tells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overlay.base.errors import Exit, OverlayError, some
from overlay.base.git import Git, GitError
from overlay.base.project import Project
from overlay.patches.patch import export_patch, parse_mail
from overlay.patches.series import PatchPath, is_topic, parse_path
from overlay.patches.tree import Result, Store, check_out
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

FOLDER = Path("work", "edit")
#: The commits of the series as the tree was opened with them.
OPENED = "refs/overlay/series"
#: Where a refresh leaves the commits that it replaced by canonical ones.
REPLACED = "refs/overlay/before-refresh"
_NOTES = "refs/notes/overlay"
#: Whose commits those are that the tool makes.
WHO = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "vllm-overlay"), ("EMAIL", "vllm-overlay@localhost"))
}
#: Files in .git that tell of an unfinished operation.
_UNFINISHED = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


@dataclass(frozen=True)
class Commit:
    """One commit of an edit tree."""

    id: str
    subject: str
    topics: tuple[str, ...]
    """Those that its note names: several after a squash."""

    def __str__(self) -> str:
        """For people: short id and subject."""
        return f"commit {self.id[:9]} ({self.subject!r})"


@dataclass(frozen=True)
class EditTree:
    """An edit tree, as it was opened."""

    folder: Path
    release: str
    series: tuple[PatchPath, ...]
    """The series when the tree was opened."""
    opened: str
    """The last of its commits then."""
    git: Git = field(repr=False)

    @property
    def head(self) -> str:
        """The commit checked out."""
        return self.git.text("rev-parse", "HEAD")

    @property
    def changes(self) -> tuple[str, ...]:
        """Paths with uncommitted changes, new files included."""
        return tuple(entry[3:] for entry in status(self.git))


def status(git: Git) -> list[str]:
    """The entries of git status for what is uncommitted: two letters, a blank and the path."""
    out = git.run("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    return [entry for entry in out.decode("utf-8", "replace").split("\0") if entry]


def default_folder(project: Project, release: Release) -> Path:
    """Where a release's edit tree is, if it is not told: work/edit/RELEASE of the checkout."""
    return project.root / FOLDER / release.name


def is_edit_tree(folder: Path) -> bool:
    """Whether `edit` made it."""
    try:
        return bool(Git(folder / ".git", folder).text("config", "--local", "overlay.release"))
    except (GitError, OSError):
        return False


def create(workspace: Workspace, release: Release, folder: Path) -> Result:
    """Open an edit tree of `release` in `folder`; one without changes is brought up to date.

    Raises:
        OverlayError: the series does not apply, or there is something of the user's in the folder.
    """
    result = workspace.apply(release).require()
    if is_edit_tree(folder):
        _update(workspace.store, find(folder, release), result)
        return result

    def complete(git: Git) -> None:
        git.run("config", "overlay.release", release.name)
        # A note follows its commit through amend and rebase, and shows in git log.
        for key, value in (
            ("notes.rewriteRef", _NOTES), ("notes.displayRef", _NOTES),
            ("notes.rewriteMode", "concatenate"),
            ("notes.rewrite.amend", "true"), ("notes.rewrite.rebase", "true"),
        ):  # fmt: skip
            git.run("config", key, value)
        _record(git, result)

    check_out(workspace.store, result, folder, release.tag, complete)
    return result


def _update(store: Store, tree: EditTree, result: Result) -> None:
    if tree.changes or tree.head != tree.opened:
        raise OverlayError(
            f"{tree.folder} is in the way",
            "it is an edit tree with changes of its own",
            f"Write them back with 'vllm-overlay refresh {tree.release}', or name another folder",
            Exit.ENVIRONMENT,
        )
    require_finished(tree.git, tree.folder)
    if result.head != tree.head:
        store.send(tree.git, result.head, result.base)
        tree.git.run("reset", "--quiet", "--hard", result.head)
        _record(tree.git, result)


def find(folder: Path, release: Release) -> EditTree:
    """The edit tree of `release` in `folder`.

    Raises:
        OverlayError: there is none, or it is of another release.
    """
    git = Git(folder / ".git", folder)
    try:
        lines = git.text("config", "--local", "--get-regexp", r"^overlay\.").split("\n")
        opened = git.text("rev-parse", "--verify", f"{OPENED}^{{commit}}")
    except (GitError, OSError) as error:
        raise OverlayError(
            f"{folder} is no edit tree",
            "its .git does not say which release it is of",
            f"Make one with 'vllm-overlay edit {release.name}', or name its folder",
            Exit.USAGE,
        ) from error
    entries = [line.partition(" ")[::2] for line in lines]
    name = dict(entries).get("overlay.release", "")
    if name != release.name:
        raise OverlayError(
            f"{folder} is no edit tree of {release.name}",
            f"it is one of {name}",
            f"Name {name}, or another folder",
            Exit.USAGE,
        )
    listed = (parse_path(value) for key, value in entries if key == "overlay.patches.series")
    series = tuple(path for path in listed if path)
    return EditTree(folder, name, series, opened, git)


def read(workspace: Workspace, tree: EditTree, now: Result) -> dict[str, Commit]:
    """The commits of an edit tree by id, oldest first, brought into the store.

    `now` is the release with its series as it is in patches/.

    Raises:
        OverlayError: something is uncommitted, unfinished, merged or empty; the tree is not
            based on the release; or the series changed since the tree was opened.
    """
    require_finished(tree.git, tree.folder)
    if changes := tree.changes:
        raise OverlayError(
            f"{tree.folder} has uncommitted changes",
            f"git status lists {some(changes)}",
            "Commit them (git commit --amend, or --fixup and git rebase -i --autosquash), "
            "or stash them",
            Exit.PROBLEMS,
        )
    try:
        tree.git.run("merge-base", "--is-ancestor", now.base, "HEAD")
    except GitError as error:
        raise OverlayError(
            f"{tree.folder} is not based on {tree.release}",
            f"{now.base[:9]}, the commit of its sdist, is not among the ancestors of HEAD",
            f"Rebase your commits onto {now.release.tag} (git rebase --onto)",
            Exit.PROBLEMS,
        ) from error
    span = f"{now.base}..HEAD"
    if merges := tree.git.text("rev-list", "--min-parents=2", span).split():
        raise OverlayError(
            f"{tree.folder} has a merge commit, {merges[0][:9]}",
            "a series is a line of commits, one a patch",
            f"Make it one with git rebase {now.release.tag}",
            Exit.PROBLEMS,
        )
    tree.git.send(workspace.store.git, "HEAD", now.base)
    commits = _commits(tree, span)
    _not_empty(workspace.store, tree, commits)
    _not_stale(workspace, tree, now, list(commits))
    return commits


def require_finished(git: Git, folder: Path, also_there: Collection[str] = ()) -> None:
    """Nothing, if the work tree `folder` is in the middle of no operation of git's.

    `also_there` are files in .git of operations that may be under way.

    Raises:
        OverlayError: it is in the middle of one.
    """
    found = [
        what
        for name, what in _UNFINISHED.items()
        if name not in also_there and (git.git_dir / name).exists()
    ]
    if found:
        raise OverlayError(
            f"{folder} is in the middle of a {found[0]}",
            "its commits are not what they will be",
            f"End it with git {found[0]} --continue, or --abort",
            Exit.PROBLEMS,
        )


def _commits(tree: EditTree, span: str) -> dict[str, Commit]:
    form = "--format=%H%x00%s%x00%N%x01"
    out = tree.git.text("log", "--reverse", "--topo-order", f"--notes={_NOTES}", form, span)
    commits = {}
    for entry in out.split("\x01")[:-1]:
        id_, subject, note = entry.lstrip("\n").split("\0")
        # A note of a person may name the topic alone.
        names = [(path.topic if (path := parse_path(line)) else line) for line in note.split("\n")]
        topics = tuple(dict.fromkeys(name for name in names if is_topic(name)))
        commits[id_] = Commit(id_, subject, topics)
    return commits


def _not_empty(store: Store, tree: EditTree, commits: Mapping[str, Commit]) -> None:
    for commit in commits.values():
        if not store.changed(f"{commit.id}^", commit.id):
            raise OverlayError(
                f"{tree.folder}: {commit} changes nothing",
                "a patch without a diff is none",
                "Drop it with git rebase -i",
                Exit.PROBLEMS,
            )


def _not_stale(workspace: Workspace, tree: EditTree, now: Result, ids: Sequence[str]) -> None:
    """The series may have changed since only if the tree has got the very same changes."""
    store = workspace.store
    applied = [one.commit for one in now.applied]
    if now.head == tree.opened:
        return
    if [store.tree_of(one) for one in ids] == [store.tree_of(one) for one in applied]:
        return
    raise OverlayError(
        f"the series of {tree.release} changed since {tree.folder} was opened",
        "writing it back would undo that",
        f"Open another one with 'vllm-overlay edit {tree.release} DIR', and take your commits "
        f"over: git -C DIR fetch {tree.folder} HEAD, then git cherry-pick",
        Exit.PROBLEMS,
    )


def assign(
    tree: EditTree,
    commits: Mapping[str, Commit],
    subjects: Mapping[str, str],
    named: Mapping[str | None, str],
) -> dict[str, Commit]:
    """Which commit is which topic's patch, in the commits' order.

    `subjects` has the topics of the series and the subjects that their patches had. `named` is
    what the user says: topics by commit (a beginning of its id, or its subject), and by None
    the topic of the one commit that is of none so far.

    Raises:
        OverlayError: a commit of no topic or of several, or a topic of several commits.
    """
    found = {id_: name for id_, one in commits.items() if (name := _noted(one, subjects))}
    for id_, one in commits.items():  # tools other than git's own lose notes
        same = [t for t, s in subjects.items() if s == one.subject and t not in found.values()]
        if id_ not in found and not one.topics and len(same) == 1:
            found[id_] = same[0]
    for key, topic in named.items():
        found[_named(tree, commits, found, key, topic)] = topic
    for one in commits.values():
        if one.id not in found:
            raise _of_no_topic(tree, one)
    by_topic: dict[str, Commit] = {}
    for id_, one in commits.items():
        if other := by_topic.get(found[id_]):
            raise OverlayError(
                f"{tree.folder}: {other} and {one} are both of topic {found[id_]}",
                "a topic has one patch in a series",
                f"Squash them, or make the second a topic of its own: --topic {id_[:9]}=NAME",
                Exit.PROBLEMS,
            )
        by_topic[found[id_]] = one
    return by_topic


def _noted(commit: Commit, subjects: Mapping[str, str]) -> str | None:
    if len(commit.topics) == 1:
        return commit.topics[0]
    # A squash has the notes of all: it is the one whose subject it kept.
    same = [topic for topic in commit.topics if subjects.get(topic) == commit.subject]
    return same[0] if len(same) == 1 else None


def _named(
    tree: EditTree,
    commits: Mapping[str, Commit],
    found: Mapping[str, str],
    key: str | None,
    topic: str,
) -> str:
    """Id of the commit that the user means."""
    if not is_topic(topic):
        raise OverlayError(
            f"{topic!r} is no name for a topic",
            "it becomes a folder in patches/",
            "Use lower-case letters and digits, with single hyphens between words",
            Exit.USAGE,
        )
    if key is None:
        ids = [id_ for id_ in commits if id_ not in found]
        what = "commits without a topic"
    else:
        ids = [id_ for id_, one in commits.items() if id_.startswith(key) or one.subject == key]
        what = f"commits {key!r}"
    if len(ids) == 1:
        return ids[0]
    listed = ", ".join(str(commits[id_]) for id_ in ids) or f"those of {tree.folder} have one each"
    raise OverlayError(
        f"--topic {topic}: there are {len(ids) or 'no'} {what}",
        listed if ids or key is None else f"{tree.folder} has none such",
        "Say which one with --topic COMMIT=NAME",
        Exit.USAGE,
    )


def _of_no_topic(tree: EditTree, commit: Commit) -> OverlayError:
    if commit.subject.startswith(("fixup!", "squash!", "amend!")):
        return OverlayError(
            f"{tree.folder}: {commit} is not squashed yet",
            "it belongs to the patch of another commit",
            "Run git rebase -i --autosquash",
            Exit.PROBLEMS,
        )
    why = "neither a note nor its subject says so"
    if commit.topics:
        why = f"it was squashed from {' and '.join(commit.topics)}"
    return OverlayError(
        f"{tree.folder}: which topic is {commit} of?",
        why,
        f"Pass --topic NAME (--topic {commit.id[:9]}=NAME if there are more), or squash it into "
        "the commit that it belongs to",
        Exit.USAGE,
    )


def settle(store: Store, tree: EditTree, result: Result) -> None:
    """Put a tree that was written back on the canonical commits; its files are the same.

    What was there stays as refs/overlay/before-refresh.
    """
    head = tree.head
    if head == result.head == tree.opened:
        return
    if head != result.head and store.tree_of(result.head) == tree.git.text(
        "rev-parse", "HEAD^{tree}"
    ):
        store.send(tree.git, result.head, result.base)
        tree.git.run("update-ref", REPLACED, head)
        reason = "vllm-overlay refresh: canonical commits"
        tree.git.run("update-ref", "-m", reason, "HEAD", result.head, head, env=WHO)
    _record(tree.git, result)


def _record(git: Git, result: Result) -> None:
    """Write down what the tree was opened with."""
    git.run("update-ref", OPENED, result.head)
    try:
        git.run("config", "--unset-all", "overlay.patches.series")
    except GitError as error:
        if error.stderr.strip():  # it says nothing where there is none
            raise
    for one in result.applied:
        git.run("config", "--add", "overlay.patches.series", str(one.path))
        git.run(
            "notes", f"--ref={_NOTES}", "add", "--force", "-m", str(one.path), one.commit, env=WHO
        )


def subjects(tree: EditTree, base: str) -> dict[str, str]:
    """The subjects that the patches of the series had when the tree was opened, by topic."""
    out = tree.git.text("log", "--reverse", "--format=%s", f"{base}..{tree.opened}")
    return dict(zip((path.topic for path in tree.series), out.split("\n"), strict=False))


def message_of(store: Store, commit: str) -> str:
    """A commit's message."""
    return store.git.text("log", "-1", "--format=%B", commit)


def export(store: Store, tree: EditTree, commit: Commit) -> bytes:
    """The commit as a patch's text.

    Raises:
        OverlayError: its message would not survive as a mail, which ends at the first line that
            looks like a diff's.
    """
    text = export_patch(store.git, commit.id)
    mail = parse_mail(store.git, text, str(commit))
    if mail.message.split() != message_of(store, commit.id).split():
        raise OverlayError(
            f"{tree.folder}: the message of {commit} cannot be kept in a patch",
            "a line of it looks like the start of a diff ('---', 'diff -', 'Index: ') or of a mail",
            "Indent that line with git commit --amend",
            Exit.PROBLEMS,
        )
    return text
