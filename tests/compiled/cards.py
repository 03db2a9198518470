"""The GPUs that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from regress.releases import RELEASES, span

KIB = 1024


@dataclass(frozen=True)
class Card:
    """A GPU, as far as Triton knows of it."""

    capability: tuple[int, int]
    shared: int
    """Bytes of shared memory that a block may have, which CUDA calls opt-in."""

    releases: frozenset[str] = frozenset(RELEASES)
    """Those that it can have been given by the package index."""

    @property
    def name(self) -> str:
        """Return the capability as the matrix writes it."""
        return "{}.{}".format(*self.capability)


LATE = span("0.10.2")
"""The first release with a wheel for aarch64, and with a torch for what is newer than 9.0."""

CARDS = (
    Card((7, 0), 96 * KIB),
    Card((7, 5), 64 * KIB),
    Card((8, 0), 163 * KIB),
    Card((8, 6), 99 * KIB),
    Card((8, 7), 163 * KIB, LATE),
    Card((8, 9), 99 * KIB),
    Card((9, 0), 227 * KIB),
    Card((10, 0), 227 * KIB),
    Card((10, 3), 227 * KIB, LATE),
    Card((11, 0), 227 * KIB, LATE),
    Card((12, 0), 99 * KIB),
    Card((12, 1), 99 * KIB, LATE),
)
"""CUDA C++ Programming Guide, technical specifications by compute capability: maximum amount of
shared memory per thread block. 8.7 is Jetson Orin, 10.3 B300, 11.0 Jetson Thor, 12.1 GB10."""
