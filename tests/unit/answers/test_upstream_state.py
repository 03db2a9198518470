"""status --upstream: what the file says, how old it is, and nothing where there is none."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from made_upstream import Ran, Upstream

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[3]
WORKFLOW = ROOT / ".github/workflows/upstream.yml"
PATCH = "attention-signatures/1.0.patch"
BUG = "https://github.com/vllm-project/vllm/issues/7"
PULL = "https://github.com/vllm-project/vllm/pull/12"


@pytest.fixture(autouse=True)
def _a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795564800")  # 2026-11-25
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def upstream(upstream: Upstream) -> Upstream:
    """A patch that waits for a pull request, and names an issue."""
    file = upstream.patches / PATCH
    text = re.sub("Bug: .*", f"Bug: {BUG}", file.read_text())
    file.write_text(re.sub("Remove-When: .*", f"Remove-When: {PULL}", text))
    return upstream


def reference(url: str, state: str, ended: str | None = None) -> dict[str, Any]:
    return {
        "url": url, "state": state, "title": "A title", "updated": "2026-11-10T08:00:00Z",
        "ended": ended,
    }  # fmt: skip


def states(*references: dict[str, Any], checked: str = "2026-11-23T06:41:00Z") -> str:
    return json.dumps({"schema": 1, "checked": checked, "references": references})


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_no_file_yet(run: Run) -> None:
    ran = run("status", "--upstream")
    assert (ran.status, ran.err) == (0, "")
    assert "attention-signatures 1.0 – 1.1 #12" in words(ran.out)
    assert words(ran.out)[-1] == (
        "no file yet: upstream.json is written by .github/workflows/upstream.yml; the states of 2 "
        "pull requests and issues are unknown"
    )
    said = json.loads(run("status", "--upstream", "--json").out)
    assert (said["checked"], said["age_days"]) == (None, None)
    assert [one["state"] for one in said["references"]] == [None, None]


def test_states_with_ages(run: Run, upstream: Upstream) -> None:
    file = upstream.root / "upstream.json"
    file.write_text(states(reference(BUG, "closed", "2026-11-20T00:00:00Z"),
                           reference(PULL, "open")))  # fmt: skip
    out = words(run("status", "--upstream").out)
    assert "#7 closed 5 d attention-signatures" in out
    assert "#12 open 15 d attention-signatures keep the patch" in out
    assert out[-1] == "upstream.json of 2026-11-23, 2 d old"
    file.write_text(states(reference(PULL, "merged", "2026-11-21T00:00:00Z"),
                           checked="2026-11-01T00:00:00Z"))  # fmt: skip
    out = words(run("status", "--upstream").out)
    told = "#12 merged 4 d attention-signatures removal condition met"
    assert told in out
    assert "#7 — — attention-signatures not in the file" in out
    assert out[-1].endswith("24 d old; older than 14 days: does its workflow still run?")
    said = json.loads(run("status", "--upstream", "--json").out)
    assert said["age_days"] == 24
    assert said["references"][1]["patches"] == {PATCH: ["Remove-When"]}


def test_a_release_that_meets_it_and_lists_it_all_the_same(run: Run, upstream: Upstream) -> None:
    file = upstream.patches / PATCH
    file.write_text(re.sub("Remove-When: .*", "Remove-When: v1.1 (V0 is gone)", file.read_text()))
    told = "attention-signatures 1.0 – 1.1 v1.1 (V0 is gone) met in 1.1, which lists it"
    assert told in words(run("status", "--upstream").out)
    (one,) = json.loads(run("status", "--upstream", "--json").out)["conditions"]
    assert one["met_in"] == ["1.1"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        states().replace('"schema": 1', '"schema": 2'),
        states(reference(PULL, "unknown")),
        states(reference("https://example.org", "open")),
        states({**reference(PULL, "open"), "more": 1}),
    ],
)
def test_a_damaged_file(run: Run, upstream: Upstream, text: str) -> None:
    (upstream.root / "upstream.json").write_text(text)
    ran = run("status", "--upstream")
    assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert "upstream.json can't be read" in ran.err


def test_usage(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ("--references",),
        ("--states", "x"),
        ("--upstream", "1.0"),
        ("--upstream", "--markdown"),
        ("--upstream", "--states", str(tmp_path / "none")),
    ):
        assert run("status", *arguments).status == 2, arguments


#: GitHub's answers to what the workflow asks, by path.
ANSWERS = {
    "repos/vllm-project/vllm/issues/7": {
        "title": "It dies", "state": "closed", "updated_at": "2026-11-24T00:00:00Z",
        "closed_at": "2026-11-20T00:00:00Z",
    },
    "repos/vllm-project/vllm/issues/12": {
        "title": "Fix it", "state": "closed", "updated_at": "2026-11-24T00:00:00Z",
        "closed_at": "2026-11-21T00:00:00Z",
        "pull_request": {"merged_at": "2026-11-21T00:00:00Z"},
    },
}  # fmt: skip


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("answers", [ANSWERS, {}])
def test_the_workflow_writes_it(
    run: Run, upstream: Upstream, tmp_path: Path, answers: dict[str, Any]
) -> None:
    """Its own script, with GitHub made up; where GitHub does not answer, nothing is written."""
    (tmp_path / "references.txt").write_text(run("status", "--upstream", "--references").out)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for path, answer in answers.items():
        (tmp_path / path.replace("/", "-")).write_text(json.dumps(answer))
    (bin_ / "gh").write_text(f'#!/bin/sh\ncat "{tmp_path}/$(echo "$2" | tr / -)"\n')
    (bin_ / "gh").chmod(0o755)
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["read"]["steps"]
    (script,) = (step["run"] for step in steps if step.get("name") == "Ask GitHub for each")
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    made = tmp_path / "upstream.json"
    if not answers:
        assert done.returncode != 0
        assert not made.exists()
        return
    assert done.returncode == 0, done.stderr
    ran = run("status", "--upstream", "--states", str(made))
    assert ran.status == 0, ran.err
    out = words(ran.out)
    assert any(line.startswith("#7 closed") for line in out)
    told = "attention-signatures removal condition met"
    assert any(line.startswith("#12 merged") and line.endswith(told) for line in out)
