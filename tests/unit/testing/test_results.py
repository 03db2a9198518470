from __future__ import annotations

from pathlib import Path

import pytest

from made_upstream import Upstream
from overlay.base.errors import OverlayError
from overlay.testing import results
from overlay.testing.results import Verdict

VERDICT = Verdict(
    "1.0",
    ("tests.test_a::test_mended",),
    ("tests.test_a::test_kept", "tests.test_a::test_same"),
    {"tests.test_b::test_gpu": "needs a GPU", "tests.test_b::test_two": "a | b"},
    ("1.0: tests.test_c::test_lost: failed on patched: assert 0",),
)


def _kept(bare_upstream: Upstream, tmp_path: Path) -> Path:
    folder = tmp_path / "regress" / "1.0"
    folder.mkdir(parents=True)
    results.keep(
        folder, bare_upstream.workspace().versions.get("1.0"), "regress", VERDICT, "3.12.1"
    )
    return folder


def test_a_record_is_read_as_it_was_kept(bare_upstream: Upstream, tmp_path: Path) -> None:
    _kept(bare_upstream, tmp_path)
    record = results.load(tmp_path, "1.0")["regress"]
    assert record.verdict == VERDICT
    assert record.command == "vllm-overlay regress 1.0"
    assert record.is_of(bare_upstream.workspace().versions.get("1.0"))


def test_it_is_of_no_other_series(bare_upstream: Upstream, tmp_path: Path) -> None:
    _kept(bare_upstream, tmp_path)
    changed = bare_upstream.workspace().versions.get("1.0").model_copy(update={"tree": "0" * 40})
    assert not results.load(tmp_path, "1.0")["regress"].is_of(changed)


def test_a_release_that_was_not_run_has_none(bare_upstream: Upstream, tmp_path: Path) -> None:
    _kept(bare_upstream, tmp_path)
    assert results.load(tmp_path, "0.9.0") == {}


def test_a_damaged_record_is_named(bare_upstream: Upstream, tmp_path: Path) -> None:
    file = _kept(bare_upstream, tmp_path) / results.FILE
    file.write_text(file.read_text("utf-8")[:40], "utf-8")
    with pytest.raises(OverlayError, match=r"verdict\.json can't be read") as caught:
        results.load(tmp_path, "1.0")
    assert "run that suite again" in str(caught.value)
    file.write_text("{}", "utf-8")
    with pytest.raises(OverlayError, match=r": \w+: Field required\."):
        results.load(tmp_path, "1.0")


def test_the_gpu_suite_is_run_by_regress() -> None:
    assert results.command_of("gpu", "1.0") == "regress 1.0 --suite gpu"


def test_the_summary_tells_counts_problems_and_reasons(
    bare_upstream: Upstream, tmp_path: Path
) -> None:
    summary = (_kept(bare_upstream, tmp_path) / results.SUMMARY).read_text("utf-8")
    assert "| 1 | 2 | 2 | 1 |" in summary
    assert "- **problem** 1.0: tests.test_c::test_lost" in summary
    assert "| 1 | needs a GPU |" in summary
    assert r"| 1 | a \| b |" in summary
