"""For which GPUs there is code, as a compiler left it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

_PATTERN = r"^(\d+)\.(\d)(a?)$"
#: A compute capability: 9.0; or 9.0a, which is for that one alone.
Architecture = Annotated[str, StringConstraints(pattern=_PATTERN)]


class Code(BaseModel):
    """The code of one kernel, or of several that have the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cubins: tuple[Architecture, ...] = ()
    """What there is machine code for, the oldest first."""
    ptx: tuple[Architecture, ...] = ()
    """What there is PTX for, which the driver compiles when it is loaded."""

    def serves(self, capability: str) -> bool:
        """Whether a GPU of that compute capability can run it.

        Machine code runs on its own minor version and those above, in its major one; PTX on its
        capability and all above; either with an `a` on that one alone. (NVIDIA's CUDA C++
        Programming Guide, "Compute Capabilities", which for machine code excepts Tegra: there it
        is promised for the same version alone.)

        >>> Code(cubins=("8.0", "9.0a")).serves("8.6"), Code(cubins=("8.9",)).serves("8.6")
        (True, False)
        >>> Code(ptx=("8.0",)).serves("12.0"), Code(cubins=("9.0a",)).serves("9.0")
        (True, True)
        """
        return any(_runs(each, capability, "cubin") for each in self.cubins) or any(
            _runs(each, capability, "ptx") for each in self.ptx
        )

    def is_less_than(self, other: Code) -> bool:
        """Whether `other` has all of this, and more."""
        return (
            self != other
            and set(self.cubins) <= set(other.cubins)
            and set(self.ptx) <= set(other.ptx)
        )

    def __str__(self) -> str:
        """As the columns of a table would have it: 8.0 9.0a, PTX 8.0."""
        ptx = f"PTX {' '.join(self.ptx)}" if self.ptx else ""
        return ", ".join(part for part in (" ".join(self.cubins), ptx) if part) or "none"


def code_of(cubins: Iterable[str], ptx: Iterable[str]) -> Code:
    """Each architecture once, the oldest first."""
    return Code(
        cubins=tuple(sorted(set(cubins), key=_parts)), ptx=tuple(sorted(set(ptx), key=_parts))
    )


def _runs(architecture: str, capability: str, kind: Literal["cubin", "ptx"]) -> bool:
    major, minor, exact = _parts(architecture)
    wanted = _parts(capability)[:2]
    if exact:
        return wanted == (major, minor)
    return wanted >= (major, minor) and (kind == "ptx" or wanted[0] == major)


@functools.cache
def _parts(architecture: str) -> tuple[int, int, str]:
    found = re.fullmatch(_PATTERN, architecture)
    if found is None:
        raise ValueError(f"{architecture!r} is no compute capability")
    return int(found[1]), int(found[2]), found[3]
