"""What the matrix takes from writing: each entry says where, and is no one else's."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from matrix.limits import FLASH_ATTN, LIMITS, Limit
from overlay.answers import binaries, flags, matrix
from overlay.releases import versions
from settings.limits import LIMITS as OF_SETTINGS

ROOT = Path(__file__).parents[3]
PATCHED = versions.load(ROOT / "VERSIONS.toml").patched
#: Evidence: a source file and what of it, an issue, a pull request, or a run.
EVIDENCE = (
    re.compile(r"\S+\.(py|cpp|h|cu)\b(, \S+|: \S+| and \S+)"),
    re.compile(r"\b(issues?|PRs?) \d{4,5}\b"),
    re.compile(r"^docs/gpu-results\.md\b"),
)


@cache
def bases() -> frozenset[str]:
    """What the kept cells rest on."""
    kept = (
        matrix.read(matrix.path_of(ROOT, release.name, variant))
        for release in PATCHED
        for variant in ("stock", "patched")
    )
    return frozenset(outcome.basis for one in kept for outcome in one.outcomes)


def name(limit: Limit) -> str:
    return f"{min(limit.impls)}: {limit.message[:30]}"


@pytest.mark.parametrize("limit", [*LIMITS, *OF_SETTINGS], ids=name)
def test_a_limit_names_its_evidence(limit: Limit) -> None:
    assert any(form.search(limit.source) for form in EVIDENCE), limit.source


@pytest.mark.parametrize("limit", LIMITS, ids=name)
def test_some_cell_rests_on_it(limit: Limit) -> None:
    """One that nothing rests on is a second way to say what is known already."""
    assert limit.source in bases()


@pytest.mark.parametrize("limit", OF_SETTINGS, ids=name)
def test_some_setting_rests_on_it(limit: Limit) -> None:
    releases = [one.name for one in PATCHED if flags.path_of(ROOT, one.name).is_file()]
    kept = (flags.read(ROOT, release) for release in releases)
    assert limit.source in {outcome.basis for one in kept for outcome in one.outcomes}


def test_binaries_and_triton_speak_for_themselves() -> None:
    for limit in LIMITS:
        assert "kernel image" not in limit.message
        assert "supported in this architecture" not in limit.message
        assert not re.search(r"fat binary|\.so\b|triton/python|compil", limit.source)


def test_the_binaries_know_where_flash_attention_has_no_code() -> None:
    """8.0 and 9.0 up to 0.8.5.post1, and 10.0 from 0.9.0 on; from 0.9.2 on it has PTX of 8.0, which
    serves all that is newer."""
    assert len(FLASH_ATTN) == 2
    lacking = {
        (release.name, capability)
        for release in PATCHED
        for capability in ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
        for impl in FLASH_ATTN
        if "FlashAttention 2" in binaries.read(ROOT, release.name).lacking(capability, impl)
    }
    first = {"0.8.3", "0.8.4", "0.8.5", "0.8.5.post1"}
    later = {"0.9.0", "0.9.0.1", "0.9.1"}
    assert lacking == {*((one, "10.0") for one in first), *((one, "12.0") for one in first | later)}
