"""Does each prefix of a series stand, so that it can be bisected or shipped? What sources tell.

After every patch the Python files that it changed compile, by the grammar of the oldest Python that
the release admits, and import nothing of the package that is not there. It takes no environment;
`testing.prefixes_run` imports and tests them in one.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from overlay.patches.imports import Sources
from overlay.patches.series import PatchPath
from overlay.patches.tree import Result
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

#: The Pythons that may be a release's oldest.
_MINORS = range(6, 20)


@dataclass(frozen=True)
class Prefix:
    """A release with the first patches of its series."""

    path: PatchPath
    """The last of them."""
    commit: str
    tree: str
    changed: tuple[str, ...]
    """The Python files that the last of them changed, those that it deleted apart."""


def of_result(workspace: Workspace, result: Result) -> tuple[Prefix, ...]:
    """The prefixes of a series, the shortest first, as far as it applies."""
    store, before, found = workspace.store, result.base, []
    for one in result.applied:
        if not one.commit:
            break
        changed = store.changed(before, one.commit)
        files = tuple(p for p, how in changed.items() if how != "D" and p.endswith(".py"))
        found.append(Prefix(one.path, one.commit, store.tree_of(one.commit), files))
        before = one.commit
    return tuple(found)


def floor(release: Release) -> tuple[int, int]:
    """The oldest Python that the release admits, as a grammar's version."""
    admitted = SpecifierSet(release.requires_python)
    return next(((3, m) for m in _MINORS if admitted.contains(f"3.{m}")), (3, _MINORS[-1]))


def check(
    workspace: Workspace, result: Result, prefixes: Sequence[Prefix], sources: Sources
) -> Iterator[str]:
    """What does not stand, a line each. `sources` is shared by releases: it reads a file once."""
    release, grammar = result.release, floor(result.release)
    touched = {path for prefix in prefixes for path in prefix.changed}
    upstreams = sources.dangling(result.base, touched)
    for number, prefix in enumerate(prefixes, 1):
        where = f"{release.name}: after {prefix.path} ({number} of {len(result.applied)})"
        listed = workspace.store.listing(prefix.commit)
        sources.read(listed, prefix.changed)
        texts = {path: sources.known[listed[path]] for path in prefix.changed}
        if bad := [line for path, text in texts.items() if (line := _compile(path, text, grammar))]:
            yield from (f"{where}: {line}" for line in bad)
            continue
        for one in sorted(sources.dangling(prefix.commit, prefix.changed) - upstreams):
            yield f"{where}: {one}, which is not there"


def _compile(path: str, text: bytes, grammar: tuple[int, int]) -> str:
    """Why a file does not compile; empty if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, path, "exec", dont_inherit=True)
            ast.parse(text, path, feature_version=grammar)
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        version = ".".join(map(str, grammar))
        return f"{path}{line} does not compile on Python {version}: {error.args[0]}"
    return ""
