"""A git repository of one run's own that borrows the objects of one that can't be written.

A cache may be another user's, or on a disk that is mounted read-only. What git writes (a series'
commits, an sdist that nobody has imported yet) goes to a temporary folder then, and with it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from overlay.base.git import Git, GitError

#: Whose commits are looked up by name.
BASES = "refs/overlay/base"


def is_writable(cache: Path, store: Path) -> bool:
    """Whether the repository `store` of `cache` can be written, or made if there is none."""
    places = (cache, store, store / "objects", store / "refs")
    return all(os.access(place, os.W_OK | os.X_OK) for place in places if place.exists())


def borrow(store: Path) -> Git:
    """A bare repository with the objects and base commits of `store`, as far as it has any.

    Raises:
        OSError: there is no room for it.
        GitError: likewise.
    """
    folder = tempfile.mkdtemp(prefix="vllm-overlay-")
    made = Git(Path(folder, "git"))
    weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
    made.run("init", "--quiet", "--bare", str(made.git_dir))
    objects = store.absolute() / "objects"
    if objects.is_dir():
        (made.git_dir / "objects/info/alternates").write_bytes(os.fsencode(f"{objects}\n"))
        with suppress(GitError):  # it is damaged: sdists are imported anew
            form = "--format=create %(refname) %(objectname)"
            made.run("update-ref", "--stdin", stdin=Git(store).run("for-each-ref", form, BASES))
    return made
