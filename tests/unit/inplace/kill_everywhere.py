"""Kill an install in place with SIGKILL before each of its writes in turn; run by test_inplace.

    python -m unit.inplace.kill_everywhere ROOT SITE WORK install|revert|repair

SITE is copied, a child process works on the copy and is killed before its first, second, … change
of the file system. Then what doctor says is done: the command that it names, or, where nothing is
amiss, the same again. Prints one JSON line a kill: what the folder was after the kill and after
that, and what doctor said then. No threads are alive where it forks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from faults.tool import is_write
from overlay.answers import doctor
from overlay.answers.explain import Settings
from overlay.answers.probe import Python
from overlay.base.errors import OverlayError
from overlay.base.journal import IN_SITE
from overlay.base.project import Project
from overlay.inplace import inplace, site_files
from overlay.inplace.repair import repair
from overlay.patches.workspace import Workspace


def digest(site: Path) -> str:
    """Of every file's path, mode and bytes, but for bytecode and what a run has prepared."""
    found = hashlib.sha256()
    for path in sorted(site.rglob("*")):
        name = path.relative_to(site)
        if path.is_file() and "__pycache__" not in name.parts and name.parts[0] != IN_SITE:
            found.update(f"{name} {path.stat().st_mode:o}\n".encode() + path.read_bytes())
    return found.hexdigest()


WHAT = {"install": inplace.install, "revert": inplace.revert, "repair": repair}


def opened(root: Path) -> Workspace:
    return Workspace.open(Project(root), root / "no-cache", offline=True)


def work(root: Path, site: Path, what: str) -> None:
    WHAT[what](opened(root), Python("python", (str(site),)))


def to_change(root: Path, site: Path) -> tuple[str, ...]:
    """What doctor says to change, on a GPU on which upstream's is right."""
    python = Python("/a python", (str(site),), is_named=True)
    return doctor.examine(
        opened(root), python, {}, ("A10", "8.6"), Settings("auto", "auto")
    ).to_change


def named(said: tuple[str, ...]) -> str | None:
    """What the command does that doctor names; None if there is nothing to change."""
    if not said:
        return None
    (change,) = said
    command = shlex.split(change[change.index("vllm-overlay install") :])
    assert command[:4] == ["vllm-overlay", "install", "--python", "/a python"], change
    assert command[4:] in ([], ["--revert"], ["--repair"]), change
    return command[4].removeprefix("--") if command[4:] else "install"


def killed_before(number: int, root: Path, site: Path, what: str) -> bool:
    """Do it in a child that is killed before change `number`; False if it came to its end."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if not is_write(event, arguments) or not str(arguments[0]).startswith(str(site)):
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work(root, site, what)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the child failed")
    return os.WIFSIGNALED(status)


def main() -> None:
    root, original, folder, what = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        sys.argv[4],
    )
    number, killed = 0, True
    while killed:
        number += 1
        site = folder / str(number)
        shutil.copytree(original, site)
        killed = killed_before(number, root, site, what)
        after_kill, error = digest(site), ""
        begun = site_files.journal(site).is_planned()
        said = to_change(root, site)
        try:
            work(root, site, named(said) or what)
        except OverlayError as refused:
            error = str(refused)
        left = (site / IN_SITE).exists()
        print(json.dumps({"killed": killed, "begun": begun, "after_kill": after_kill, "said": said,
                          "after": digest(site), "error": error, "left": left,
                          "then": to_change(root, site)}))  # fmt: skip
        shutil.rmtree(site)


if __name__ == "__main__":
    main()
