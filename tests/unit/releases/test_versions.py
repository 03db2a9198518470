"""VERSIONS.toml: what it refuses, and how a release is looked up."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from overlay.base.errors import Exit, OverlayError
from overlay.releases import versions

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "VERSIONS.toml").read_text()
AFFECTED = """
0.8.3 0.8.4 0.8.5 0.8.5.post1 0.9.0 0.9.0.1 0.9.1 0.9.2 0.10.0 0.10.1 0.10.1.1 0.10.2 0.11.0
""".split()  # noqa: SIM905 - a list of strings would be twelve lines


@pytest.fixture(scope="module")
def ours() -> versions.Versions:
    return versions.load(ROOT / "VERSIONS.toml")


def test_the_releases_and_the_control_in_version_order(ours: versions.Versions) -> None:
    assert [r.name for r in ours.patched] == AFFECTED
    assert list(ours.releases) == ["0.8.2", *AFFECTED]
    assert {r.name for r in ours.releases.values() if r.status == "control"} == {"0.8.2"}


def test_local_version(ours: versions.Versions) -> None:
    assert ours.local_version(ours.get("0.8.5.post1")) == "0.8.5.post1+llama4.5"


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("v0.9.2", "0.9.2"),
        ("0.8.5post1", "0.8.5.post1"),
        ("0.8.5-post1", "0.8.5.post1"),
        ("V0.8.5.POST1", "0.8.5.post1"),
        (" 0.8.3 ", "0.8.3"),
        ("0.8.3+llama4.1", "0.8.3"),
    ],
)
def test_names_are_as_pep_440_has_them(ours: versions.Versions, name: str, release: str) -> None:
    assert ours.get(name) is ours.releases[release]


@pytest.mark.parametrize("name", ["0.8.3+cu118", "", "latest", "0.8.3.*"])
def test_what_is_no_name_of_a_release(ours: versions.Versions, name: str) -> None:
    with pytest.raises(OverlayError, match="unknown release"):
        ours.get(name)


def test_near_misses_stand_in_order(ours: versions.Versions) -> None:
    with pytest.raises(
        OverlayError, match=r"mean 0\.10\.0 or 0\.10\.1 or 0\.10\.1\.1 or 0\.10\.2\?"
    ):
        ours.get("0.10")
    with pytest.raises(OverlayError, match=r"mean 0\.8\.3 or 0\.8\.4 or 0\.8\.5\?"):
        ours.get_patched("0.8.6")


def test_a_control_is_not_offered_to_be_built(ours: versions.Versions) -> None:
    with pytest.raises(OverlayError, match=r"Known: 0\.8\.3, .*0\.11\.0\.$"):
        ours.get_patched("0.11.1")
    with pytest.raises(OverlayError, match=r"0\.8\.2 has no patches: it has no Llama 4"):
        ours.get_patched("0.8.2")


@pytest.mark.parametrize(("name", "near"), [("0.8.5.post2", "0.8.5.post1"), ("0.10.3", "0.10.2")])
def test_the_nearest_names_are_suggested(ours: versions.Versions, name: str, near: str) -> None:
    with pytest.raises(OverlayError, match=f"Did you mean .*{near}") as caught:
        ours.get(name)
    assert caught.value.status is Exit.USAGE


def test_a_control_has_nothing_to_build() -> None:
    entry = re.search(r'\[releases\."0\.8\.2"\]\n.*?(?=\n\[releases\."0\.8\.3"\])', TEXT, re.DOTALL)
    assert entry is not None
    newer = versions.parse(TEXT + entry[0].replace('"0.8.2"', '"0.12.0"'), "VERSIONS.toml")
    with pytest.raises(OverlayError, match=r"release 0\.12\.0 has no patches: .* comparison only"):
        newer.get_patched("0.12.0")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("0.11.0.post1", ">=0.8.3,<0.11.1"),
        ("0.11.1", ">=0.8.3,<0.11.2"),
        ("0.12.0", ">=0.8.3,<0.12.1"),
        ("1", ">=0.8.3,<2"),
        ("0.8.2", ">=0.8.2,<0.11.1"),
    ],
)
def test_a_range_is_widened_as_far_as_it_needs(
    ours: versions.Versions, name: str, wanted: str
) -> None:
    assert ours.upstream.range == ">=0.8.3,<0.11.1"
    assert ours.range_with(Version(name)) == wanted
    assert SpecifierSet(wanted).contains(name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.replace("schema = 1", "schema = 2"), "wrong at schema"),
        (lambda t: t.replace("schema = 1", "schema = 1\nextra = 1"), "wrong at extra"),
        (lambda t: t.replace('torch = "', 'torhc = "', 1), r"wrong at releases\.0\.8\.2\.tor"),
        (lambda t: t.replace("sha256 = ", 'sha256 = "zz" # ', 1), r"sdist\.sha256"),
        (lambda t: t.replace('series = "series/0.8.3"\n', ""), "needs series"),
        (lambda t: t.replace('status = "control"', 'status = "affected"', 1), "needs series, tree"),
        (lambda t: t.replace('status = "affected"', 'status = "control"', 1), "takes no series"),
        (lambda t: t.replace('releases."0.8.2"', 'releases."eight"'), "is not a version"),
        (lambda t: t + "\n[", "is not TOML"),
        (lambda t: t.replace('">=3.10,<3.13"', '"three"'), "is not a version specifier"),
    ],
)
def test_mistakes_are_one_line(change: Callable[[str], str], why: str) -> None:
    text = change(TEXT)
    assert text != TEXT
    with pytest.raises(OverlayError, match=why) as caught:
        versions.parse(text, "VERSIONS.toml")
    assert "\n" not in str(caught.value)


@given(st.text(alphabet=st.sampled_from('[]".=#\n{}releas01v'), max_size=80))
def test_any_text_is_versions_or_an_error(text: str) -> None:
    with contextlib.suppress(OverlayError):
        versions.parse(text, "VERSIONS.toml")
