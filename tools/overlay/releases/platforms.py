"""What official wheels are for."""

from __future__ import annotations

from typing import Literal, get_args

#: A processor, on Linux.
Platform = Literal["x86_64", "aarch64"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)


def platform_of(wheel: str) -> Platform:
    """What an official wheel is for, by its file's name."""
    return "aarch64" if wheel.endswith("_aarch64.whl") else "x86_64"
