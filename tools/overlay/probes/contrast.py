"""Whether the probes tell stock from patched, for every topic that a series lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overlay.patches.tree import Result
from overlay.patches.workspace import Workspace
from overlay.probes.probing import LLAMA4, Probing, Verdict, on_tree


@dataclass(frozen=True)
class Checked:
    """What became of the probes of a series."""

    probed: int = 0
    """Topics that were probed."""
    problems: tuple[str, ...] = ()


def check(workspace: Workspace, result: Result) -> Checked:
    """On stock a topic's probe has to fail, and where the whole series is applied to pass.

    `result` is a release with its series. There is nothing to check where it has no Llama 4.
    """
    if result.error or LLAMA4 not in workspace.store.listing(result.base):
        return Checked()
    topics = [one.path.topic for one in result.applied]
    name = result.release.name
    stock, patched = (on_tree(workspace, one, topics) for one in (result.base, result.head))
    problems = (
        *_unlike(stock, Verdict.WRONG, f"{name}: on stock, the probe of"),
        *_unlike(patched, Verdict.RIGHT, f"{name}: patched, the probe of"),
    )
    return Checked(len(topics), problems)


def _unlike(found: Probing, wanted: Verdict, where: str) -> Iterator[str]:
    for one in found.probed:
        if one.verdict is not wanted:
            why = f" ({one.why})" if one.why else ""
            yield f"{where} {one.topic} says {one.verdict.value}{why}, not {wanted.value}"
