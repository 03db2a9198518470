"""How much memory GPUs have."""

from __future__ import annotations

from dataclasses import dataclass

from overlay.answers import gpus

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A GPU with one of its sizes of memory."""

    gpu: str
    """Its name in `gpus.GPUS`."""
    sold_as: int
    """GB, as its maker says."""
    mib: int
    """As nvidia-smi shows it: with error correction, some of what is sold is taken."""

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mib * MIB

    @property
    def capability(self) -> str:
        """Its compute capability."""
        return gpus.find(self.gpu).capability

    def __str__(self) -> str:
        """H100 80 GB."""
        return f"{self.gpu} {self.sold_as} GB"


#: Of a GPU that is sold with several sizes, the largest; by capability, the commonest first.
CARDS = (
    Card("V100", 32, 32768),
    Card("T4", 16, 15360),
    Card("Quadro RTX 8000", 48, 46080),
    Card("Quadro RTX 6000", 24, 23040),
    Card("A100", 80, 81920),
    Card("A30", 24, 24576),
    Card("RTX 3090", 24, 24576),
    Card("A10", 24, 23028),
    Card("A10G", 24, 23028),
    Card("A40", 48, 46068),
    Card("RTX A5000", 24, 24564),
    Card("RTX A6000", 48, 49140),
    Card("L40S", 48, 46068),
    Card("L4", 24, 23034),
    Card("L40", 48, 46068),
    Card("RTX 4090", 24, 24564),
    Card("RTX 6000 Ada", 48, 49140),
    Card("H100", 80, 81559),
    Card("H200", 141, 143771),
    Card("GH200", 96, 97871),
    Card("B200", 180, 183359),
    Card("RTX 5090", 32, 32607),
    Card("RTX PRO 6000 Blackwell", 96, 97887),
)


def card_of(gpu: str, capability: str) -> Card | None:
    """The card called `gpu`; of a capability alone, its commonest. None if its memory is not
    known."""
    return next(
        (card for card in CARDS if (card.gpu == gpu if gpu else card.capability == capability)),
        None,
    )
