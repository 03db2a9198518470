"""Which GPUs are compiled for."""

from __future__ import annotations

from compiled.cards import CARDS
from matrix.cells import CAPABILITIES


def test_every_gpu_of_the_matrix_is_compiled_for() -> None:
    """In every release."""
    everywhere = {card.capability for card in CARDS if "0.8.3" in card.releases}
    assert everywhere == set(CAPABILITIES)
    assert all("0.10.2" in card.releases for card in CARDS)


def test_in_order() -> None:
    assert [card.capability for card in CARDS] == sorted(card.capability for card in CARDS)
