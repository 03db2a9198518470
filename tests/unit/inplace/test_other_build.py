"""A build with a local version, patched in place: its label is kept, and it comes back exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from made_upstream import Upstream, package, write_wheel
from overlay.base.errors import Exit, OverlayError

from ..made_matrix import keep
from .test_inplace import Place, put


def other(upstream: Upstream, folder: Path, version: str, **changes: str) -> Place:
    """An environment with a wheel that someone else built of 1.0."""
    keep(upstream.root, "1.0", "1.1")
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    named = {f"vllm/{name}.py": text for name, text in changes.items()}
    write_wheel(wheel, version, {**package("1.0"), "vllm/_C.abi3.so": b"other", **named})
    return Place(upstream, put("pip", wheel, folder / "venv"))


@pytest.mark.parametrize("label", ["cu118", "cpu", "acme.1", "ACME-1"])
def test_there_and_back(upstream: Upstream, tmp_path: Path, label: str) -> None:
    place = other(upstream, tmp_path, f"1.0+{label}")
    kept = label.lower().replace("-", ".")
    before = place.files
    with pytest.raises(OverlayError, match="a build of someone else, by its version") as caught:
        place.install()
    assert str(caught.value).endswith(
        "If you trust that build: vllm-overlay install --other-build."
    )
    assert caught.value.status is Exit.USAGE
    done = place.install(other_build=True)
    assert (done.before, done.after) == (f"1.0+{label}", f"1.0+{kept}.llama4.1")
    assert not done.is_official_build
    found = {name: data for name, (_, data) in place.files.items()}
    metadata = found[f"vllm-1.0+{kept}.llama4.1.dist-info/METADATA"]
    assert f"\nVersion: 1.0+{kept}.llama4.1\n".encode() in metadata
    assert f"version = '1.0+{kept}.llama4.1'".encode() in found["vllm/_version.py"]
    assert b"use_irope=False" in found["vllm/attention.py"]
    assert found["vllm/_C.abi3.so"] == b"other"
    assert place.doctor() == ()
    assert place.install().action == "nothing"
    assert place.repair().action == "nothing"
    assert place.revert().after == f"1.0+{label}"
    assert place.files == before


def test_a_module_that_states_the_label(upstream: Upstream, tmp_path: Path) -> None:
    module = (
        "__version__ = version = '1.0+acme.1'\n"
        "__version_tuple__ = version_tuple = (1, 0, 'acme.1')\n"
    )
    place = other(upstream, tmp_path, "1.0+acme.1", _version=module)
    before = place.files
    place.install(other_build=True)
    assert (place.site / "vllm/_version.py").read_text() == (
        "__version__ = version = '1.0+acme.1.llama4.1'\n"
        "__version_tuple__ = version_tuple = (1, 0, 'acme.1.llama4.1')\n"
    )
    assert place.doctor() == ()
    place.revert()
    assert place.files == before


def test_repaired(upstream: Upstream, tmp_path: Path) -> None:
    place = other(upstream, tmp_path, "1.0+cu118")
    place.install(other_build=True)
    whole = place.files
    (place.site / "vllm/attention.py").unlink()
    (place.site / "vllm-1.0+cu118.llama4.1.dist-info/RECORD").unlink()
    (said,) = place.doctor()
    assert said.endswith("; vllm-overlay install --repair")
    place.repair()
    assert place.files == whole
    assert place.doctor() == ()


def test_what_can_not_be_repaired(upstream: Upstream, tmp_path: Path) -> None:
    """No index that is known here has that build: it is named, and no command is made up."""
    place = other(upstream, tmp_path, "1.0+cu118")
    place.install(other_build=True)
    (place.site / "vllm/__init__.py").write_text("pass\n")
    advice = (
        "install 1.0+cu118 again from where you have it, with pip's --force-reinstall --no-deps, "
        "then vllm-overlay install --other-build"
    )
    with pytest.raises(OverlayError, match=re.escape(advice)):
        place.repair()
    (said,) = place.doctor()
    assert said.endswith(advice)
    assert "vllm==" not in said


@pytest.mark.parametrize(
    "changes", [{"attention": "pass\n"}, {"extra": "pass\n"}, {"sub/extra": "pass\n"}]
)
def test_other_python_files_are_refused(
    upstream: Upstream, tmp_path: Path, changes: dict[str, str]
) -> None:
    place = other(upstream, tmp_path, "1.0+cu118", **changes)
    before = place.files
    with pytest.raises(OverlayError, match="it is a changed build") as caught:
        place.install(other_build=True)
    assert caught.value.status is Exit.INTEGRITY
    assert "pip install --force-reinstall --no-deps 'vllm==1.0'" in str(caught.value)
    assert place.files == before
