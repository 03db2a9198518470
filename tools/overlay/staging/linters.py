"""Upstream's own linters, on the files that a branch changes.

Which ones, their versions, arguments and file filters are read from `.pre-commit-config.yaml` of
the tree itself, and their settings are that tree's (pyproject.toml and the like). pre-commit is
not used, since it clones every linter from GitHub: here uv takes them from the package index.

What was there before is not ours: if a linter complains, it is run on the base as well, and only
what is new counts.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from overlay.base.errors import Exit, OverlayError
from overlay.base.git import Git
from overlay.patches.hunks import split_lines
from overlay.patches.tree import Store
from overlay.releases.uv import find_uv

CONFIG = ".pre-commit-config.yaml"
#: Seconds that one linter may take.
TIMEOUT = 300.0

_REV = re.compile(r"v?(\d+(?:\.\d+)*)")
_PLACE = re.compile(r"(?:^|\s)(?P<path>[\w./-]+):(?P<line>\d+):(?:\d+:)? *(?P<text>.+)")


@dataclass(frozen=True)
class Tool:
    """A linter that upstream takes from a repository of its own."""

    package: str
    """Its name on the package index."""
    command: tuple[str, ...]
    """What its pre-commit hook runs, with findings a line each and nothing fixed."""
    defaults: tuple[str, ...] = ()
    """Arguments of the hook that a config replaces."""
    dropped: tuple[str, ...] = ()
    """Arguments of upstream's that would fix in silence, or print for machines."""
    python_only: bool = True


_RUFF = ("ruff", "check", "--force-exclude", "--no-cache", "--output-format", "concise")
#: By the id of the hook.
TOOLS = {
    "yapf": Tool("yapf", ("yapf",), ("--in-place",), ("--verbose",)),
    "isort": Tool("isort", ("isort",), ("--filter-files",)),
    "ruff": Tool("ruff", _RUFF, dropped=("--fix", "--output-format", "github")),
    "ruff-check": Tool("ruff", _RUFF, dropped=("--fix", "--output-format", "github")),
    "ruff-format": Tool("ruff", ("ruff", "format", "--force-exclude", "--no-cache")),
    "codespell": Tool("codespell", ("codespell",), python_only=False),
    "typos": Tool(
        "typos",
        ("typos", "--force-exclude", "--format", "brief"),
        dropped=("--write-changes",),
        python_only=False,
    ),
}


