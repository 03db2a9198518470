"""What the modules of a source tree import of each other, and whether it is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from overlay.patches.tree import Store

_STAR = re.compile(rb"^\s*from .+ import \*", re.MULTILINE)


class Import(NamedTuple):
    """An import in a file."""

    path: str
    module: str
    name: str
    """Empty: of the module itself."""

    def __str__(self) -> str:
        """For people."""
        what = f"{self.name} from {self.module}" if self.name else self.module
        return f"{self.path} imports {what}"


@dataclass(frozen=True)
class Sources:
    """The source trees of a store, each file of which is read once."""

    store: Store
    known: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Files by blob id."""
    imports: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict, repr=False)
    """Modules and names that a file imports, by blob id."""

    def dangling(self, commit: str, paths: Iterable[str]) -> frozenset[Import]:
        """The imports in files of `commit` of what its tree has not; compiled modules are in none.

        Raises:
            SyntaxError: a file is no Python.
        """
        listed = self.store.listing(commit)
        there = [path for path in paths if path.endswith(".py") and path in listed]
        self.read(listed, there)
        wanted = [
            Import(path, module, name)
            for path in there
            for module, name in self._imported(listed[path])
        ]
        self.read(listed, (p for one in wanted for p in _files(one.module) if p in listed))
        return frozenset(one for one in wanted if not self._is_there(listed, one))

    def read(self, listed: Mapping[str, str], paths: Iterable[str]) -> None:
        """Read files of a tree whose blobs are `listed` by path."""
        missing = {listed[path] for path in paths} - self.known.keys()
        self.known.update(self.store.blobs(missing))

    def _imported(self, blob: str) -> tuple[tuple[str, str], ...]:
        if blob not in self.imports:
            self.imports[blob] = tuple(_imports(self.known[blob]))
        return self.imports[blob]

    def _is_there(self, listed: Mapping[str, str], one: Import) -> bool:
        if f"{one.module.partition('.')[0]}/__init__.py" not in listed:
            return True  # a package of others
        text = next((self.known[listed[p]] for p in _files(one.module) if p in listed), None)
        if text is not None and (one.name in ("", "*") or _has(text, one.name)):
            return True
        place = "/".join((*one.module.split("."), *filter(None, [one.name])))
        return any(path in listed for path in _files(place))


def _has(text: bytes, name: str) -> bool:
    """Whether a module may have a name, by its text: what it takes by a star is not looked at."""
    return bool(re.search(rf"\b{re.escape(name)}\b".encode(), text) or _STAR.search(text))


def _files(module: str) -> tuple[str, str]:
    place = module.replace(".", "/")
    return f"{place}.py", f"{place}/__init__.py"


def _imports(source: bytes) -> Iterator[tuple[str, str]]:
    """Absolute imports of a module, or of a name in one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
