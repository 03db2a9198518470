"""How many patches are in a tree, against how many its series lists: told by whatever applies them.

A patch can be lost without an error: a line that is skipped, a `git am` that exits 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from overlay.patches.tree import Result, Store


@dataclass(frozen=True)
class Tally:
    """Patches applied, and patches listed.

    >>> str(Tally(11, 12))
    '11 of 12 patches applied'
    """

    applied: int
    listed: int

    def __str__(self) -> str:
        """For people."""
        noun = "patch" if self.listed == 1 else "patches"
        return f"{self.applied} of {self.listed} {noun} applied"

    def as_json(self) -> dict[str, int]:
        """For scripts."""
        return asdict(self)


def of_result(store: Store, result: Result) -> Tally:
    """The tally of a series that was applied; what is applied is counted by git, in commits."""
    return Tally(store.count(result.base, result.head), len(result.applied))