@dataclass(frozen=True)
class Hook:
    """One linter, as the tree's config asks for it."""

    name: str
    """Its id in the config, with the version if it has one."""
    command: tuple[str, ...]
    """Without uv and without files."""
    requirement: str | None
    """The package that has it; None: a script of the tree."""
    needs: tuple[str, ...]
    """Packages beside it."""
    files: str
    """Regex of the paths it looks at."""
    exclude: str
    """Regex of the paths it leaves out."""
    python_only: bool
    pass_files: bool

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that it looks at."""
        return [
            path
            for path in paths
            if re.search(self.files, path)
            and not re.search(self.exclude, path)
            and (path.endswith((".py", ".pyi")) or not self.python_only)
        ]


@dataclass(frozen=True)
class Finding:
    """What a linter said of a line."""

    hook: str
    path: str
    line: int
    """1-based; 0: of no line."""
    text: str

    def __str__(self) -> str:
        """Path, line and text, as linters print them."""
        place = f"{self.path}:{self.line}: " if self.line else ""
        return f"{place}{self.text} [{self.hook}]"

    @property
    def key(self) -> tuple[str, str]:
        """What it has in common with the same finding on another line."""
        return self.path, re.sub(r"\d+", "N", self.text)


@dataclass(frozen=True)
class Lint:
    """What the linters of a tree said of a branch."""

    ran: tuple[str, ...]
    left_out: tuple[str, ...]
    """Hooks for Python that were not run: mypy takes minutes."""
    findings: tuple[Finding, ...]
    """New ones only."""

    @property
    def sentence(self) -> str:
        """For a pull request."""
        if not self.ran:
            return "Upstream's linters were not run."
        said = "find nothing new" if not self.findings else f"find {len(self.findings)} problems"
        return f"Upstream's linters of this tree {said}: {', '.join(self.ran)}."


def hooks(config: str) -> tuple[tuple[Hook, ...], tuple[str, ...]]:
    """The linters of a pre-commit config that can be run here, and the ids of the others.

    Raises:
        OverlayError: it is no pre-commit config.
    """
    try:
        parsed = yaml.safe_load(config)
        everywhere = parsed.get("exclude", "^$")
        found, left_out = [], []
        for repository in parsed["repos"]:
            for raw in repository["hooks"]:
                hook = _hook(repository, raw, everywhere, config)
                if hook:
                    found.append(hook)
                elif _is_linter(raw):
                    left_out.append(str(raw["id"]))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise OverlayError(
            f"upstream's {CONFIG} can't be read", str(error).split("\n")[0],
            "Pass --without-lint, and run the linters by hand", Exit.PROBLEMS,
        ) from error  # fmt: skip
    return tuple(found), tuple(left_out)


def _is_linter(raw: Mapping[str, Any]) -> bool:
    """Whether a hook looks at Python before a commit."""
    kinds = {*raw.get("types", ()), *raw.get("types_or", ())}
    return "python" in kinds and "manual" not in raw.get("stages", ())


def _hook(
    repository: Mapping[str, Any], raw: Mapping[str, Any], everywhere: str, config: str
) -> Hook | None:
    tool = TOOLS.get(raw["id"]) if repository["repo"] != "local" else None
    common = {
        "needs": tuple(raw.get("additional_dependencies", ())),
        "files": raw.get("files", ""),
        "exclude": "|".join(f"(?:{part})" for part in (everywhere, raw.get("exclude", "^$"))),
        "pass_files": raw.get("pass_filenames", True),
    }
    if tool:
        version = _version(str(repository["rev"]), config)
        arguments = raw.get("args", tool.defaults)
        kept = tuple(a for a in arguments if a not in tool.dropped)
        return Hook(
            name=f"{raw['id']} {version}", command=tool.command + kept,
            requirement=f"{tool.package}=={version}", python_only=tool.python_only, **common,
        )  # fmt: skip
    # Scripts in Python run anywhere; mypy wants the whole tree and minutes.
    entry = str(raw.get("entry", ""))
    is_script = repository["repo"] == "local" and raw.get("language") == "python"
    if not is_script or not entry.startswith("python ") or raw["id"].startswith("mypy"):
        return None
    return Hook(
        name=raw["id"], command=(*shlex.split(entry), *raw.get("args", ())), requirement=None,
        python_only="python" in raw.get("types", ("python",)), **common,
    )  # fmt: skip


def _version(rev: str, config: str) -> str:
    """The version that a hook's `rev` names; a commit has it in a comment beside it."""
    plain = _REV.fullmatch(rev)
    if plain:
        return plain[1]
    beside = re.search(rf"rev: {re.escape(rev)} *# *v?(\d[\w.]*)", config)
    if beside is None:
        raise KeyError(f"rev {rev} names no version")
    return beside[1]


def lint(store: Store, base: str, head: str, *, offline: bool = False) -> Lint:
    """Run the linters of the tree of `base` on what `head` changes.

    Raises:
        OverlayError: a linter can't be installed, or the config can't be read.
    """
    config = store.show(base, CONFIG)
    if config is None:
        return Lint((), (), ())
    found, left_out = hooks(config.decode("utf-8", "replace"))
    changed = [path for path, change in store.changed(base, head).items() if change != "D"]
    ran, findings = [], list[Finding]()
    with check_out(store, head, base) as tree:
        complaining = []
        for hook in found:
            paths = hook.of(changed)
            if paths:
                ran.append(hook.name)
                said = run(hook, tree, paths, offline)
                complaining += [(hook, paths, said)] if said else []
    if complaining:
        with check_out(store, base, None) as tree:
            for hook, paths, said in complaining:
                there = [path for path in paths if (tree / path).is_file()]
                before = run(hook, tree, there, offline) if there else []
                findings += new(before, said)
    return Lint(tuple(ran), left_out, tuple(findings))


def new(before: Iterable[Finding], after: Iterable[Finding]) -> Iterator[Finding]:
    """Those of `after` that `before` has not, wherever they stand in their file."""
    known = Counter(finding.key for finding in before)
    for finding in after:
        if known[finding.key]:
            known[finding.key] -= 1
        else:
            yield finding


