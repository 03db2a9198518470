"""Where a conflict of a port is solved: a git work tree, in the middle of a cherry-pick."""

from __future__ import annotations

import shutil
from pathlib import Path

from overlay.base.errors import Exit, OverlayError, some
from overlay.base.git import Git, GitError
from overlay.base.project import Project
from overlay.patches import edit, refresh
from overlay.patches.edit import Commit, EditTree
from overlay.patches.tree import check_out
from overlay.patches.workspace import Workspace
from overlay.porting import port_state
from overlay.porting.port import Port, Step

#: Keeps the patch of the other release from git's garbage collection.
_ORIGIN = "refs/overlay/port"
_MARKERS = (b"<<<<<<< ", b">>>>>>> ")


def place(project: Project, release: str, topic: str) -> Path:
    """The folder of a topic's conflict."""
    return port_state.folder(project, release) / topic


def exists(workspace: Workspace, port: Port, step: Step) -> bool:
    """Whether the tree of this conflict is there; it appears whole or not at all."""
    return place(workspace.project, port.state.name, step.topic).exists()


def create(workspace: Workspace, port: Port, step: Step) -> Path:
    """Make the tree: the release tagged, a commit a patch, and the conflict in the files.

    Raises:
        OverlayError: it can't be written.
    """
    store, folder = workspace.store, place(workspace.project, port.state.name, step.topic)

    def complete(git: Git) -> None:
        store.send(git, step.own.commit, port.head)
        git.run("update-ref", _ORIGIN, step.own.commit)
        settings = {"head": port.head, "release": port.state.name, "topic": step.topic}
        for key, value in settings.items():
            git.run("config", f"port.{key}", value)
        git.run("config", "merge.conflictStyle", "diff3")
        git.run("config", "core.commentChar", ";")  # a line of a message may start with #12345
        # The same merge as the one that conflicted, but with git's record of it.
        options = ("-X", "no-renames", "-X", "diff-algorithm=myers")
        try:
            git.run("cherry-pick", *options, step.own.commit, env=edit.WHO)
        except GitError as error:
            if not _unmerged(git):
                raise error
        # Git notes the conflicts in the message, as comments that not every commit strips.
        message = edit.message_of(store, step.own.commit)
        if (note := git.git_dir / "MERGE_MSG").exists():
            note.write_text(f"{message}\n", "utf-8")

    result = port.result(store)
    check_out(store, result, folder, port.state.release.tag, complete)
    return folder


def remove(workspace: Workspace, port: Port, step: Step) -> None:
    """Delete the tree of a conflict that is settled."""
    shutil.rmtree(place(workspace.project, port.state.name, step.topic), ignore_errors=True)


def read(workspace: Workspace, port: Port, step: Step) -> bytes:
    """The text of the patch as it was solved; what is staged is committed first.

    Raises:
        OverlayError: it is not solved, not staged, not one commit, or no patch of the overlay.
    """
    folder = place(workspace.project, port.state.name, step.topic)
    git = Git(folder / ".git", folder)
    _require_current(git, folder, port)
    _require_solved(git, folder, port)
    if git.text("rev-parse", "HEAD") == port.head:
        _commit(git, folder, port, step)
    commit = _only_commit(git, folder, port)
    git.send(workspace.store.git, commit, port.head)
    subject = git.text("log", "-1", "--format=%s", commit)
    opened = EditTree(folder, port.state.name, (), port.head, git)
    one = Commit(commit, subject, (step.topic,))
    text = edit.export(workspace.store, opened, one)
    refresh.require_sound(workspace.store.git, opened, one, text)
    return text


def _require_current(git: Git, folder: Path, port: Port) -> None:
    try:
        head = git.text("config", "--local", "port.head")
    except (GitError, OSError) as error:
        raise OverlayError(
            f"{folder} is no work tree of a port", "its .git does not say so",
            f"Move it away, and run 'vllm-overlay port --continue' to get the conflict of "
            f"{port.state.name} anew", Exit.PROBLEMS,
        ) from error  # fmt: skip
    if head != port.head:
        raise OverlayError(
            f"the patches before this one changed since {folder} was made",
            f"it stands on {head[:9]}, and they make {port.head[:9]} now",
            "Undo that change, or move the folder away and run 'vllm-overlay port --continue' "
            "to get the conflict anew",
            Exit.PROBLEMS,
        )


def _unmerged(git: Git) -> list[str]:
    out = git.run("diff", "--name-only", "--diff-filter=U", "-z").decode("utf-8", "replace")
    return [path for path in out.split("\0") if path]


def _require_solved(git: Git, folder: Path, port: Port) -> None:
    if paths := _unmerged(git):
        raise _unsolved(folder, f"git status has {some(paths)} as unmerged")
    edit.require_finished(git, folder, also_there=("CHERRY_PICK_HEAD",))
    if loose := [entry[3:] for entry in edit.status(git) if entry[1] != " "]:
        raise OverlayError(
            f"{folder} has changes that are not staged",
            f"git status lists {some(loose)}",
            "Stage what belongs to the patch (git add), and stash or delete the rest",
            Exit.PROBLEMS,
        )
    staged = git.run("diff", "--cached", "--name-only", "--no-renames", "-z", port.head)
    names = [name for name in staged.decode("utf-8", "surrogateescape").split("\0") if name]
    if marked := [name for name in names if _has_markers(git, name)]:
        raise _unsolved(folder, f"there are conflict markers in {some(marked)}")


def _has_markers(git: Git, name: str) -> bool:
    try:
        data = git.run("cat-file", "blob", f":{name}")
    except GitError:  # deleted
        return False
    return any(line.startswith(_MARKERS) for line in data.split(b"\n"))


def _unsolved(folder: Path, why: str) -> OverlayError:
    return OverlayError(
        f"the conflict in {folder} is not solved", why,
        "Solve it, stage it (git add, or git rm), and run 'vllm-overlay port --continue'",
        Exit.PROBLEMS,
    )  # fmt: skip


def _commit(git: Git, folder: Path, port: Port, step: Step) -> None:
    if not git.run("diff", "--cached", "--name-only", "HEAD"):
        raise OverlayError(
            f"nothing of {step.topic} is left in {folder}",
            f"it is as {port.state.name} with the patches before it",
            "Leave the topic out with 'vllm-overlay port --skip'; for the conflict anew, delete "
            "that folder and run 'vllm-overlay port --continue'",
            Exit.PROBLEMS,
        )
    git.run("commit", "--quiet", "--no-verify", "-C", step.own.commit, env=edit.WHO)


def _only_commit(git: Git, folder: Path, port: Port) -> str:
    """The commit that was made, with nothing staged on top of it."""
    span = f"{port.head}..HEAD"
    commits = git.text("rev-list", span).split()
    parents = git.text("log", "-1", "--format=%P", "HEAD").split()
    if len(commits) != 1 or parents != [port.head]:
        raise OverlayError(
            f"{folder} has no single commit on top of {port.head[:9]}",
            f"git log {port.head[:9]}..HEAD lists {len(commits)}, and a patch is one",
            f"Make it one: git reset --soft {port.head[:9]}, and stage what belongs to it",
            Exit.PROBLEMS,
        )
    if git.run("diff", "--cached", "--name-only", "HEAD"):
        raise OverlayError(
            f"{folder} has staged changes beside its commit", "the patch is one commit",
            "Commit them with git commit --amend", Exit.PROBLEMS,
        )  # fmt: skip
    return commits[0]
