"""status, series and show: what they tell is what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from made_upstream import Ran, Upstream
from overlay.testing import results
from overlay.testing.results import Verdict

Run = Callable[..., Ran]
PATCH = "attention-signatures/1.0.patch"


@pytest.fixture(autouse=True)
def _a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795564800")  # 2026-11-25
    monkeypatch.setenv("COLUMNS", "80")


def keep(upstream: Upstream, release: str, *problems: str) -> Path:
    """A record of the release's regression tests, as `regress` leaves it."""
    folder = upstream.root / "work/regress" / release
    folder.mkdir(parents=True, exist_ok=True)
    verdict = Verdict(release, ("a", "b"), ("c",), {}, problems)
    one = upstream.workspace().versions.get(release)
    results.keep(folder, one, "regress", verdict, "3.12.1")
    return folder / results.FILE


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_table(run: Run, upstream: Upstream) -> None:
    keep(upstream, "1.0")
    keep(upstream, "1.1", "x failed")
    ran = run("status")
    assert (ran.status, ran.err) == (0, "")
    assert words(ran.out) == [
        ["topic", "releases", "state", "forwarded", "age"],
        ["attention-signatures", "1.0", "–", "1.1", "offset", "to", "+3", "no", "3", "d"],
        [],
        ["release", "patches", "tree", "regress"],
        ["1.0", "1", "as", "locked", "ok"],
        ["1.1", "1", "as", "locked", "1", "problem"],
    ]
    assert max(map(len, ran.out.splitlines())) <= 80


def test_one_release(run: Run) -> None:
    ran = run("status", "1.1")
    assert ["attention-signatures", "1.0", "offset", "+3", "no", "3", "d"] in words(ran.out)
    assert ["1.1", "1", "as", "locked", "—"] in words(ran.out)
    assert "1.0  " not in ran.out.partition("release")[2]


def test_a_result_of_another_series_is_outdated(run: Run, upstream: Upstream) -> None:
    keep(upstream, "1.0")
    (upstream.patches / "series/1.0").write_text("# dropped\n")
    assert ["1.0", "0", "differs", "ok"] in words(run("status", "1.0").out)
    upstream.lock()
    ran = run("status", "1.0")
    assert ["1.0", "0", "as", "locked", "ok,", "outdated"] in words(ran.out)


def test_json(run: Run, upstream: Upstream) -> None:
    keep(upstream, "1.0")
    file = upstream.patches / PATCH
    file.write_text(
        file.read_text().replace("Forwarded: no (made up)", "Forwarded: https://x.org/pull/12")
    )
    found = json.loads(run("status", "--json").out)
    (cell,) = found["1.1"]["patches"]
    assert cell == {
        "topic": "attention-signatures",
        "file": f"patches/{PATCH}",
        "state": "offset",
        "offsets": [3],
        "subject": "[Bugfix] Accept use_irope in XFormersImpl",
        "forwarded": "https://x.org/pull/12",
        "last_update": "2026-11-22",
        "age_days": 3,
    }
    tests = found["1.0"]["tests"]["regress"]
    assert (tests["fail_to_pass"], tests["problems"], tests["current"]) == (2, 0, True)
    assert found["1.1"]["tests"] == {}
    assert "#12" in run("status").out
    markdown = run("status", "--markdown").out
    assert (
        "| attention-signatures | [#12](https://x.org/pull/12) | 3 d | 1.0 | 1.0, offset +3 |\n"
        in markdown
    )
    assert {line.count("|") for line in markdown.split("\n\n")[0].splitlines()} == {6}


def test_what_is_wrong_is_told_and_no_error(run: Run, upstream: Upstream) -> None:
    file = upstream.patches / PATCH
    file.write_text(file.read_text().replace(" self.num_heads = num", " self.heads = num"))
    ran = run("status")
    assert ran.status == 0
    assert "conflict" in ran.out
    assert ["1.0", "1", "—", "—"] in words(ran.out)
    file.unlink()
    ran = run("status")
    assert ["attention-signatures", "1.0", "–", "1.1", "missing", "—", "—"] in words(ran.out)
    assert json.loads(run("status", "--json").out)["1.0"]["patches"][0]["last_update"] is None
    assert "| attention-signatures |  | — | 1.0, missing |" in run("status", "--markdown").out


def test_a_damaged_record(run: Run, upstream: Upstream) -> None:
    file = keep(upstream, "1.0")
    file.write_text("{")
    ran = run("status")
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "can't be read" in ran.err


def test_series(run: Run) -> None:
    ran = run("series", "1.1")
    assert ran.out.splitlines() == [
        f" 1 {PATCH}: offset (+3)",
        "   [Bugfix] Accept use_irope in XFormersImpl",
        "   tests/test_irope.py +2",
        "   vllm/attention.py +1 -1",
        "1.1: 1 patch",
    ]
    (only,) = json.loads(run("series", "1.1", "--json").out)
    assert only["files"] == {"tests/test_irope.py": [2, 0], "vllm/attention.py": [1, 1]}


def test_show(run: Run, upstream: Upstream) -> None:
    ran = run("show", "attention-signatures")
    for text in (
        f"patches/{PATCH}\nfor 1.0 – 1.1\n",
        "From: A Tester <tester@example.org>",
        "which the impl refuses with a TypeError.",
        "Last-Update: 2026-11-22",
        "vllm/attention.py +1 -1",
    ):
        assert text in ran.out
    whole = run("show", "attention-signatures", "--release", "1.1").out
    assert whole.encode() == (upstream.patches / PATCH).read_bytes()
    (only,) = json.loads(run("show", "attention-signatures", "--json").out)
    assert only["releases"] == ["1.0", "1.1"]
    assert {"key": "Forwarded", "value": "no (made up)"} in only["trailers"]


def test_usage(run: Run, upstream: Upstream) -> None:
    (upstream.patches / "series/1.0").write_text("# none\n")
    for arguments, text in (
        (("status", "--json", "--markdown"), "exclude each other"),
        (("status", "2.0"), "unknown release '2.0'"),
        (("series", "0.9"), "has no patches"),
        (("show", "attention-signature"), "Did you mean attention-signatures"),
        (("show", "attention-signatures", "--release", "1.0"), "no patch of attention-signatures"),
    ):
        ran = run(*arguments)
        assert (ran.status, ran.out) == (2, ""), arguments
        assert text in ran.err