@contextmanager
def check_out(store: Store, commit: str, head: str | None) -> Iterator[Path]:
    """A throwaway work tree of `commit`, with all of it staged on `head` (None: on nothing).

    Some scripts look at what is staged, as it is before a commit.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as name:
        folder = Path(name)
        git = Git(folder / ".git", folder)
        git.run("init", "--quiet", str(folder))
        git.run("config", "core.autocrlf", "false")
        objects = (store.git.git_dir / "objects").absolute()
        (folder / ".git/objects/info/alternates").write_text(f"{objects}\n", "utf-8")
        shallow = store.git.git_dir / "shallow"
        if shallow.is_file():
            (folder / ".git/shallow").write_bytes(shallow.read_bytes())
        if head:
            git.run("update-ref", "--no-deref", "HEAD", head)
        git.run("read-tree", commit)
        git.run("checkout-index", "--all", "--force")
        yield folder


def run(hook: Hook, tree: Path, paths: Sequence[str], offline: bool) -> list[Finding]:
    """What `hook` says of `paths` in the work tree `tree`, which is left as it was.

    Raises:
        OverlayError: it can't be installed, or takes too long.
    """
    before = {path: (tree / path).read_bytes() for path in paths}
    start = [find_uv(), *_uv(hook), *(("--offline",) if offline else ())]
    _require(hook, start, tree)
    words = [*start, *hook.command, *(paths if hook.pass_files else ())]
    try:
        done = subprocess.run(
            words, cwd=tree, env=_environment(), capture_output=True, text=True,
            errors="replace", timeout=TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _unusable(hook, f"no end after {TIMEOUT:.0f} s") from error
    after = {path: (tree / path).read_bytes() for path in paths}
    for path, data in before.items():
        (tree / path).write_bytes(data)
    fixed = [
        finding for path in paths for finding in _mended(hook, path, before[path], after[path])
    ]
    if done.returncode == 0 or fixed:
        return fixed
    return list(_said(hook, tree, paths, done.stdout + done.stderr))


def _uv(hook: Hook) -> list[str]:
    """How uv runs it, before its own words."""
    needs = [word for need in hook.needs for word in ("--with", need)]
    python = ["--python", sys.executable]
    if hook.requirement:
        return ["tool", "run", "--quiet", *python, *needs, "--from", hook.requirement]
    return ["run", "--quiet", "--no-project", "--no-config", *python, *needs]


def _require(hook: Hook, start: list[str], tree: Path) -> None:
    """Install it, so that what fails later is its own doing."""
    probe = [hook.command[0], "--version"]
    done = subprocess.run(
        [*start, *probe], cwd=tree, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise _unusable(hook, " ".join(words[-2:]) or f"uv exited {done.returncode}")


def _unusable(hook: Hook, why: str) -> OverlayError:
    return OverlayError(
        f"upstream's linter {hook.name} can't be run", why.rstrip("."),
        "Check the network and uv's index settings (UV_INDEX_URL), or pass --without-lint",
        Exit.ENVIRONMENT,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    """This process's, without what would send git or Python elsewhere."""
    drop = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("GIT_") and key not in drop
    }


def _mended(hook: Hook, path: str, before: bytes, after: bytes) -> Iterator[Finding]:
    """What a formatter changed, a finding a place."""
    old, new_ = (split_lines(data.decode("utf-8", "replace")) for data in (before, after))
    matcher = difflib.SequenceMatcher(a=old, b=new_, autojunk=False)
    for tag, start, end, to, until in matcher.get_opcodes():
        if tag != "equal":
            have = " / ".join(line.strip() for line in old[start:end]) or "nothing"
            want = " / ".join(line.strip() for line in new_[to:until]) or "nothing"
            yield Finding(hook.name, path, start + 1, f"has {have!r}, wants {want!r}")


def _said(hook: Hook, tree: Path, paths: Sequence[str], output: str) -> Iterator[Finding]:
    """The findings in a linter's output: lines with a place, or with one of `paths`, or all."""
    lines = [line.strip().replace(f"{tree}/", "") for line in output.splitlines() if line.strip()]
    placed = [match for line in lines if (match := _PLACE.search(line))]
    for match in placed:
        path = match["path"].removeprefix("./")
        yield Finding(hook.name, path, int(match["line"]), match["text"].strip())
    if not placed:
        named = [(path, line) for line in lines for path in paths if path in line]
        for path, line in named or [("", "; ".join(lines) or "it failed and said nothing")]:
            yield Finding(hook.name, path, 0, line)
