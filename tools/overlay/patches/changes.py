"""What a series does to the files of the package, as a wheel carries them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from overlay.patches.tree import Result, Store

#: What upstream's tree holds beside the package; no wheel carries it.
NOT_SHIPPED = (
    "tests/",
    "docs/",
    "examples/",
    "benchmarks/",
    ".buildkite/",
    ".github/",
    "README.md",
)


@dataclass(frozen=True)
class Changes:
    """What a series does to the files of the package."""

    replaced: Mapping[str, bytes]
    """Files with new bytes."""
    added: Mapping[str, bytes]
    """New files."""
    removed: frozenset[str]
    """Files that go."""

    @classmethod
    def between(
        cls, before: Mapping[str, bytes | None], after: Mapping[str, bytes | None]
    ) -> Changes:
        """What became of the files that were `before`; None: there is no such file."""
        there = {name: data for name, data in after.items() if data is not None}
        return cls(
            {n: data for n, data in there.items() if before[n] not in (None, data)},
            {n: data for n, data in there.items() if before[n] is None},
            frozenset(n for n, d in before.items() if d is not None and n not in there),
        )

    @property
    def kinds(self) -> dict[str, str]:
        """Path and A, M or D of each, in order of path."""
        kinds = (
            dict.fromkeys(self.added, "A")
            | dict.fromkeys(self.replaced, "M")
            | dict.fromkeys(self.removed, "D")
        )
        return dict(sorted(kinds.items()))

    @property
    def digest(self) -> str:
        """What VERSIONS.toml locks as `files`."""
        after = {**self.added, **self.replaced}
        lines = [
            f"{hashlib.sha256(after[name]).hexdigest() if name in after else '-'}  {name}\n"
            for name in self.kinds
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def shipped(store: Store, result: Result) -> Changes:
    """What the series does to files that a wheel may carry."""
    replaced, added, removed = {}, {}, set()
    changed = store.changed(result.base, result.head)
    in_package = [path for path in sorted(changed) if not path.startswith(NOT_SHIPPED)]
    for path, data in store.show_many(result.head, in_package).items():
        how = changed[path]
        if data is None:
            removed.add(path)
        elif how == "A":
            added[path] = data
        else:
            replaced[path] = data
    return Changes(replaced, added, frozenset(removed))
